// avx2: flags in CMakeLists.txt.
#include "kernels/cpu/table-inl.h"

namespace puna {

extern const KernelTable kAvx2;
constinit const KernelTable kAvx2 = kernels_as("avx2", has_avx2);

}  // namespace puna
