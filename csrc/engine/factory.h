// Makes backends and KV tiers by name: with factory.cpp the only place that knows them all.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "kv/kv_tier.h"

namespace puna {

// Throws InvalidRequest for a name that does not exist, and DeviceError, with the reason, for one
// that cannot run here.
std::unique_ptr<Backend> make_backend(const std::string& device, BackendOptions options);

// Throws InvalidRequest if there is a stream (LoadOptions::stream) that this device cannot compute
// on; whether it is of the very device, making the backend tells.
void check_stream(const std::string& device, const std::shared_ptr<void>& stream);

// Where to load a model, the best first: the device itself, or of "auto" a GPU, if one is there and
// will do, then the CPU, for models that do not fit the GPU's memory.
std::vector<std::string> devices_to_try(const std::string& device, bool gpu_will_do);

// Every instruction set of the backend that has them, best first.
std::vector<IsaStatus> available_isas();

// Pages in memory, that of the host or the backend's own; `budget` bytes at most (0 = no bound but
// the system's).
std::unique_ptr<KvTier> make_memory_tier(int64_t budget);
std::unique_ptr<KvTier> make_memory_tier(Backend& backend, int64_t budget);
// Of the host's memory for a backend that has its own; null for others.
std::unique_ptr<KvTier> make_host_tier(Backend& backend, int64_t budget);

}  // namespace puna
