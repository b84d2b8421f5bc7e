#include "engine/factory.h"

#include "backend/cpu/cpu_backend.h"
#include "backend/ref/ref_backend.h"
#include "base/error.h"
#include "kv/tiers/ram.h"
#include "puna/engine.h"

namespace puna {

namespace {

struct Entry {
  const char* name;
  std::unique_ptr<Backend> (*make)(const BackendOptions&);
  BackendStatus (*status)();
};

constexpr Entry kBackends[] = {
#define PUNA_BACKEND(name) {#name, &make_##name##_backend, &name##_status},
#include "backend/backends.inc"
#undef PUNA_BACKEND
};

}  // namespace

std::vector<BackendStatus> available_backends() {
  std::vector<BackendStatus> all;
  for (const Entry& entry : kBackends) all.push_back(entry.status());
  return all;
}

std::vector<IsaStatus> available_isas() { return cpu_isas(); }

std::unique_ptr<Backend> make_backend(const std::string& device, const BackendOptions& options) {
  std::string names;
  for (const Entry& entry : kBackends) {
    names += (names.empty() ? "" : ", ") + std::string(entry.name);
    if (device != "auto" && device != entry.name) continue;
    const BackendStatus status = entry.status();
    if (status.available) return entry.make(options);
    if (device != "auto") fail(ErrorCode::kDevice, "device '", device, "': ", status.why);
  }
  if (device.starts_with("cuda")) {
    fail(ErrorCode::kDevice, "device '", device,
         "': this build of puna has no CUDA backend; use one of ", names);
  }
  fail(ErrorCode::kInvalidRequest, "device is '", device, "'; it must be 'auto' or one of ", names);
}

std::unique_ptr<KvTier> make_memory_tier(int64_t budget) { return make_ram_tier(budget); }

}  // namespace puna
