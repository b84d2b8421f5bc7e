// avx512_vnni_bf16: flags in CMakeLists.txt.
#include "kernels/cpu/table-inl.h"

namespace puna {

extern const KernelTable kAvx512VnniBf16;
constinit const KernelTable kAvx512VnniBf16 = kernels_as("avx512_vnni_bf16", has_avx512_vnni_bf16);

}  // namespace puna
