// avx512: flags in CMakeLists.txt.
#include "kernels/cpu/table-inl.h"

namespace puna {

namespace {
bool runs_here() { return detect_cpu_features().avx512; }
}  // namespace

extern const KernelTable kAvx512;
const KernelTable kAvx512 = kernels_as("avx512", runs_here);

}  // namespace puna
