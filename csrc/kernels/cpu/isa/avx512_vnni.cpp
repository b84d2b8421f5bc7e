// avx512_vnni: products of bytes in one instruction; the rest is that of avx512. Flags in
// CMakeLists.txt.
#include "kernels/cpu/table-inl.h"

namespace puna {

extern const KernelTable kAvx512Vnni;
constinit const KernelTable kAvx512Vnni = kernels_of_codes_as("avx512_vnni", has_avx512_vnni);

}  // namespace puna
