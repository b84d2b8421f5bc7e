// avx512_vnni_bf16: products of bfloat16 pairs; the rest is that of avx512_vnni. Flags in
// CMakeLists.txt.
#include "kernels/cpu/ceilings-inl.h"
#include "kernels/cpu/cpu_features.h"
#include "kernels/cpu/gemm-inl.h"
#include "kernels/kernel_table.h"

namespace puna {

extern const KernelTable kAvx512VnniBf16;
constinit const KernelTable kAvx512VnniBf16 = {.isa = "avx512_vnni_bf16",
                                               .supported = has_avx512_vnni_bf16,
                                               .gemm_bf16 = gemm_bf16,
                                               .peak_bf16 = peak_bf16};

}  // namespace puna
