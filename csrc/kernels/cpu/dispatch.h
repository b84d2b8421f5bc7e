// Which instruction set runs: the best the machine supports, or the one asked for by name.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernel_table.h"

namespace puna {

// Every instruction set compiled into this build, best first. The last is scalar.
std::vector<const KernelTable*> compiled_isas();

// The table of `isa`, with every null slot filled from the next lower instruction set. An empty
// name means the environment's PUNA_ISA, or else the best supported one. Throws InvalidRequest for
// a name this build does not have, and DeviceError for one that this processor cannot run.
KernelTable resolve_isa(const std::string& isa);

}  // namespace puna
