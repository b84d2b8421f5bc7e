// The ceilings of the machine that kernels are measured against: read_bytes, peak_f32, peak_bf16,
// peak_int8.
#pragma once

#include "kernels/cpu/quantized-inl.h"
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

#if defined(PUNA_DOT)

// A tile of multiply_group without loads and scales. Products of whole numbers that do not change
// would be computed once; so both sides pass through statements the compiler cannot see into.
[[maybe_unused]] float peak_int8(int64_t iterations, int64_t* operations) {
#if defined(__ARM_NEON)
#define PUNA_HIDE(value) asm volatile("" : "+w"(value))
#else
#define PUNA_HIDE(value) asm volatile("" : "+v"(value))
#endif
  const int8_t four[4] = {static_cast<int8_t>(iterations & 1), 1, 2, 3};
  Codes w = four_codes(four), x = w;
  Dots dots[kTileRows][kTileVectors], partial[kTileRows][kTileVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) partial[r][v] = dots[r][v] = same_dots(0);
  }
  for (int64_t n = 0; n < iterations; ++n) {
    unrolled<kSlabVectors>([&](auto index) __attribute__((always_inline)) {
      constexpr int kI = decltype(index)::value;
      PUNA_HIDE(w);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kTileVectors; ++v) {
          PUNA_HIDE(x);
          multiply_codes<Int4G32, kI, kSlabVectors>(dots[r][v], partial[r][v], w, x);
        }
      }
    });
  }
#undef PUNA_HIDE
  Dots total = same_dots(0);
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) total = add_dots(total, dots[r][v]);
  }
  *operations = iterations * kSlabVectors * kTileRows * kTileVectors * kCodeRows * 4 * 2;
  return static_cast<float>(sum_of(total));
}

#else

[[maybe_unused]] float peak_int8(int64_t iterations, int64_t* operations) {
  constexpr int kSums = 8;
  uint32_t sums[kSums] = {};
  uint32_t w = iterations & 1, x = 3;
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 8
    for (uint32_t& sum : sums) {
      asm volatile("" : "+r"(w));  // or the compiler would multiply once
      sum += w * x;
    }
  }
  uint32_t total = 0;
  for (const uint32_t sum : sums) total += sum;
  *operations = iterations * kSums * 2;
  return static_cast<float>(total);
}

#endif

}  // namespace
}  // namespace puna
