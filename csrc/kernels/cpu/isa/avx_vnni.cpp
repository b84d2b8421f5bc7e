// avx_vnni: flags in CMakeLists.txt.
#include "kernels/cpu/table-inl.h"

namespace puna {

extern const KernelTable kAvxVnni;
constinit const KernelTable kAvxVnni = kernels_as("avx_vnni", has_avx_vnni);

}  // namespace puna
