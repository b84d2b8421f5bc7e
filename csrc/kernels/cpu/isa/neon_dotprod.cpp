// neon_dotprod: flags in CMakeLists.txt.
#include "kernels/cpu/table-inl.h"

namespace puna {

extern const KernelTable kNeonDotprod;
constinit const KernelTable kNeonDotprod = kernels_as("neon_dotprod", has_neon_dotprod);

}  // namespace puna
