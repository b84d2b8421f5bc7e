// A CUDA device behind its table of functions: errors become exceptions, memory has owners, and
// kernels are noted and started in batches, which repeat from pass to pass as graphs.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "backend/buffer.h"
#include "base/error.h"
#include "kernels/cuda/device_table.h"

namespace puna {

class CudaDevice : public std::enable_shared_from_this<CudaDevice> {
 public:
  // Starting a kernel takes the host longer than many a kernel takes; so many are started together,
  // while the host notes the next. A decoding pass of Scout has some hundreds.
  static constexpr size_t kBatchKernels = 128;

  // With the queue of all but sends on `stream`, if it is not null. Throws DeviceError, with the
  // driver's words, if it cannot be opened, and InvalidRequest if the stream is another device's.
  CudaDevice(const cuda::DeviceTable& table, int ordinal, size_t batch_kernels,
             std::shared_ptr<void> stream = {});
  ~CudaDevice();
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  const char* name() const { return info_.name; }
  int64_t free_memory() const;
  int32_t multiprocessors() const { return info_.multiprocessors; }

  // Zeroed; OutOfMemory with the numbers. Lives as long as what was handed out.
  std::shared_ptr<void> allocate(size_t bytes) { return allocate(bytes, Users::kWe); }
  // The same, for memory that others use in streams of their own: they may have asked for more
  // before they let go of it than the device has done.
  std::shared_ptr<void> allocate_shared(size_t bytes) { return allocate(bytes, Users::kOthers); }
  // Memory of the host that the device reads and writes by itself: uploads from it and fetches to
  // it go on while the host does something else. OutOfMemory.
  std::shared_ptr<void> allocate_pinned(size_t bytes);

  // --- in the order of the calls ---
  void upload(void* to, const void* from, size_t bytes) {
    start();
    check("upload", table_.upload(handle_, to, from, bytes));
  }
  void copy(void* to, const void* from, size_t bytes) {
    start();
    check("copy", table_.copy(handle_, to, from, bytes));
  }
  // Waits until all is done, what was sent, too.
  void finish() {
    start();
    check("finish", table_.synchronise(handle_));
  }
  // Waits until all is done, also for nothing.
  void download(void* to, const void* from, size_t bytes, size_t stride, int64_t rows) {
    if (rows == 0) return finish();
    start();
    check("download", table_.download(handle_, to, from, bytes, stride, rows));
  }
  // The same to memory of allocate_pinned(), where it is after await_fetched(), which waits for
  // nothing that was asked for later.
  void fetch(void* to, const void* from, size_t bytes, size_t stride, int64_t rows) {
    start();
    check("fetch", table_.fetch(handle_, to, from, bytes, stride, rows));
  }
  void await_fetched() { check("fetch", table_.await_fetched(handle_)); }

  // --- beside them ---
  // A copy from memory of allocate_pinned() (other memory is read before it returns), in the order
  // of such copies alone: whoever uses what is there, or was there before, waits for events.
  void send(void* to, const void* from, size_t bytes) {
    check("send", table_.send(handle_, to, from, bytes));
  }
  using Event = std::shared_ptr<void>;
  Event make_event();
  // The event will be when all that the queue has been asked for so far is done.
  void record(const Event& event, cuda::Queue queue) {
    if (queue == cuda::kMainQueue) start();
    check("event", table_.record_event(handle_, event.get(), queue));
  }
  // What the queue is asked for from here on waits for what was recorded last.
  void wait_for(const Event& event, cuda::Queue queue) {
    if (queue == cuda::kMainQueue) start();
    check("event", table_.wait_for_event(handle_, event.get(), queue));
  }
  // The host waits.
  void await(const Event& event) { check("event", table_.await_event(handle_, event.get())); }

  // --- kernels, in the order of the calls ---
  template <class Call>
  using Kernel = int (*cuda::DeviceTable::*)(void* device, const Call*);
  // run("product", &cuda::DeviceTable::product, call): notes a kernel.
  template <class Call>
  void run(const char* name, Kernel<Call> kernel, const Call& call) {
    static_assert(std::is_trivially_copyable_v<Call> && sizeof(KernelCall<Call>) % 8 == 0);
    KernelCall<Call> noted{kernel, call};
    clear_padding(noted);  // batches are compared by their bytes
    note({name, &start_call<Call>, sizeof(noted)}, &noted);
  }
  // The kernel noted last, if it is this one and has not been started; null otherwise. What is done
  // with it is that it is changed, or dropped because another will do its work.
  template <class Call>
  Call* last(Kernel<Call> kernel) {
    if (kernels_ == 0) return nullptr;
    auto* const noted = reinterpret_cast<Noted*>(noted_.data() + last_);
    auto* const of = reinterpret_cast<KernelCall<Call>*>(noted + 1);
    return noted->start == &start_call<Call> && of->kernel == kernel ? &of->call : nullptr;
  }
  void drop_last() {
    noted_.resize(last_);
    --kernels_;
  }
  // Starts what is noted.
  void start();

  // A copy of a small array of the host on the device, for kernels that are noted before
  // next_pass().
  template <class T>
  const T* table(std::span<const T> values) {
    return static_cast<const T*>(table(values.data(), values.size_bytes()));
  }
  // Starts what is noted; tables take the places of earlier ones from here on.
  void next_pass();

  // Nobody will start anything any more: what is noted is forgotten, and memory, what others still
  // hold included, goes back at once when it is let go of.
  void retire();

 private:
  // A kernel as noted, followed by the bytes that start() takes.
  struct Noted {
    const char* name;
    int (*start)(const cuda::DeviceTable&, void* handle, const char* bytes);
    size_t bytes;  // a multiple of 8
  };
  template <class Call>
  struct KernelCall {
    Kernel<Call> kernel;
    Call call;
  };
  template <class Call>
  static int start_call(const cuda::DeviceTable& table, void* handle, const char* bytes) {
    KernelCall<Call> noted;
    std::memcpy(&noted, bytes, sizeof(noted));
    return (table.*noted.kernel)(handle, &noted.call);
  }
  struct Graph {
    void* handle = nullptr;  // made when a batch comes a second time
  };
  // Memory for tables, as long as the device; `used` bytes are taken, `sent` of them are there.
  struct TableChunk {
    std::vector<char> host;
    void* memory;
    size_t used = 0, sent = 0;
  };

  template <class T>
  static void clear_padding(T& value) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_clear_padding)
    __builtin_clear_padding(&value);
#endif
#endif
    static_cast<void>(value);
  }
  void note(const Noted& kernel, const void* bytes);
  const void* table(const void* data, size_t bytes);
  void send_tables();
  void start_kernels() const;
  enum class Users { kWe, kOthers };
  std::shared_ptr<void> allocate(size_t bytes, Users users);
  void give_back(void* memory, Users users);
  void release_memory();
  void check(const char* what, int code) const {
    if (code != 0) fail(ErrorCode::kDevice, "[cuda] ", what, ": ", table_.describe(code));
  }

  const cuda::DeviceTable& table_;
  const size_t batch_kernels_;
  int ordinal_;
  std::shared_ptr<void> stream_;  // kept until the device is closed
  void* handle_ = nullptr;
  cuda::DeviceInfo info_ = {};

  std::string noted_;                              // each a Noted and its bytes
  size_t kernels_ = 0, last_ = 0;                  // how many, and where the last one begins
  std::unordered_map<std::string, Graph> graphs_;  // by what was noted
  std::vector<TableChunk> tables_;
  size_t chunk_ = 0;  // of tables, in use

  std::mutex mutex_;  // memory may be given back by any thread
  // Until what is noted has been started; and what others used, until they have come to an end.
  std::vector<void*> given_back_, given_back_by_others_;
  bool retired_ = false;
};

// Memory that grows as it is needed and whose contents last for one operation.
template <std::shared_ptr<void> (CudaDevice::*kAllocate)(size_t bytes)>
class CudaGrowingMemory {
 public:
  template <class T>
  T* reserve(CudaDevice& device, int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    if (bytes > bytes_) {
      memory_.reset();  // first, so that old and new do not add up
      memory_ = (device.*kAllocate)(bytes);
      bytes_ = bytes;
    }
    return static_cast<T*>(memory_.get());
  }

 private:
  std::shared_ptr<void> memory_;
  size_t bytes_ = 0;
};
using CudaScratch = CudaGrowingMemory<&CudaDevice::allocate>;
using CudaPinnedScratch = CudaGrowingMemory<&CudaDevice::allocate_pinned>;

// Arrays of device addresses that are the same from call to call, as those of a layer's experts:
// sent when they are first asked for, and kept.
class CudaConstants {
 public:
  const void* const* of(CudaDevice& device, const std::vector<const void*>& addresses) {
    std::shared_ptr<void>& memory = sent_[addresses];
    if (memory == nullptr) {
      memory = device.allocate(addresses.size() * sizeof(void*));
      device.upload(memory.get(), addresses.data(), addresses.size() * sizeof(void*));
    }
    return static_cast<const void* const*>(memory.get());
  }

 private:
  std::map<std::vector<const void*>, std::shared_ptr<void>> sent_;
};

}  // namespace puna
