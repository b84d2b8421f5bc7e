#include "platform/read_queue.h"

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "platform/io_thread.h"

namespace puna {
namespace {

class ThreadedReadQueue final : public ReadQueue {
 public:
  explicit ThreadedReadQueue(int threads) {
    try {
      for (int i = 0; i < threads; ++i) threads_.push_back(start_io_thread([this] { work(); }));
    } catch (...) {
      stop();
      throw;
    }
  }
  ~ThreadedReadQueue() override { stop(); }

  const char* name() const override { return "threads"; }

  void submit(Request request) override {
    {
      const std::lock_guard guard(mutex_);
      waiting_.push_back(std::move(request));
    }
    changed_.notify_one();
  }

 private:
  void stop() {
    {
      const std::lock_guard guard(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void work() {
    for (;;) {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return stopping_ || !waiting_.empty(); });
      if (waiting_.empty()) return;
      Request request = std::move(waiting_.front());
      waiting_.pop_front();
      lock.unlock();
      std::exception_ptr failure;
      try {
        read_exactly(*request.file, request.to, request.bytes, request.offset);
      } catch (...) {
        failure = std::current_exception();
      }
      request.done(failure);
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Request> waiting_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<ReadQueue> make_threaded_read_queue(int threads) {
  return std::make_unique<ThreadedReadQueue>(threads);
}

std::unique_ptr<ReadQueue> make_read_queue() {
  if (auto queue = make_uring_read_queue()) return queue;
  return make_threaded_read_queue();
}

}  // namespace puna
