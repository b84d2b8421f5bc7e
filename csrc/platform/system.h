// What this machine has: processor, cores this process may use, memory. For choosing defaults, for
// refusing what cannot fit, and for `puna doctor`.
#pragma once

#include <cstdint>
#include <string>

namespace puna {

std::string processor_name();

// Physical cores in the affinity mask of this process, limited by its cgroup's quota; at least 1.
int usable_cores();

// Bytes, the cgroup's limit honoured.
int64_t total_memory_bytes();
int64_t available_memory_bytes();

// Peak resident set of this process so far.
int64_t peak_resident_bytes();

}  // namespace puna
