// The backend of ordinary processors: threads and packing over kernels/cpu.
#pragma once

#include <memory>
#include <vector>

#include "backend/host_backend.h"

namespace puna {

// Throws InvalidRequest or DeviceError for an instruction set that this build does not have or this
// processor cannot run.
std::unique_ptr<HostBackend> make_cpu_backend(const BackendOptions& options);
BackendStatus cpu_status();
std::vector<IsaStatus> cpu_isas();  // best first

}  // namespace puna
