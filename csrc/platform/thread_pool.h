// Compute threads: fork, share by lanes, join.
//
// pool.run(fn) calls fn(lane) once for every lane and returns when all are done. The calling thread
// and each worker begin with a lane of their own, the same in every run, and whoever has finished
// it takes one that nobody has begun: on a busy machine, nothing waits for a worker that the system
// does not run. So lanes must not wait for one another; what must come after all of something is
// another run(). Several threads may call run(); they take turns. A run() inside a lane of the same
// pool computes on that lane alone. run() rethrows the first exception of a lane, after all are
// done. Workers sleep on a futex between runs; inside a SpinScope they spin for up to
// kSpinMicroseconds first, which makes a fork and join cost well under a microsecond. Workers start
// at the first run(), and anew at the first run() of a forked child (fork() inside a lane is not
// supported). Signals are left to the threads of the application.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

namespace puna {

class ThreadPool;

// A contiguous share of some rows.
struct Part {
  int64_t begin, end;
};

// A share of the work inside ThreadPool::run, with memory of its own by its id.
class Lane {
 public:
  int id() const { return id_; }
  int count() const { return count_; }

  // This lane's share of n rows, in whole multiples of `grain` except at the end.
  Part part(int64_t n, int64_t grain = 1) const {
    const int64_t grains = (n + grain - 1) / grain;
    const int64_t begin = grains * id_ / count_ * grain, end = grains * (id_ + 1) / count_ * grain;
    return {std::min(begin, n), std::min(end, n)};
  }

 private:
  friend class ThreadPool;
  Lane(int id, int count) : id_(id), count_(count) {}
  int id_, count_;
};

// Hands out tiles 0, 1, 2, ... to whoever asks first.
class TileCounter {
 public:
  int64_t next() { return next_.fetch_add(1, std::memory_order_relaxed); }
  void reset() { next_.store(0, std::memory_order_relaxed); }

 private:
  std::atomic<int64_t> next_{0};
};

// Hands out tiles so that each lane goes through a contiguous share of its own, from its first tile
// on, and whoever is done with that takes the last tiles that others have left.
class TileShares {
 public:
  explicit TileShares(int lanes) : shares_(static_cast<size_t>(lanes)) {}

  // Before a run, for at most 2^32 - 1 tiles.
  void reset(int64_t tiles) {
    const auto lanes = static_cast<int64_t>(shares_.size());
    for (int64_t lane = 0; lane < lanes; ++lane)
      shares_[lane].range = range(tiles * lane / lanes, tiles * (lane + 1) / lanes);
  }
  // -1: there are no more.
  int64_t next(const Lane& lane) {
    const int lanes = static_cast<int>(shares_.size());
    for (int i = 0; i < lanes; ++i) {
      std::atomic<uint64_t>& share = shares_[(lane.id() + i) % lanes].range;
      for (uint64_t left = share.load(std::memory_order_relaxed);;) {
        const auto begin = static_cast<int64_t>(left >> 32),
                   end = static_cast<int64_t>(left & kLow);
        if (begin == end) break;
        const bool own = i == 0;
        const uint64_t rest = own ? range(begin + 1, end) : range(begin, end - 1);
        if (share.compare_exchange_weak(left, rest, std::memory_order_relaxed))
          return own ? begin : end - 1;
      }
    }
    return -1;
  }

 private:
  static constexpr uint64_t kLow = 0xffffffff;
  static uint64_t range(int64_t begin, int64_t end) {
    return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end);
  }
  struct alignas(64) Share {
    std::atomic<uint64_t> range{0};
  };
  std::vector<Share> shares_;
};

class ThreadPool {
 public:
  static constexpr int kSpinMicroseconds = 50;
  static constexpr int kMaxLanes = 1024;

  // `lanes` 0: the environment's PUNA_THREADS, else usable_cores(). Throws InvalidRequest above
  // kMaxLanes.
  explicit ThreadPool(int lanes = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int lanes() const { return lanes_; }

  // Throws DeviceError if the system refuses the threads. `alone`: on the calling thread only, as
  // the one lane there is, for what is not worth waking others.
  template <class Function>
  void run(Function&& function, bool alone = false) {
    run_erased(
        [](void* context, Lane& lane) {
          (*static_cast<std::remove_reference_t<Function>*>(context))(lane);
        },
        const_cast<void*>(static_cast<const void*>(&function)), alone);
  }

  // While one lives, lanes that wait spin for a while before they sleep; unless there are more
  // lanes than cores, when spinning would only keep others from working.
  class SpinScope {
   public:
    explicit SpinScope(ThreadPool& pool) : pool_(pool) { ++pool_.spin_scopes_; }
    ~SpinScope() { --pool_.spin_scopes_; }
    SpinScope(const SpinScope&) = delete;
    SpinScope& operator=(const SpinScope&) = delete;

   private:
    ThreadPool& pool_;
  };

 private:
  friend struct ForkHandlers;
  using Erased = void (*)(void*, Lane&);
  struct Signal;  // a word that threads wait on
  struct Team;    // the workers and what they look at; replaced in a forked child

  void run_erased(Erased function, void* context, bool alone);

  const int lanes_;
  const bool may_spin_;
  std::atomic<int> spin_scopes_{0};
  std::unique_ptr<Team> team_;
};

}  // namespace puna
