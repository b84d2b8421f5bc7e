// Makes backends and KV tiers by name: with factory.cpp the only place that knows them all.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "kv/kv_tier.h"

namespace puna {

// "auto" takes the first available of backends.inc. Throws InvalidRequest for a name that does not
// exist, and DeviceError, with the reason, for one that cannot run here.
std::unique_ptr<Backend> make_backend(const std::string& device, BackendOptions options);

// Every instruction set of the backend that has them, best first.
std::vector<IsaStatus> available_isas();

// Pages in memory, that of the host or the backend's own; `budget` bytes at most (0 = no bound but
// the system's).
std::unique_ptr<KvTier> make_memory_tier(int64_t budget);
std::unique_ptr<KvTier> make_memory_tier(Backend& backend, int64_t budget);

}  // namespace puna
