// neon_dotprod: flags in CMakeLists.txt.
#include "kernels/cpu/table-inl.h"

namespace puna {

namespace {
bool runs_here() { return detect_cpu_features().neon_dotprod; }
}  // namespace

extern const KernelTable kNeonDotprod;
const KernelTable kNeonDotprod = kernels_as("neon_dotprod", runs_here);

}  // namespace puna
