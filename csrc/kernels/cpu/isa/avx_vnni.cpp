// avx_vnni: products of bytes in one instruction; the rest is that of avx2. Flags in
// CMakeLists.txt.
#include "kernels/cpu/table-inl.h"

namespace puna {

extern const KernelTable kAvxVnni;
constinit const KernelTable kAvxVnni = kernels_of_codes_as("avx_vnni", has_avx_vnni);

}  // namespace puna
