// The thread pool: every lane once, runs in order, exceptions, two callers, forks.
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "check.h"
#include "platform/thread_pool.h"

using puna::Lane;
using puna::Part;
using puna::ThreadPool;
using puna::TileCounter;
using puna::TileShares;

TEST(parts_cover_rows_once) {
  for (const int lanes : {1, 2, 3, 5}) {
    ThreadPool pool(lanes);
    for (const int64_t rows : {0, 1, 2, 7, 64, 65, 1000}) {
      for (const int64_t grain : {1, 4, 64}) {
        std::vector<int> seen(static_cast<size_t>(rows), 0);
        pool.run([&](Lane& lane) {
          const Part part = lane.part(rows, grain);
          for (int64_t r = part.begin; r < part.end; ++r) ++seen[r];
        });
        for (const int count : seen) CHECK_EQ(count, 1);
      }
    }
  }
}

TEST(a_run_sees_what_the_one_before_wrote) {
  for (const int lanes : {2, 3, 4}) {
    ThreadPool pool(lanes);
    std::vector<int64_t> values(static_cast<size_t>(lanes), 0);
    std::atomic<int> wrong{0};
    for (int64_t phase = 1; phase <= 200; ++phase) {
      pool.run([&](Lane& lane) { values[lane.id()] = phase; });
      pool.run([&](Lane&) {
        for (const int64_t value : values) wrong += value != phase;
      });
    }
    CHECK_EQ(wrong.load(), 0);
  }
}

// Lets both lanes of a pool run at once, so that one of them is its worker's.
void on_both_threads(ThreadPool& pool, const std::function<void()>& on_worker) {
  const std::thread::id here = std::this_thread::get_id();
  std::atomic<int> begun{0};
  pool.run([&](Lane&) {
    ++begun;
    while (begun < 2) std::this_thread::yield();
    if (std::this_thread::get_id() != here) on_worker();
  });
}

TEST(lanes_that_no_worker_begins_are_computed_all_the_same) {
  cpu_set_t usable;
  CHECK_EQ(sched_getaffinity(0, sizeof(usable), &usable), 0);
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(sched_getcpu(), &one);
  ThreadPool pool(2);
  on_both_threads(pool, [&] {
    // Beside the caller on its core, and only when that has nothing to do.
    const sched_param none{};
    CHECK_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
    CHECK_EQ(sched_setscheduler(0, SCHED_IDLE, &none), 0);
  });
  CHECK_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
  const std::thread::id here = std::this_thread::get_id();
  int taken = 0;
  for (int i = 0; i < 100; ++i) {
    std::array<bool, 2> on_caller{};
    pool.run([&](Lane& lane) { on_caller[lane.id()] = std::this_thread::get_id() == here; });
    taken += on_caller[0] && on_caller[1];
  }
  CHECK(taken > 0);
  CHECK_EQ(sched_setaffinity(0, sizeof(usable), &usable), 0);
}

TEST(many_small_runs) {
  ThreadPool pool(2);
  const ThreadPool::SpinScope spin(pool);
  std::array<int64_t, 2> counts{};
  for (int i = 0; i < 10000; ++i) pool.run([&](Lane& lane) { ++counts[lane.id()]; });
  CHECK_EQ(counts[0], 10000);
  CHECK_EQ(counts[1], 10000);
}

TEST(first_exception_reaches_the_caller) {
  ThreadPool pool(3);
  for (int thrower = 0; thrower < 3; ++thrower) {
    CHECK_THROWS(puna::ErrorCode::kImage, pool.run([&](Lane& lane) {
      if (lane.id() == thrower) puna::fail(puna::ErrorCode::kImage, "lane ", lane.id());
    }));
  }
}

TEST(an_exception_ends_no_other_lane) {
  ThreadPool pool(4);
  for (int round = 0; round < 200; ++round) {
    std::atomic<int> others{0};
    CHECK_THROWS(puna::ErrorCode::kDevice, pool.run([&](Lane& lane) {
      if (lane.id() == round % 4) puna::fail(puna::ErrorCode::kDevice, "stop");
      ++others;
    }));
    CHECK_EQ(others.load(), 3);
  }
}

TEST(two_callers_take_turns) {
  ThreadPool pool(2);
  std::atomic<int> inside{0}, overlaps{0}, runs{0};
  const auto caller = [&] {
    for (int i = 0; i < 500; ++i) {
      pool.run([&](Lane& lane) {
        if (lane.id() != 0) return;
        overlaps += inside.fetch_add(1) != 0;
        ++runs;
        --inside;
      });
    }
  };
  std::thread other(caller);
  caller();
  other.join();
  CHECK_EQ(overlaps.load(), 0);
  CHECK_EQ(runs.load(), 1000);
}

TEST(tiles_are_drawn_once) {
  ThreadPool pool(3);
  TileCounter counter;
  std::vector<std::atomic<int>> drawn(1000);
  pool.run([&](Lane&) {
    for (int64_t tile; (tile = counter.next()) < 1000;) ++drawn[tile];
  });
  for (const auto& count : drawn) CHECK_EQ(count.load(), 1);
}

TEST(shares_are_gone_through_in_order_and_once) {
  for (const int lanes : {1, 2, 3, 5}) {
    ThreadPool pool(lanes);
    TileShares shares(lanes);
    for (const int64_t tiles : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> drawn(static_cast<size_t>(tiles));
      std::atomic<int> unordered{0};
      shares.reset(tiles);
      pool.run([&](const Lane& lane) {
        const Part own = lane.part(tiles);
        int64_t last = own.begin - 1;
        for (int64_t tile; (tile = shares.next(lane)) >= 0;) {
          ++drawn[tile];
          if (tile < own.begin || tile >= own.end) continue;
          unordered += tile != last + 1;
          last = tile;
        }
      });
      for (const auto& count : drawn) CHECK_EQ(count.load(), 1);
      CHECK_EQ(unordered.load(), 0);
    }
  }
}

TEST(a_lane_that_is_done_takes_the_last_of_anothers_share) {
  TileShares shares(2);
  ThreadPool pool(2);
  std::atomic<bool> done{false};
  std::vector<int64_t> taken;
  shares.reset(10);
  pool.run([&](const Lane& lane) {
    if (lane.id() == 0) {
      while (!done) std::this_thread::yield();
      CHECK_EQ(shares.next(lane), -1);
      return;
    }
    for (int64_t tile; (tile = shares.next(lane)) >= 0;) taken.push_back(tile);
    done = true;
  });
  CHECK(taken == std::vector<int64_t>({5, 6, 7, 8, 9, 4, 3, 2, 1, 0}));
}

TEST(too_many_lanes_are_refused) {
  CHECK_THROWS(puna::ErrorCode::kInvalidRequest, ThreadPool(ThreadPool::kMaxLanes + 1));
}

TEST(a_run_inside_a_lane_computes_alone) {
  ThreadPool pool(3);
  std::vector<int> rows(3 * 10, 0);
  std::atomic<int> alone{0};
  pool.run([&](Lane& outer) {
    pool.run([&](Lane& inner) {
      alone += inner.count() == 1 && inner.id() == 0;
      const Part part = inner.part(10);
      for (int64_t r = part.begin; r < part.end; ++r) ++rows[outer.id() * 10 + r];
    });
  });
  CHECK_EQ(alone.load(), 3);
  for (const int count : rows) CHECK_EQ(count, 1);
  CHECK_THROWS(puna::ErrorCode::kImage, pool.run([&](Lane&) {
    pool.run([](Lane&) { puna::fail(puna::ErrorCode::kImage, "inner"); });
  }));
}

TEST(one_lane_is_the_caller) {
  ThreadPool pool(1);
  const std::thread::id here = std::this_thread::get_id();
  int ran = 0;
  pool.run([&](Lane& lane) { ran += std::this_thread::get_id() == here && lane.count() == 1; });
  CHECK_EQ(ran, 1);
  CHECK_THROWS(puna::ErrorCode::kImage,
               pool.run([](Lane&) { puna::fail(puna::ErrorCode::kImage, "one"); }));
}

TEST(pools_are_independent) {
  ThreadPool outer(2), inner(2);
  std::atomic<int> ran{0};
  outer.run([&](Lane&) { inner.run([&](Lane&) { ++ran; }); });
  CHECK_EQ(ran.load(), 4);
}

TEST(pools_come_and_go) {
  for (int i = 0; i < 100; ++i) {
    ThreadPool idle(4), used(4);
    std::atomic<int> ran{0};
    used.run([&](Lane&) { ++ran; });
    CHECK_EQ(ran.load(), 4);
  }
}

TEST(workers_leave_signals_to_the_application) {
  ThreadPool pool(2);
  std::atomic<int> blocked{0};
  on_both_threads(pool, [&] {
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, nullptr, &mask);
    blocked = sigismember(&mask, SIGINT);
  });
  CHECK_EQ(blocked.load(), 1);
  sigset_t mask;
  pthread_sigmask(SIG_SETMASK, nullptr, &mask);
  CHECK_EQ(sigismember(&mask, SIGINT), 0);
}

#if !defined(__SANITIZE_THREAD__)  // the sanitizer does not follow a fork of a process with threads

namespace {

// Exit status of a forked child that runs `body`; 255 if it died or hung for a minute.
template <class Body>
int in_child(const Body& body) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    _exit(body());
  }
  int status = -1;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 255;
}

// Every one of them on a thread of its own.
int lanes_that_meet(ThreadPool& pool) {
  std::atomic<int> ran{0};
  pool.run([&](Lane& lane) {
    ++ran;
    while (ran < lane.count()) std::this_thread::yield();
  });
  return ran;
}

}  // namespace

TEST(forked_child_computes) {
  ThreadPool pool(2), unused(3);
  const ThreadPool::SpinScope spin(pool);
  CHECK_EQ(lanes_that_meet(pool), 2);
  CHECK_EQ(in_child([&] { return lanes_that_meet(pool); }), 2);
  CHECK_EQ(in_child([&] { return lanes_that_meet(unused); }), 3);
  CHECK_EQ(in_child([&] {  // a child of the child, and a pool that ends in it
             ThreadPool own(2);
             return lanes_that_meet(own) + lanes_that_meet(pool) +
                    in_child([&] { return lanes_that_meet(pool) + lanes_that_meet(own); });
           }),
           8);
  CHECK_EQ(lanes_that_meet(pool), 2);
}

TEST(forked_child_computes_from_two_threads) {
  ThreadPool pool(2);
  CHECK_EQ(lanes_that_meet(pool), 2);
  CHECK_EQ(in_child([&] {
             int first = 0, second = 0;
             std::thread other([&] {
               for (int i = 0; i < 50; ++i) first += lanes_that_meet(pool);
             });
             for (int i = 0; i < 50; ++i) second += lanes_that_meet(pool);
             other.join();
             return first == 100 && second == 100 ? 7 : 1;
           }),
           7);
}

TEST(fork_during_a_run_of_another_thread) {
  ThreadPool pool(2);
  std::atomic<int> inside{0};
  std::atomic<bool> leave{false};
  std::thread other([&] {
    pool.run([&](Lane&) {
      ++inside;
      while (!leave) std::this_thread::yield();
    });
  });
  // Both: of a thread that is just starting, the address sanitizer's locks stay locked in a child.
  while (inside < 2) std::this_thread::yield();
  CHECK_EQ(in_child([&] { return lanes_that_meet(pool); }), 2);
  leave = true;
  other.join();
  CHECK_EQ(lanes_that_meet(pool), 2);
}

#if !defined(__SANITIZE_ADDRESS__)  // which needs more address space than this test leaves
TEST(refused_threads_are_an_error) {
  CHECK_EQ(in_child([] {
             ThreadPool pool(200);  // their stacks do not fit
             const rlimit limit{size_t{256} << 20, size_t{256} << 20};
             setrlimit(RLIMIT_AS, &limit);
             for (int attempt = 0; attempt < 2; ++attempt) {
               try {
                 pool.run([](Lane&) {});
                 return 1;
               } catch (const puna::Error& error) {
                 if (error.code() != puna::ErrorCode::kDevice) return 2;
               }
             }
             return 3;
           }),
           3);
}
#endif
#endif
