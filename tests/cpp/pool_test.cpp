// The thread pool: every lane once, barriers, exceptions, two callers, forks.
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdio>
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

#if !defined(__SANITIZE_THREAD__)  // the sanitizer does not follow a fork of a process with threads
TEST(forked_child_computes) {
  ThreadPool pool(2);
  pool.run([](Lane&) {});
  const pid_t child = fork();
  if (child == 0) {
    std::atomic<int> ran{0};
    pool.run([&](Lane& lane) {
      lane.barrier();
      ++ran;
    });
    _exit(ran == 2 ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  std::atomic<int> ran{0};
  pool.run([&](Lane& lane) { ran += lane.id() == 0; });
  CHECK_EQ(ran.load(), 1);
}
#endif
