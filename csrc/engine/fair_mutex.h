// A lock that is handed over in the order of asking, so that two threads that generate at once take
// turns token by token instead of one starving the other.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace puna {

class FairMutex {
 public:
  void lock() {
    std::unique_lock guard(mutex_);
    const uint64_t ticket = next_++;
    turn_.wait(guard, [&] { return serving_ == ticket; });
  }
  void unlock() {
    {
      const std::lock_guard guard(mutex_);
      ++serving_;
    }
    turn_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable turn_;
  uint64_t next_ = 0, serving_ = 0;
};

}  // namespace puna
