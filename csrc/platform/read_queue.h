// Reads in flight: handed in by one thread, finished on another, many at once so that a disk is
// kept busy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>

#include "platform/file_system.h"

namespace puna {

class ReadQueue {
 public:
  struct Request {
    std::shared_ptr<File> file;
    void* to = nullptr;
    size_t bytes = 0;  // all of them, or an error
    uint64_t offset = 0;
    // Called once, on a thread of the queue, with null if the bytes are there. Must not throw.
    std::function<void(std::exception_ptr)> done;
  };

  // Finishes what was submitted.
  virtual ~ReadQueue() = default;
  virtual void submit(Request request) = 0;
  virtual const char* name() const = 0;  // "io_uring", "threads"
};

// Reads in flight at most; the ring of the kernel has as many places. A virtual disk that gives 3.4
// GB/s with 8 reads of a MiB gives 3.1 with 32, and wants 16 of 64 KiB.
constexpr int kReadsInFlight = 16;
// Blocking reads at once, where there is no io_uring: a disk wants 16 or so of 64 KiB, or a few of
// a MiB.
constexpr int kReadThreads = 8;

// By io_uring where the kernel allows it, else by threads.
std::unique_ptr<ReadQueue> make_read_queue();
std::unique_ptr<ReadQueue> make_threaded_read_queue(int threads = kReadThreads);
// Null where the kernel has no io_uring or forbids it.
std::unique_ptr<ReadQueue> make_uring_read_queue();

}  // namespace puna
