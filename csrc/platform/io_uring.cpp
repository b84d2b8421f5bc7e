// Reads by io_uring, through the system calls themselves: two rings shared with the kernel, one of
// entries to do and one of results. Entries are written under a mutex by whoever submits; one
// thread waits for results.
#include <sys/syscall.h>

#include <memory>

#include "platform/read_queue.h"

#if __has_include(<linux/io_uring.h>) && defined(__NR_io_uring_setup)

#include <linux/io_uring.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "base/error.h"
#include "platform/descriptor.h"
#include "platform/io_thread.h"

namespace puna {
namespace {

// A mapping of the ring's descriptor.
struct Mapping {
  Mapping() = default;
  Mapping(int descriptor, size_t bytes, off_t offset)
      : data(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, descriptor,
                  offset)),
        bytes(bytes) {}
  ~Mapping() {
    if (valid()) munmap(data, bytes);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  bool valid() const { return data != MAP_FAILED; }
  template <class T>
  T* at(uint32_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(data) + offset);
  }

  void* data = MAP_FAILED;
  size_t bytes = 0;
};

class UringReadQueue final : public ReadQueue {
 public:
  static std::unique_ptr<ReadQueue> make() {
    io_uring_params params{};
    Descriptor ring(static_cast<int>(syscall(__NR_io_uring_setup, kReadsInFlight, &params)));
    if (!ring.is_open()) return nullptr;
    // One mapping for both rings, reads at an offset without a vector, results that are never
    // dropped: Linux 5.6.
    constexpr uint32_t kNeeded =
        IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_RW_CUR_POS;
    if ((params.features & kNeeded) != kNeeded) return nullptr;
    std::unique_ptr<UringReadQueue> queue(new UringReadQueue(std::move(ring), params));
    if (!queue->rings_.valid() || !queue->entries_.valid()) return nullptr;
    queue->reaper_ = start_io_thread([reader = queue.get()] { reader->reap(); });
    return queue;
  }

  ~UringReadQueue() override {
    if (!reaper_.joinable()) return;
    {
      const std::lock_guard guard(mutex_);
      stopping_ = true;
      if (in_flight_ == 0) push_wake_up();
    }
    reaper_.join();
  }

  const char* name() const override { return "io_uring"; }

  void submit(Request request) override {
    if (request.file->descriptor() < 0)
      fail(ErrorCode::kInternal, "[file] ", request.file->path(), " has no descriptor");
    const std::lock_guard guard(mutex_);
    waiting_.push_back(new Running{std::move(request), 0});
    push_waiting();
  }

 private:
  struct Running {
    Request request;
    size_t read;
  };

  UringReadQueue(Descriptor ring, const io_uring_params& params)
      : ring_(std::move(ring)),
        rings_(ring_.get(),
               std::max<size_t>(params.sq_off.array + params.sq_entries * sizeof(uint32_t),
                                params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe)),
               IORING_OFF_SQ_RING),
        entries_(ring_.get(), params.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES),
        params_(params) {}

  // --- under the mutex ---

  io_uring_sqe& next_entry() {
    const uint32_t tail = *rings_.at<uint32_t>(params_.sq_off.tail);
    const uint32_t slot = tail & *rings_.at<uint32_t>(params_.sq_off.ring_mask);
    rings_.at<uint32_t>(params_.sq_off.array)[slot] = slot;
    io_uring_sqe& entry = static_cast<io_uring_sqe*>(entries_.data)[slot];
    entry = {};
    return entry;
  }

  // Gives the entry to the kernel. Returns 0 or the error.
  int hand_over() {
    auto& tail = *rings_.at<uint32_t>(params_.sq_off.tail);
    std::atomic_ref(tail).store(tail + 1, std::memory_order_release);
    for (;;) {
      if (syscall(__NR_io_uring_enter, ring_.get(), 1, 0, 0, nullptr, 0) >= 0) return 0;
      if (errno == EINTR || errno == EAGAIN || errno == EBUSY) continue;
      const int error = errno;
      std::atomic_ref(tail).store(tail - 1, std::memory_order_release);
      return error;
    }
  }

  void push_waiting() {
    while (in_flight_ < kReadsInFlight && !waiting_.empty()) {
      Running* const running = waiting_.front();
      waiting_.pop_front();
      io_uring_sqe& entry = next_entry();
      entry.opcode = IORING_OP_READ;
      entry.fd = running->request.file->descriptor();
      entry.addr = reinterpret_cast<uint64_t>(running->request.to) + running->read;
      entry.len = static_cast<uint32_t>(running->request.bytes - running->read);
      entry.off = running->request.offset + running->read;
      entry.user_data = reinterpret_cast<uint64_t>(running);
      ++in_flight_;
      if (const int error = hand_over(); error != 0) {
        --in_flight_;
        failed_.push_back({running, -error});
        push_wake_up();
      }
    }
  }

  // A result without a read, so that the reaper looks around.
  void push_wake_up() {
    io_uring_sqe& entry = next_entry();
    entry.opcode = IORING_OP_NOP;
    entry.user_data = 0;
    (void)hand_over();
  }

  // --- on the reaper's thread ---

  void reap() {
    for (;;) {
      std::vector<std::pair<Running*, int>> results;
      (void)syscall(__NR_io_uring_enter, ring_.get(), 0, 1, IORING_ENTER_GETEVENTS, nullptr, 0);
      auto& head = *rings_.at<uint32_t>(params_.cq_off.head);
      const uint32_t mask = *rings_.at<uint32_t>(params_.cq_off.ring_mask);
      const uint32_t tail = std::atomic_ref(*rings_.at<uint32_t>(params_.cq_off.tail))
                                .load(std::memory_order_acquire);
      uint32_t at = head;
      for (; at != tail; ++at) {
        const io_uring_cqe& result = rings_.at<io_uring_cqe>(params_.cq_off.cqes)[at & mask];
        if (result.user_data != 0)
          results.push_back({reinterpret_cast<Running*>(result.user_data), result.res});
      }
      std::atomic_ref(head).store(at, std::memory_order_release);
      {
        const std::lock_guard guard(mutex_);
        in_flight_ -= static_cast<int>(results.size());
        results.insert(results.end(), failed_.begin(), failed_.end());
        failed_.clear();
        // What a read left over is read next.
        std::erase_if(results, [&](const std::pair<Running*, int>& result) {
          auto [running, got] = result;
          if (got <= 0 && got != -EINTR && got != -EAGAIN) return false;
          running->read += static_cast<size_t>(std::max(got, 0));
          if (running->read == running->request.bytes) return false;
          waiting_.push_front(running);
          return true;
        });
        push_waiting();
      }
      for (const auto& [running, got] : results) finish(running, got);
      const std::lock_guard guard(mutex_);
      if (stopping_ && in_flight_ == 0 && waiting_.empty() && failed_.empty()) return;
    }
  }

  static void finish(Running* finished, int got) {
    const std::unique_ptr<Running> running(finished);
    const ReadQueue::Request& request = running->request;
    std::exception_ptr failure;
    if (got <= 0) {
      const uint64_t at = request.offset + running->read;
      const Error error(
          ErrorCode::kStorage,
          "[file] " + request.file->path() +
              (got == 0 ? " ends at byte " + std::to_string(at) + ", more was expected"
                        : " cannot be read: " + std::string(std::strerror(-got))));
      failure = std::make_exception_ptr(error);
    }
    request.done(failure);
  }

  Descriptor ring_;
  Mapping rings_, entries_;
  io_uring_params params_;
  std::mutex mutex_;
  std::deque<Running*> waiting_;
  std::vector<std::pair<Running*, int>> failed_;
  int in_flight_ = 0;
  bool stopping_ = false;
  std::thread reaper_;
};

}  // namespace

std::unique_ptr<ReadQueue> make_uring_read_queue() { return UringReadQueue::make(); }

}  // namespace puna

#else

namespace puna {

std::unique_ptr<ReadQueue> make_uring_read_queue() { return nullptr; }

}  // namespace puna

#endif
