// avx512: flags in CMakeLists.txt.
#include "kernels/cpu/table-inl.h"

namespace puna {

extern const KernelTable kAvx512;
constinit const KernelTable kAvx512 = kernels_as("avx512", has_avx512);

}  // namespace puna
