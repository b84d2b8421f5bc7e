#include "emulator/device.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <set>
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

// How often it has been recorded, and how often that has come true.
struct Event {
  uint64_t recorded = 0, reached = 0;
  puna::cuda::Queue queue = puna::cuda::kMainQueue;  // that it was recorded in
  std::chrono::steady_clock::time_point at;          // when it was reached
};

// What a queue was asked for: to wait for an event, or to do something.
struct Task {
  std::shared_ptr<Event> event;
  uint64_t recorded = 0;  // that is waited for
  std::function<int()> work;
};

struct Kind {
  const char* name;
  Schedule schedule;
  bool warpgroups;  // whether it has their products
};
// The last warp of a block of eight often ends the sums of the others.
constexpr Kind kinds[] = {
    {"emulator", {}, false},
    {"emulator, late copies, warp 0 starved, reversed", {true, 0, false, true}, false},
    // What is overwritten before products have read it is seen where only these are late.
    {"emulator, warpgroups, late products, warp 1 starved", {false, 1, true}, true},
    {"emulator, warpgroups, late copies and products, warp 7 starved, reversed",
     {true, 7, true, true},
     true},
};

struct Stream {
  int ordinal;
  std::deque<Task> waiting;  // in the order of the calls
  int64_t asked = 0;         // how often
};
std::set<Stream*> streams;  // those that users made
bool everybody_fails = false;

struct Device {
  const Kind& kind;
  Stream own, sends;
  Stream* queues[2];              // by puna::cuda::Queue
  std::unique_ptr<Graph> noting;  // while a graph is made
  std::vector<Fetched> fetched;
};
bool is_late = false;
int64_t sent = 0;
using Blocks = std::map<const char*, size_t>;  // bytes of each
Blocks pinned;                                 // what allocate_host() gave
Blocks unborn;               // what allocate() gave, and the main queue has not come to yet
Blocks allocated, uploaded;  // what it gave, and what of it came from the host

Device& device_of(void* device) { return *static_cast<Device*>(device); }

// Of two queues, one is as early as is legal, and the other as late: what it is asked for is done
// when somebody waits for it. Late is the one of send(), or if it is said so (set_late) the main
// one. So what reads memory before it has come, and what overwrites memory that is still read, are
// both seen.
int go_on(Device& device);

// One step towards the end of a queue: its first task, or if that waits for an event, the next of
// the other queue.
int do_next(Device& device, puna::cuda::Queue queue) {
  auto& waiting = device.queues[queue]->waiting;
  if (const Event* const event = waiting.front().event.get())
    if (event->reached < waiting.front().recorded) return do_next(device, event->queue);
  const Task task = std::move(waiting.front());
  waiting.pop_front();
  if (task.event == nullptr)
    if (const int code = task.work()) return code;
  return is_late && queue == puna::cuda::kMainQueue ? go_on(device) : 0;
}

int do_all(Device& device, puna::cuda::Queue queue) {
  while (!device.queues[queue]->waiting.empty())
    if (const int code = do_next(device, queue)) return code;
  return 0;
}

// The early queue: kernels at once, with what they wait for; what is sent only as far as it goes by
// itself.
int go_on(Device& device) {
  if (!is_late) return do_all(device, puna::cuda::kMainQueue);
  const auto& sends = device.sends.waiting;
  while (!sends.empty() &&
         (sends.front().event == nullptr || sends.front().event->reached >= sends.front().recorded))
    if (const int code = do_next(device, puna::cuda::kSendQueue)) return code;
  return 0;
}

int ask(void* device, puna::cuda::Queue queue, Task task) {
  Stream& stream = *device_of(device).queues[queue];
  ++stream.asked;
  stream.waiting.push_back(std::move(task));
  return go_on(device_of(device));
}

int do_or_wait(void* device, std::function<int()> work) {
  return ask(device, puna::cuda::kMainQueue, {nullptr, 0, std::move(work)});
}

int catch_up(void* device) { return do_all(device_of(device), puna::cuda::kMainQueue); }

int synchronise(void* device) {
  if (const int code = do_all(device_of(device), puna::cuda::kSendQueue)) return code;
  return do_all(device_of(device), puna::cuda::kMainQueue);
}

// What users ask streams for waits for nothing.
int await_everybody(void* device) {
  if (const int code = synchronise(device)) return code;
  if (everybody_fails) return kFault;
  for (Stream* const stream : streams) {
    if (stream->ordinal != device_of(device).own.ordinal) continue;
    for (; !stream->waiting.empty(); stream->waiting.pop_front()) stream->waiting.front().work();
  }
  return 0;
}

bool lies_in(const Blocks& blocks, const void* memory) {
  const auto* const at = static_cast<const char*>(memory);
  const auto after = blocks.upper_bound(at);
  if (after == blocks.begin()) return false;
  const auto& [begin, bytes] = *std::prev(after);
  return at < begin + bytes;
}

void note_upload(const void* to) {
  const auto after = allocated.upper_bound(static_cast<const char*>(to));
  if (after != allocated.begin()) uploaded.insert(*std::prev(after));
}
// Weights: what kernels write nobody uploads.
bool is_uploaded(const void* memory) { return lies_in(uploaded, memory); }

// A fault in a kernel becomes the code of its launch, as on a device.
template <auto kLaunch, class Call>
int run(void* device, const Call* call) {
  auto& of = *static_cast<Device*>(device);
  if (of.noting != nullptr) {
    of.noting->push_back([device, noted = *call] { return run<kLaunch>(device, &noted); });
    return 0;
  }
  return do_or_wait(device, [&of, noted = *call] {
    Machine::instance().set_schedule(of.kind.schedule);
    Machine::instance().set_most_shared(of.kind.warpgroups ? Machine::kWarpgroupShared
                                                           : Machine::kLeastShared);
    Machine::instance().set_is_constant(&is_uploaded);
    puna::cuda::has_warpgroups = of.kind.warpgroups;
    try {
      return kLaunch(noted, nullptr);
    } catch (const Fault& fault) {
      last_fault = fault.what();
      return kFault;
    }
  });
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
  *count = static_cast<int>(std::size(kinds));
  return 0;
}

int free_memory(int, int64_t* bytes) {
  const char* const given = std::getenv("EMULATOR_MEMORY");  // bytes
  *bytes = given != nullptr ? std::atoll(given) : int64_t{1} << 32;
  return 0;
}

int device_info(int ordinal, DeviceInfo* info) {
  *info = {{}, 9, 0, 1, 0};
  free_memory(ordinal, &info->memory);
  std::snprintf(info->name, sizeof(info->name), "%s", kinds[ordinal].name);
  return 0;
}

const char* describe(int) { return last_fault.c_str(); }

int stream_device(void* stream, int* ordinal) {
  if (streams.count(static_cast<Stream*>(stream)) == 0) {
    last_fault = "there is no such stream";
    return kFault;
  }
  *ordinal = static_cast<Stream*>(stream)->ordinal;
  return 0;
}

int open_device(int ordinal, void* stream, void** device) {
  auto* const made = new Device{kinds[ordinal], {ordinal, {}}, {ordinal, {}}, {}, {}, {}};
  made->queues[puna::cuda::kMainQueue] =
      stream != nullptr ? static_cast<Stream*>(stream) : &made->own;
  made->queues[puna::cuda::kSendQueue] = &made->sends;
  *device = made;
  return 0;
}

void close_device(void* device) {
  Device& of = device_of(device);
  Stream* const main = of.queues[puna::cuda::kMainQueue];
  if (main != &of.own && streams.count(main) == 0) {
    std::fprintf(stderr, "a stream was destroyed before the device that works on it was closed\n");
    std::abort();
  }
  synchronise(device);
  delete &of;
}

int allocate(void* device, size_t bytes, void** memory) {
  // Of the size asked for, so that AddressSanitizer sees what lies beyond.
  *memory = std::calloc(bytes, 1);
  if (*memory == nullptr) return kFault;
  const auto* const begin = static_cast<const char*>(*memory);
  unborn[begin] = allocated[begin] = bytes;
  return do_or_wait(device, [begin] {
    unborn.erase(begin);
    return 0;
  });
}

int release(void* device, void* memory) {
  return do_or_wait(device, [memory] {
    allocated.erase(static_cast<const char*>(memory));
    uploaded.erase(static_cast<const char*>(memory));
    std::free(memory);
    return 0;
  });
}

int copy(void* device, void* to, const void* from, size_t bytes) {
  return do_or_wait(device, [to, from, bytes] {
    std::memcpy(to, from, bytes);
    return 0;
  });
}

int upload(void* device, void* to, const void* from, size_t bytes) {
  note_upload(to);
  if (!is_late || lies_in(pinned, from)) return copy(device, to, from, bytes);
  const auto* const begin = static_cast<const char*>(from);
  return do_or_wait(device, [to, noted = std::vector<char>(begin, begin + bytes)] {
    std::memcpy(to, noted.data(), noted.size());
    return 0;
  });
}

int download(void* device, void* to, const void* from, size_t bytes, size_t stride, int64_t rows) {
  if (const int code = catch_up(device)) return code;
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(static_cast<char*>(to) + static_cast<size_t>(r) * bytes,
                static_cast<const char*>(from) + static_cast<size_t>(r) * stride, bytes);
  return 0;
}

// Floats that are no numbers, and rows that do not exist.
constexpr int kNothing = 0xff;

int allocate_host(void*, size_t bytes, void** memory) {
  constexpr size_t kPage = 4096;
  *memory = std::aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage);
  if (*memory == nullptr) return kFault;
  std::memset(*memory, kNothing, bytes);
  pinned.emplace(static_cast<const char*>(*memory), bytes);
  return 0;
}

// What is on its way from it or to it ends first.
int release_host(void* device, void* memory) {
  const int code = synchronise(device);
  pinned.erase(static_cast<const char*>(memory));
  std::free(memory);
  return code;
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

int send(void* device, void* to, const void* from, size_t bytes) {
  ++sent;
  note_upload(to);
  // Memory that is not pinned is read before the call returns.
  std::vector<char> staged;
  if (!lies_in(pinned, from))
    staged.assign(static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
  return ask(device, puna::cuda::kSendQueue,
             {nullptr, 0, [to, from, bytes, staged = std::move(staged)] {
                if (lies_in(unborn, to)) {
                  last_fault = "send() to memory that is not there yet";
                  return kFault;
                }
                std::memcpy(to, staged.empty() ? from : staged.data(), bytes);
                return 0;
              }});
}

std::shared_ptr<Event>& event_of(void* event) {
  return *static_cast<std::shared_ptr<Event>*>(event);
}

int make_event(void*, int32_t, void** event) {
  *event = new std::shared_ptr<Event>(new Event);
  return 0;
}

int release_event(void*, void* event) {
  delete &event_of(event);
  return 0;
}

int record_event(void* device, void* event, int32_t queue) {
  const std::shared_ptr<Event>& of = event_of(event);
  of->queue = static_cast<puna::cuda::Queue>(queue);
  return ask(device, of->queue, {nullptr, 0, [of, recorded = ++of->recorded] {
                                   of->reached = recorded;
                                   of->at = std::chrono::steady_clock::now();
                                   return 0;
                                 }});
}

int wait_for_event(void* device, void* event, int32_t queue) {
  const std::shared_ptr<Event>& of = event_of(event);
  return ask(device, static_cast<puna::cuda::Queue>(queue), {of, of->recorded, {}});
}

int await_event(void* device, void* event) {
  const std::shared_ptr<Event>& of = event_of(event);
  while (of->reached < of->recorded)
    if (const int code = do_next(device_of(device), of->queue)) return code;
  return 0;
}

int elapsed(void* device, void* from, void* to, float* milliseconds) {
  for (void* event : {from, to})
    if (const int code = await_event(device, event)) return code;
  *milliseconds =
      std::chrono::duration<float, std::milli>(event_of(to)->at - event_of(from)->at).count();
  return 0;
}

}  // namespace

void set_late(bool late) { is_late = late; }

int64_t sends() { return sent; }

void set_everybody_fails(bool fails) { everybody_fails = fails; }

void* make_stream(int ordinal) {
  auto* const stream = new Stream{ordinal, {}};
  streams.insert(stream);
  return stream;
}

void destroy_stream(void* stream) {
  streams.erase(static_cast<Stream*>(stream));
  delete static_cast<Stream*>(stream);
}

void ask_stream(void* stream, std::function<void()> work) {
  static_cast<Stream*>(stream)->waiting.push_back({nullptr, 0, [work = std::move(work)] {
                                                     work();
                                                     return 0;
                                                   }});
}

int64_t asked(const void* stream) { return static_cast<const Stream*>(stream)->asked; }

const puna::cuda::DeviceTable& device_table() {
  using namespace puna::cuda;  // NOLINT
  static const DeviceTable table = {
      kTableVersion,  &device_count, &device_info, &free_memory,     &describe,     &stream_device,
      &open_device,   &close_device, &synchronise, &await_everybody, &allocate,     &release,
      &upload,        &download,     &copy,        &allocate_host,   &release_host, &fetch,
      &await_fetched, &send,         &make_event,  &release_event,   &record_event, &wait_for_event,
      &await_event,   &elapsed,      &begin_graph, &end_graph,       &start_graph,  &release_graph,
#define PUNA_OPERATION(name, Call) &run<launch_##name, Call>,
#include "kernels/cuda/operations.inc"
#undef PUNA_OPERATION
  };
  return table;
}

}  // namespace emulator
