// The ceilings of the machine that kernels are measured against: read_bytes, peak_f32, peak_bf16.
#pragma once

#include "kernels/cpu/tile-inl.h"

namespace puna {
namespace {

[[maybe_unused]] uint64_t read_bytes(const void* data, int64_t bytes) {
  // 256 bytes at a time, each word of them summed on its own: the compiler makes vectors of it.
  constexpr int kWords = 32;
  const auto* words = static_cast<const uint64_t*>(data);
  uint64_t sums[kWords] = {};
  for (int64_t i = 0; i < bytes / 8; i += kWords) {
    for (int j = 0; j < kWords; ++j) sums[j] += words[i + j];
  }
  uint64_t total = 0;
  for (uint64_t words_sum : sums) total += words_sum;
  return total;
}

// The inner loop of multiply_tile without its loads: as many independent sums, nothing else.
template <class Product>
float peak(int64_t iterations, int64_t* operations) {
  constexpr int kSums = Product::kRows * Product::kVectors;
  // Values that the compiler cannot know, and that stay normal numbers for any number of rounds.
  typename Product::W w[Product::kDepth * kLanes];
  typename Product::X x[Product::kDepth];
  for (auto& element : w) element = static_cast<typename Product::W>(iterations & 1);
  for (auto& element : x) element = static_cast<typename Product::X>(iterations & 1);
  const typename Product::Weights weights = Product::weights(w);
  const typename Product::Values values = Product::values(x);
  VF sums[kSums];
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) sums[i] = set1(static_cast<float>(i));
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) sums[i] = Product::accumulate(sums[i], weights, values);
  }
  VF total = sums[0];
#pragma GCC unroll 32
  for (int i = 1; i < kSums; ++i) total = total + sums[i];
  *operations = iterations * kSums * kLanes * Product::kDepth * 2;
  return sum(total);
}

[[maybe_unused]] float peak_f32(int64_t iterations, int64_t* operations) {
  return peak<F32Product>(iterations, operations);
}
[[maybe_unused]] float peak_bf16(int64_t iterations, int64_t* operations) {
  return peak<Bf16Product>(iterations, operations);
}

}  // namespace
}  // namespace puna
