// Plain C++: runs anywhere, and is the reference of the other instruction sets.
#define PUNA_ISA_SCALAR

#include "kernels/cpu/table-inl.h"

namespace puna {

namespace {
bool anywhere() { return true; }
}  // namespace

extern const KernelTable kScalar;
constinit const KernelTable kScalar = kernels_as("scalar", anywhere);

}  // namespace puna
