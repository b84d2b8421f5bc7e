// Which instruction set runs: the best the machine supports, or the one asked for by name.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernel_table.h"

namespace puna {

// Every instruction set compiled into this build, best first. The last is scalar.
std::vector<const KernelTable*> compiled_isas();

// The table of `isa`, or of the best supported one if `isa` is empty, with every null slot filled from
// the next lower instruction set. Throws InvalidRequest for a name this build does not have, and
// DeviceError for one that this processor cannot run.
KernelTable resolve_isa(const std::string& isa);

}  // namespace puna
