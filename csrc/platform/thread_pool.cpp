#include "platform/thread_pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <climits>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/env.h"
#include "base/error.h"
#include "platform/system.h"

namespace puna {

namespace {

constexpr int kSpinsPerYield = 64;
using Word = std::atomic<uint32_t>;
static_assert(sizeof(Word) == sizeof(uint32_t));

// The pool whose lane this thread is computing.
thread_local const ThreadPool* current_pool = nullptr;

// Every living pool: a forked child has none of their workers.
struct Registry {
  std::mutex mutex;
  std::vector<ThreadPool*> pools;
};

Registry& registry() {
  static Registry& all = *new Registry;  // never destroyed: a static pool may outlive it otherwise
  return all;
}

}  // namespace

// A word that threads wait on.
struct ThreadPool::Signal {
  Word word{0};
  Word sleepers{0};

  // Returns once word != seen.
  void await(uint32_t seen, bool spin) {
    if (word.load(std::memory_order_acquire) != seen) return;
    if (spin && spin_until_changed(seen)) return;
    sleepers.fetch_add(1);
    while (word.load() == seen) {
      syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr,
              nullptr, 0);
    }
    sleepers.fetch_sub(1);
  }

  // To be called after a change of the word. Sequential consistency makes it safe to skip the
  // system call: either the waiter sees the new word, or we see that it sleeps.
  void wake_all() {
    if (sleepers.load() == 0) return;
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr,
            nullptr, 0);
  }

  void advance() {
    word.fetch_add(1);
    wake_all();
  }

 private:
  // Yields between rounds: where the thread waited for shares our core, it must get to run.
  bool spin_until_changed(uint32_t seen) const {
    using Clock = std::chrono::steady_clock;
    Clock::time_point end;  // of waiting, known after the first round: most waits are over by then
    for (bool first = true;; first = false) {
      for (int i = 0; i < kSpinsPerYield; ++i) {
        if (word.load(std::memory_order_acquire) != seen) return true;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
      }
      const Clock::time_point now = Clock::now();
      if (first) end = now + std::chrono::microseconds(ThreadPool::kSpinMicroseconds);
      if (now >= end) return false;
      sched_yield();
    }
  }
};

struct ThreadPool::Team {
  explicit Team(ThreadPool& owner) : pool(owner), claims(static_cast<size_t>(owner.lanes_)) {}
  ~Team() { stop(); }

  // The run in which a lane was begun last. Before a run it is the one before, of every lane: who
  // puts the run in its place has the lane, and may look at the run, which cannot end without it.
  struct alignas(64) Claim {
    Word run{0};
  };

  ThreadPool& pool;
  std::mutex turn;  // one run() at a time
  std::vector<std::thread> workers;
  std::atomic<bool> stopping{false};

  // Lines of cache by who writes them: what begins a run; what ends it; who has which lane.
  alignas(64) Signal epoch;  // the run; moves on when one begins
  Erased function = nullptr;
  void* context = nullptr;

  alignas(64) Signal pending;  // lanes that are not finished

  std::vector<Claim> claims;

  alignas(64) std::atomic<bool> failed{false};
  std::exception_ptr failure;  // the first; written by the lane that set `failed`

  bool spin() const {
    return pool.may_spin_ && pool.spin_scopes_.load(std::memory_order_relaxed) > 0;
  }

  void start() {
    workers.reserve(static_cast<size_t>(pool.lanes_ - 1));
    // A handler of the application's signals must not run on a worker.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    std::string refusal;
    try {
      const uint32_t seen = epoch.word.load();
      for (Claim& claim : claims) claim.run = seen;
      for (int id = 1; id < pool.lanes_; ++id) {
        workers.emplace_back([this, id, seen] { work(id, seen); });
      }
    } catch (const std::exception& error) {
      refusal = error.what();
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (refusal.empty()) return;
    const size_t started = workers.size();
    stop();
    fail(ErrorCode::kDevice, "[threads] the system refused thread ", started + 2, " of ",
         pool.lanes_, " (", refusal, "); ask for fewer threads");
  }

  void stop() {
    stopping = true;
    epoch.advance();
    for (std::thread& worker : workers) worker.join();
    workers.clear();
    stopping = false;
  }

  void work(int id, uint32_t seen) {
    pthread_setname_np(pthread_self(), ("puna-" + std::to_string(id)).c_str());
    current_pool = &pool;
    for (;;) {
      epoch.await(seen, spin());
      seen = epoch.word.load();  // a worker that was late may have missed some
      // Looked at after the epoch: stop() moves that on after it has set this.
      if (stopping) return;
      compute(id, seen);
    }
  }

  // The lanes that nobody has begun, from `first` on.
  void compute(int first, uint32_t run) {
    for (int i = 0; i < pool.lanes_; ++i) {
      const int id = (first + i) % pool.lanes_;
      uint32_t before = run - 1;
      if (!claims[id].run.compare_exchange_strong(before, run)) continue;
      Lane lane(id, pool.lanes_);
      try {
        function(context, lane);
      } catch (...) {
        if (!failed.exchange(true)) failure = std::current_exception();
      }
      if (pending.word.fetch_sub(1) == 1) pending.wake_all();
    }
  }

  void run() {
    pending.word.store(static_cast<uint32_t>(pool.lanes_));
    epoch.advance();
    compute(0, epoch.word.load());
    for (uint32_t left; (left = pending.word.load()) != 0;) pending.await(left, spin());
    if (!failed) return;
    failed = false;
    std::rethrow_exception(std::exchange(failure, nullptr));
  }
};

// Around fork(): the registry is consistent in the child, where every team is replaced by one
// without workers. The old one is left alone for good: its threads do not exist, its locks may be
// held.
struct ForkHandlers {
  static void before() { registry().mutex.lock(); }
  static void in_parent() { registry().mutex.unlock(); }
  static void in_child() {
    for (ThreadPool* pool : registry().pools) {
      (void)pool->team_.release();
      pool->team_ = std::make_unique<ThreadPool::Team>(*pool);
    }
    registry().mutex.unlock();
  }
};

namespace {

int lanes_or_default(int lanes) {
  if (lanes <= 0) lanes = environment_threads();
  if (lanes <= 0) lanes = usable_cores();
  if (lanes > ThreadPool::kMaxLanes) {
    fail(ErrorCode::kInvalidRequest, "[threads] ", lanes, " threads were asked for; the most is ",
         ThreadPool::kMaxLanes);
  }
  return lanes;
}

}  // namespace

ThreadPool::ThreadPool(int lanes)
    : lanes_(lanes_or_default(lanes)),
      may_spin_(lanes_ <= usable_cores()),
      team_(std::make_unique<Team>(*this)) {
  static const int handlers =
      pthread_atfork(&ForkHandlers::before, &ForkHandlers::in_parent, &ForkHandlers::in_child);
  if (handlers != 0) fail(ErrorCode::kDevice, "[threads] no memory to prepare for fork()");
  const std::lock_guard lock(registry().mutex);
  registry().pools.push_back(this);
}

ThreadPool::~ThreadPool() {
  const std::lock_guard lock(registry().mutex);
  std::erase(registry().pools, this);
}

void ThreadPool::run_erased(Erased function, void* context, bool alone) {
  if (current_pool == this) {
    Lane only(0, 1);
    return function(context, only);
  }
  Team& team = *team_;
  const std::lock_guard turn(team.turn);
  const struct Enter {
    const ThreadPool* outer = current_pool;
    explicit Enter(const ThreadPool* pool) { current_pool = pool; }
    ~Enter() { current_pool = outer; }
  } enter(this);
  if (lanes_ == 1 || alone) {
    Lane only(0, 1);
    return function(context, only);
  }
  if (team.workers.empty()) team.start();
  team.function = function;
  team.context = context;
  team.run();
}

}  // namespace puna
