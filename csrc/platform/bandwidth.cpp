#include "platform/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>

#include "platform/memory.h"
#include "platform/thread_pool.h"

namespace puna {
namespace {

// Several times the largest caches, so that they hold little of it.
constexpr int64_t kBytes = int64_t{256} << 20;
constexpr int kRounds = 3;

// In words, each place of a line on its own: the compiler makes vectors of it.
uint64_t sum_of(const uint64_t* words, int64_t count) {
  constexpr int64_t kApart = 32;
  uint64_t sums[kApart] = {};
  for (int64_t i = 0; i + kApart <= count; i += kApart)
    for (int64_t j = 0; j < kApart; ++j) sums[j] += words[i + j];
  uint64_t total = 0;
  for (const uint64_t sum : sums) total += sum;
  return total;
}

double measure() {
  const Memory memory(kBytes);
  auto* words = static_cast<uint64_t*>(memory.data());
  constexpr auto kWords = kBytes / static_cast<int64_t>(sizeof(uint64_t));
  ThreadPool pool;
  std::atomic<uint64_t> total{0};
  double best = 0;
  for (int round = 0; round <= kRounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    pool.run([&](Lane& lane) {
      const Part part = lane.part(kWords);
      const int64_t count = part.end - part.begin;
      // First it is written: pages that never were all show the same zeros.
      if (round == 0) std::memset(words + part.begin, 1, static_cast<size_t>(count) * 8);
      total += sum_of(words + part.begin, count);
    });
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
    if (round > 0) best = std::max(best, static_cast<double>(kBytes) / spent.count());
  }
  return total.load() > 0 ? best : 0;
}

}  // namespace

double memory_bandwidth() {
  static const double measured = measure();
  return measured;
}

}  // namespace puna
