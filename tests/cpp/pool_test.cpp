// The thread pool: every lane once, barriers, exceptions, two callers, forks.
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "check.h"
#include "platform/thread_pool.h"

using puna::Lane;
using puna::Part;
using puna::ThreadPool;
using puna::TileCounter;

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

TEST(barriers_order_phases) {
  for (const int lanes : {2, 3, 4}) {
    ThreadPool pool(lanes);
    std::vector<int64_t> values(static_cast<size_t>(lanes), 0);
    std::atomic<int> wrong{0};
    pool.run([&](Lane& lane) {
      for (int64_t phase = 1; phase <= 200; ++phase) {
        values[lane.id()] = phase;
        lane.barrier();
        for (const int64_t value : values) wrong += value != phase;
        lane.barrier();
      }
    });
    CHECK_EQ(wrong.load(), 0);
  }
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

TEST(exception_lets_lanes_leave_a_barrier) {
  ThreadPool pool(4);
  std::atomic<int> after{0};
  for (int round = 0; round < 200; ++round) {
    CHECK_THROWS(puna::ErrorCode::kDevice, pool.run([&](Lane& lane) {
      lane.barrier();
      if (lane.id() == round % 4) puna::fail(puna::ErrorCode::kDevice, "stop");
      lane.barrier();
      ++after;
    }));
  }
  CHECK_EQ(after.load(), 0);
  std::atomic<int> ran{0};
  pool.run([&](Lane& lane) { ran += lane.id() == 0; });  // and the pool works on
  CHECK_EQ(ran.load(), 1);
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
      inner.barrier();
      const Part part = inner.part(10);
      for (int64_t r = part.begin; r < part.end; ++r) ++rows[outer.id() * 10 + r];
    });
    outer.barrier();
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
  pool.run([&](Lane& lane) {
    lane.barrier();
    ran += std::this_thread::get_id() == here && lane.count() == 1;
  });
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
  pool.run([&](Lane& lane) {
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, nullptr, &mask);
    if (lane.id() == 1) blocked = sigismember(&mask, SIGINT);
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

int lanes_that_meet(ThreadPool& pool) {
  std::atomic<int> ran{0};
  pool.run([&](Lane& lane) {
    lane.barrier();
    ++ran;
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
  std::atomic<bool> inside{false}, leave{false};
  std::thread other([&] {
    pool.run([&](Lane&) {
      inside = true;
      while (!leave) std::this_thread::yield();
    });
  });
  while (!inside) std::this_thread::yield();
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
