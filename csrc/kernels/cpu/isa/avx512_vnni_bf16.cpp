// avx512_vnni_bf16: flags in CMakeLists.txt.
#include "kernels/cpu/table-inl.h"

namespace puna {

namespace {
bool runs_here() { return detect_cpu_features().avx512_vnni && detect_cpu_features().avx512_bf16; }
}  // namespace

extern const KernelTable kAvx512VnniBf16;
const KernelTable kAvx512VnniBf16 = kernels_as("avx512_vnni_bf16", runs_here);

}  // namespace puna
