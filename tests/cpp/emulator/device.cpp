#include "emulator/device.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "emulator/machine.h"
#include "kernels/cuda/launches.h"

namespace emulator {
namespace {

using puna::cuda::DeviceInfo;

constexpr int kFault = 1;
std::string last_fault;

using Graph = std::vector<std::function<int()>>;

// What was fetched and has not been waited for.
struct Fetched {
  void* to;
  std::vector<char> bytes;
};

struct Device {
  const char* name;
  Schedule schedule;
  std::unique_ptr<Graph> noting;  // while a graph is made
  std::vector<Fetched> fetched;
};
// The last warp of a block of eight often ends the sums of the others.
Device devices[] = {
    {"emulator", {}, {}, {}},
    {"emulator, late copies, warp 0 starved", {true, 0}, {}, {}},
    {"emulator, warp 1 starved", {false, 1}, {}, {}},
    {"emulator, late copies, warp 7 starved", {true, 7}, {}, {}},
};

// A fault in a kernel becomes the code of its launch, as on a device.
template <auto kLaunch, class Call>
int run(void* device, const Call* call) {
  auto& of = *static_cast<Device*>(device);
  if (of.noting != nullptr) {
    of.noting->push_back([device, noted = *call] { return run<kLaunch>(device, &noted); });
    return 0;
  }
  Machine::instance().set_schedule(of.schedule);
  try {
    return kLaunch(*call, nullptr);
  } catch (const Fault& fault) {
    last_fault = fault.what();
    return kFault;
  }
}

int begin_graph(void* device) {
  static_cast<Device*>(device)->noting = std::make_unique<Graph>();
  return 0;
}

int end_graph(void* device, void** graph) {
  *graph = static_cast<Device*>(device)->noting.release();
  return 0;
}

int start_graph(void*, void* graph) {
  for (const auto& kernel : *static_cast<Graph*>(graph))
    if (const int code = kernel()) return code;
  return 0;
}

int release_graph(void*, void* graph) {
  delete static_cast<Graph*>(graph);
  return 0;
}

int device_count(int* count) {
  *count = static_cast<int>(std::size(devices));
  return 0;
}

int device_info(int ordinal, DeviceInfo* info) {
  const char* const given = std::getenv("EMULATOR_MEMORY");  // bytes
  const int64_t memory = given != nullptr ? std::atoll(given) : int64_t{1} << 32;
  *info = {{}, 9, 0, 1, memory, memory};
  std::snprintf(info->name, sizeof(info->name), "%s", devices[ordinal].name);
  return 0;
}

const char* describe(int) { return last_fault.c_str(); }

int open_device(int ordinal, void** device) {
  *device = &devices[ordinal];
  return 0;
}

int allocate(void*, size_t bytes, void** memory) {
  // Of the size asked for, so that AddressSanitizer sees what lies beyond.
  *memory = std::calloc(bytes, 1);
  return *memory == nullptr ? kFault : 0;
}

int release(void*, void* memory) {
  std::free(memory);
  return 0;
}

int copy(void*, void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
  return 0;
}

int download(void*, void* to, const void* from, size_t bytes, size_t stride, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(static_cast<char*>(to) + static_cast<size_t>(r) * bytes,
                static_cast<const char*>(from) + static_cast<size_t>(r) * stride, bytes);
  return 0;
}

// Floats that are no numbers, and rows that do not exist.
constexpr int kNothing = 0xff;

int allocate_host(void*, size_t bytes, void** memory) {
  *memory = std::malloc(bytes);
  if (*memory == nullptr) return kFault;
  std::memset(*memory, kNothing, bytes);
  return 0;
}

// It arrives as late as is legal.
int fetch(void* device, void* to, const void* from, size_t bytes, size_t stride, int64_t rows) {
  Fetched fetched{to, std::vector<char>(bytes * static_cast<size_t>(rows))};
  download(device, fetched.bytes.data(), from, bytes, stride, rows);
  std::memset(to, kNothing, fetched.bytes.size());
  static_cast<Device*>(device)->fetched.push_back(std::move(fetched));
  return 0;
}

int await_fetched(void* device) {
  std::vector<Fetched>& all = static_cast<Device*>(device)->fetched;
  for (const Fetched& fetched : all)
    std::memcpy(fetched.to, fetched.bytes.data(), fetched.bytes.size());
  all.clear();
  return 0;
}

}  // namespace

const puna::cuda::DeviceTable& device_table() {
  using namespace puna::cuda;  // NOLINT
  static const DeviceTable table = {
      kTableVersion,
      &device_count,
      &device_info,
      &describe,
      &open_device,
      [](void* device) { static_cast<Device*>(device)->fetched.clear(); },
      [](void*) { return 0; },
      &allocate,
      &release,
      &copy,
      &download,
      &copy,
      &allocate_host,
      &release,
      &fetch,
      &await_fetched,
      &begin_graph,
      &end_graph,
      &start_graph,
      &release_graph,
#define PUNA_OPERATION(name, Call) &run<launch_##name, Call>,
#include "kernels/cuda/operations.inc"
#undef PUNA_OPERATION
  };
  return table;
}

}  // namespace emulator
