// avx512_vnni: flags in CMakeLists.txt.
#include "kernels/cpu/table-inl.h"

namespace puna {

extern const KernelTable kAvx512Vnni;
constinit const KernelTable kAvx512Vnni = kernels_as("avx512_vnni", has_avx512_vnni);

}  // namespace puna
