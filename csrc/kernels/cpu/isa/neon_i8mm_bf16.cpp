// neon_i8mm_bf16: products of bfloat16 pairs; the rest is that of neon_dotprod. Flags in
// CMakeLists.txt.
#include "kernels/cpu/ceilings-inl.h"
#include "kernels/cpu/cpu_features.h"
#include "kernels/cpu/gemm-inl.h"
#include "kernels/kernel_table.h"

namespace puna {

extern const KernelTable kNeonI8mmBf16;
constinit const KernelTable kNeonI8mmBf16 = {.isa = "neon_i8mm_bf16",
                                             .supported = has_neon_i8mm_bf16,
                                             .gemm_bf16 = gemm_bf16,
                                             .peak_bf16 = peak_bf16};

}  // namespace puna
