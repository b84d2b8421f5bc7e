#include "platform/thread_pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <climits>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "base/error.h"
#include "platform/system.h"

namespace puna {

namespace {

using Word = std::atomic<uint32_t>;
static_assert(sizeof(Word) == sizeof(uint32_t));

void futex_wait(Word& word, uint32_t seen) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr,
          0);
}

void futex_wake_all(Word& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr,
          nullptr, 0);
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Thrown through lanes that wait at a barrier which a failed lane will never reach.
struct Released {};

// Counts forks of the process: a pool started in another generation has no workers here.
std::atomic<uint64_t> fork_generation{0};

void watch_forks() {
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { ++fork_generation; }); });
}

}  // namespace

struct ThreadPool::Shared {
  std::mutex turn;  // one run() at a time
  std::vector<std::thread> workers;
  uint64_t generation = 0;
  std::atomic<int> spin_scopes{0};

  // A run begins when `epoch` moves on and ends when `pending` is 0.
  alignas(64) Word epoch{0};
  std::atomic<uint32_t> sleepers{0};
  Erased function = nullptr;
  void* context = nullptr;
  bool stopping = false;

  alignas(64) Word pending{0};
  std::atomic<bool> joiner_sleeps{false};

  alignas(64) std::atomic<uint32_t> arrived{0};
  Word phase{0};
  std::atomic<uint32_t> phase_sleepers{0};

  std::atomic<bool> failed{false};
  std::exception_ptr failure;

  // Returns once word != seen.
  void await(Word& word, uint32_t seen, std::atomic<uint32_t>& sleeping) {
    if (spin_scopes.load(std::memory_order_relaxed) > 0) {
      const auto end =
          std::chrono::steady_clock::now() + std::chrono::microseconds(kSpinMicroseconds);
      do {
        for (int i = 0; i < 64; ++i) {
          if (word.load(std::memory_order_acquire) != seen) return;
          relax();
        }
      } while (std::chrono::steady_clock::now() < end);
    }
    sleeping.fetch_add(1);
    while (word.load() == seen) futex_wait(word, seen);
    sleeping.fetch_sub(1);
  }

  void advance(Word& word, std::atomic<uint32_t>& sleeping) {
    word.fetch_add(1);
    if (sleeping.load() > 0) futex_wake_all(word);
  }

  void fail_with(std::exception_ptr error) {
    if (!failed.exchange(true)) failure = std::move(error);
    advance(phase, phase_sleepers);  // lanes at a barrier wake and see `failed`
  }

  void call(ThreadPool& pool, int id) {
    Lane lane(pool, id, pool.lanes_);
    try {
      function(context, lane);
    } catch (const Released&) {
    } catch (...) {
      fail_with(std::current_exception());
    }
  }

  void work(ThreadPool& pool, int id, uint32_t seen) {
    for (;;) {
      await(epoch, seen, sleepers);
      ++seen;
      if (stopping) return;
      call(pool, id);
      if (pending.fetch_sub(1) == 1 && joiner_sleeps.load()) futex_wake_all(pending);
    }
  }
};

ThreadPool::ThreadPool(int lanes) : lanes_(lanes > 0 ? lanes : usable_cores()) {
  if (lanes_ > kMaxLanes) {
    fail(ErrorCode::kInvalidRequest, "[threads] ", lanes_, " threads were asked for; the most is ",
         kMaxLanes);
  }
  watch_forks();
  start();
}

void ThreadPool::start() {
  // In a forked child the old workers do not exist and their locks may be held: leave them be.
  (void)shared_.release();
  shared_ = std::make_unique<Shared>();
  shared_->generation = fork_generation.load();
  for (int id = 1; id < lanes_; ++id) {
    shared_->workers.emplace_back(
        [this, id, shared = shared_.get()] { shared->work(*this, id, 0); });
  }
}

ThreadPool::~ThreadPool() {
  if (shared_->generation != fork_generation.load()) {
    (void)shared_.release();
    return;
  }
  shared_->stopping = true;
  shared_->advance(shared_->epoch, shared_->sleepers);
  for (std::thread& worker : shared_->workers) worker.join();
}

void ThreadPool::run_erased(Erased function, void* context) {
  if (shared_->generation != fork_generation.load()) start();
  Shared& shared = *shared_;
  const std::lock_guard turn(shared.turn);
  shared.function = function;
  shared.context = context;
  shared.failed = false;
  shared.failure = nullptr;
  shared.arrived = 0;
  if (lanes_ > 1) {
    shared.pending.store(static_cast<uint32_t>(lanes_ - 1));
    shared.advance(shared.epoch, shared.sleepers);
  }
  shared.call(*this, 0);
  if (lanes_ > 1) {
    const auto end =
        std::chrono::steady_clock::now() + std::chrono::microseconds(kSpinMicroseconds);
    while (shared.pending.load(std::memory_order_acquire) != 0) {
      relax();
      if (std::chrono::steady_clock::now() < end) continue;
      shared.joiner_sleeps = true;
      for (uint32_t left; (left = shared.pending.load()) != 0;) futex_wait(shared.pending, left);
      shared.joiner_sleeps = false;
    }
  }
  if (shared.failure) std::rethrow_exception(shared.failure);
}

void Lane::barrier() {
  if (count_ == 1) return;
  ThreadPool::Shared& shared = *pool_.shared_;
  const uint32_t phase = shared.phase.load();
  if (shared.failed) throw Released{};
  if (shared.arrived.fetch_add(1) + 1 == static_cast<uint32_t>(count_)) {
    shared.arrived.store(0);
    shared.advance(shared.phase, shared.phase_sleepers);
    return;
  }
  // A failing lane moves the phase on, too; `failed` tells the two apart.
  shared.await(shared.phase, phase, shared.phase_sleepers);
  if (shared.failed) throw Released{};
}

ThreadPool::SpinScope::SpinScope(ThreadPool& pool) : pool_(pool) { ++pool_.shared_->spin_scopes; }
ThreadPool::SpinScope::~SpinScope() { --pool_.shared_->spin_scopes; }

}  // namespace puna
