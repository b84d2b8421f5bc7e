// neon_i8mm_bf16: flags in CMakeLists.txt.
#include "kernels/cpu/table-inl.h"

namespace puna {

namespace {
bool runs_here() { return detect_cpu_features().neon_i8mm_bf16; }
}  // namespace

extern const KernelTable kNeonI8mmBf16;
const KernelTable kNeonI8mmBf16 = kernels_as("neon_i8mm_bf16", runs_here);

}  // namespace puna
