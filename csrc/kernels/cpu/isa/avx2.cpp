// avx2: flags in CMakeLists.txt.
#include "kernels/cpu/table-inl.h"

namespace puna {

namespace {
bool runs_here() { return detect_cpu_features().avx2; }
}  // namespace

extern const KernelTable kAvx2;
const KernelTable kAvx2 = kernels_as("avx2", runs_here);

}  // namespace puna
