#include "engine/factory.h"

#include <charconv>
#include <cstdint>

#include "backend/cpu/cpu_backend.h"
#include "backend/cuda/cuda_backend.h"
#include "backend/ref/ref_backend.h"
#include "base/error.h"
#include "kv/tiers/device.h"
#include "kv/tiers/pinned.h"
#include "kv/tiers/ram.h"
#include "puna/engine.h"

namespace puna {

namespace {

std::unique_ptr<Backend> make_cuda_backend(const BackendOptions& options) {
  return make_cuda_backend(cuda_library(), options.ordinal, make_cpu_backend(options), 0,
                           options.stream);
}

struct Entry {
  const char* name;
  std::unique_ptr<Backend> (*make)(const BackendOptions&);
  BackendStatus (*status)();
};

constexpr Entry kBackends[] = {
#define PUNA_BACKEND(name)                                         \
  {#name,                                                          \
   [](const BackendOptions& options) -> std::unique_ptr<Backend> { \
     return make_##name##_backend(options);                        \
   },                                                              \
   &name##_status},
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

std::unique_ptr<Backend> make_backend(const std::string& device, BackendOptions options) {
  std::string name = device, names;
  // "cuda:1" is the second of several.
  if (const size_t colon = device.find(':'); colon != std::string::npos) {
    const char* const end = device.data() + device.size();
    const auto [last, error] = std::from_chars(device.data() + colon + 1, end, options.ordinal);
    if (error == std::errc() && last == end && options.ordinal >= 0) name = device.substr(0, colon);
  }
  for (const Entry& entry : kBackends) {
    names += (names.empty() ? "" : ", ") + std::string(entry.name);
    if (name != entry.name) continue;
    const BackendStatus status = entry.status();
    if (status.available) return entry.make(options);
    fail(ErrorCode::kDevice, "device '", device, "': ", status.why);
  }
  fail(ErrorCode::kInvalidRequest, "device is '", device, "'; it must be 'auto' or one of ", names,
       " (of several GPUs cuda:0, cuda:1, ...)");
}

void check_stream(const std::string& device, const std::shared_ptr<void>& stream) {
  if (stream.use_count() == 0) return;
  if (device.substr(0, device.find(':')) != "cuda")
    fail(ErrorCode::kInvalidRequest, {.param = "stream"},
         "[load] a stream is for device='cuda', or 'cuda:N'; device is '", device, "'");
  // What CUDA calls null, cudaStreamLegacy and cudaStreamPerThread.
  const auto handle = reinterpret_cast<uintptr_t>(stream.get());
  if (handle <= 2)
    fail(ErrorCode::kInvalidRequest, {.param = "stream"}, "[load] the stream's handle is ", handle,
         ", a default stream, which is everybody's or each thread's own; make one, as "
         "cuda.core.Device().create_stream() does");
}

std::vector<std::string> devices_to_try(const std::string& device, bool gpu_will_do) {
  if (device != "auto") return {device};
  std::vector<std::string> devices;
  if (gpu_will_do && cuda_status().available) devices.push_back("cuda");
  devices.push_back("cpu");
  return devices;
}

std::unique_ptr<KvTier> make_memory_tier(int64_t budget) { return make_ram_tier(budget); }
std::unique_ptr<KvTier> make_memory_tier(Backend& backend, int64_t budget) {
  return backend.device_memory() ? make_device_tier(backend, budget) : make_ram_tier(budget);
}
std::unique_ptr<KvTier> make_host_tier(Backend& backend, int64_t budget) {
  return backend.device_memory() ? make_pinned_tier(backend, budget) : nullptr;
}

}  // namespace puna
