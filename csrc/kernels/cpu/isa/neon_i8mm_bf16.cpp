// neon_i8mm_bf16: flags in CMakeLists.txt.
#include "kernels/cpu/table-inl.h"

namespace puna {

extern const KernelTable kNeonI8mmBf16;
constinit const KernelTable kNeonI8mmBf16 = kernels_as("neon_i8mm_bf16", has_neon_i8mm_bf16);

}  // namespace puna
