// The register tile that products and attention share: sums[row][column] += x[row] . w[column],
// with the sums held in registers over all steps of k.
//
// The sum of one element is built in the order of k, by one chain of operations that is the same in
// every shape of tile; hence a row has the same bits in whatever tile it is computed.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "base/half.h"
#include "kernels/cpu/simd.h"
#include "kernels/kernel_table.h"

namespace puna {
namespace {

constexpr int64_t kLanes = VF::N;

// How one step of k is loaded, broadcast and accumulated. A product has
//   X, W          the stored elements of activations and weights
//   kDepth        columns in one step
//   Weights       one step of kLanes outputs; Values: one step of one row, in every lane
//   kRows,        the largest tile. Its sums, the shorter side of a step and one more register must
//   kVectors      fit the registers, and about 8 sums are needed to hide the latency of fma.

// to[steps][Width * Depth] = from[steps][kPanelRows * Depth], the first Width columns of the panel.
template <int64_t Width, int64_t Depth, class T>
PUNA_INLINE void copy_steps(T* to, const T* from, int64_t steps) {
  for (int64_t k = 0; k < steps; ++k) {
    __builtin_memcpy(to + k * Width * Depth, from + k * kPanelRows * Depth,
                     Width * Depth * sizeof(T));
  }
}

struct F32Product {
  using Blocked = F32Product;
  using X = float;
  using W = float;
  using Weights = VF;
  using Values = VF;
  static constexpr int kDepth = 1;
  // 24 sums of 32 registers, or 12 of 16.
  static constexpr int kRows = kLanes == 1 ? 4 : 6, kVectors = kLanes == 8 ? 2 : 4;
  PUNA_INLINE Weights weights(const W* w) { return load(w); }
  PUNA_INLINE Weights weights(const W* w, int64_t count) { return load_n(w, count); }
  PUNA_INLINE Values values(const X* x) { return set1(*x); }
  PUNA_INLINE VF accumulate(VF total, Weights w, Values x) { return fma(w, x, total); }
  PUNA_INLINE void copy_row(X* to, const X* from, int64_t count) {
    __builtin_memcpy(to, from, static_cast<size_t>(count) * sizeof(X));
  }
  template <int64_t Width>
  PUNA_INLINE void copy_weights(W* to, const W* from, int64_t count) {
    copy_steps<Width, kDepth>(to, from, count / kDepth);
  }
};

PUNA_INLINE VF load_bf16_n(const uint16_t* p, int64_t n) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(part_mask(n), p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
#else
  uint16_t lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load_bf16(lanes);
#endif
}

// fp32 activations, bfloat16 weights that lie one by one (keys and values of attention).
struct WidenedProduct : F32Product {
  using W = uint16_t;
  PUNA_INLINE Weights weights(const W* w) { return load_bf16(w); }
  PUNA_INLINE Weights weights(const W* w, int64_t count) { return load_bf16_n(w, count); }
};

// bfloat16 on both sides, weights in pairs (k, k + 1) per output.
#if defined(__AVX512BF16__)
struct Bf16Product {
  using Blocked = Bf16Product;
  using X = uint16_t;
  using W = uint16_t;
  using Weights = __m512bh;
  using Values = __m512bh;
  static constexpr int kDepth = 2, kRows = 6, kVectors = 4;
  PUNA_INLINE Weights weights(const W* w) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(w));
  }
  PUNA_INLINE Values values(const X* x) {
    int32_t pair;
    __builtin_memcpy(&pair, x, sizeof(pair));
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
  }
  PUNA_INLINE VF accumulate(VF total, Weights w, Values x) {
    return {_mm512_dpbf16_ps(total.v, w, x)};
  }
  PUNA_INLINE void copy_row(X* to, const X* from, int64_t count) {
    __builtin_memcpy(to, from, static_cast<size_t>(count) * sizeof(X));
  }
  template <int64_t Width>
  PUNA_INLINE void copy_weights(W* to, const W* from, int64_t count) {
    copy_steps<Width, kDepth>(to, from, count / kDepth);
  }
};
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_BF16)
struct Bf16Product {
  using Blocked = Bf16Product;
  using X = uint16_t;
  using W = uint16_t;
  using Weights = bfloat16x8_t;
  using Values = bfloat16x8_t;
  static constexpr int kDepth = 2, kRows = 6, kVectors = 4;
  PUNA_INLINE Weights weights(const W* w) { return vreinterpretq_bf16_u16(vld1q_u16(w)); }
  PUNA_INLINE Values values(const X* x) {
    uint32_t pair;
    __builtin_memcpy(&pair, x, sizeof(pair));
    return vreinterpretq_bf16_u32(vdupq_n_u32(pair));
  }
  PUNA_INLINE VF accumulate(VF total, Weights w, Values x) { return {vbfdotq_f32(total.v, w, x)}; }
  PUNA_INLINE void copy_row(X* to, const X* from, int64_t count) {
    __builtin_memcpy(to, from, static_cast<size_t>(count) * sizeof(X));
  }
  template <int64_t Width>
  PUNA_INLINE void copy_weights(W* to, const W* from, int64_t count) {
    copy_steps<Width, kDepth>(to, from, count / kDepth);
  }
};
#else
// Widened: a bfloat16 is the upper half of a float. The even column is added first.
struct Pairs {
  VF even, odd;
};
#if defined(__AVX512F__)
PUNA_INLINE Pairs split(__m512i pairs) {
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)))}};
}
PUNA_INLINE Pairs load_pairs(const uint16_t* p) { return split(_mm512_loadu_si512(p)); }
PUNA_INLINE Pairs broadcast_pair(int32_t pair) { return split(_mm512_set1_epi32(pair)); }
#elif defined(__AVX2__)
PUNA_INLINE Pairs split(__m256i pairs) {
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-65536)))}};
}
PUNA_INLINE Pairs load_pairs(const uint16_t* p) {
  return split(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
PUNA_INLINE Pairs broadcast_pair(int32_t pair) { return split(_mm256_set1_epi32(pair)); }
#elif defined(__ARM_NEON) && !defined(PUNA_ISA_SCALAR)
PUNA_INLINE Pairs split(uint32x4_t pairs) {
  return {{vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16))},
          {vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000u)))}};
}
PUNA_INLINE Pairs load_pairs(const uint16_t* p) {
  return split(vreinterpretq_u32_u16(vld1q_u16(p)));
}
PUNA_INLINE Pairs broadcast_pair(int32_t pair) {
  return split(vdupq_n_u32(static_cast<uint32_t>(pair)));
}
#else
PUNA_INLINE Pairs load_pairs(const uint16_t* p) {
  return {{float_of_bf16(p[0])}, {float_of_bf16(p[1])}};
}
PUNA_INLINE Pairs broadcast_pair(int32_t pair) {
  const uint32_t bits = static_cast<uint32_t>(pair);
  return {{float_of_bits(bits << 16)}, {float_of_bits(bits & 0xffff0000u)}};
}
#endif
struct Bf16Product {
  using Blocked = F32Product;
  using X = uint16_t;
  using W = uint16_t;
  using Weights = Pairs;
  using Values = Pairs;
  static constexpr int kDepth = 2;
  // Of 32 registers 20 sums, 8 for the weights of a step, 2 for its values; or of 16: 8, 4 and 2.
  static constexpr int kRows = kLanes == 16 || kLanes == 4 ? 5 : 4, kVectors = kLanes == 8 ? 2 : 4;
  PUNA_INLINE Weights weights(const W* w) { return load_pairs(w); }
  PUNA_INLINE Values values(const X* x) {
    int32_t pair;
    __builtin_memcpy(&pair, x, sizeof(pair));
    return broadcast_pair(pair);
  }
  PUNA_INLINE VF accumulate(VF total, Weights w, Values x) {
    return fma(w.odd, x.odd, fma(w.even, x.even, total));
  }
  // Widened: the same chain of fma as above, column by column.
  PUNA_INLINE void copy_row(float* to, const X* from, int64_t count) {
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) store(to + k, load_bf16(from + k));
    for (; k < count; ++k) to[k] = float_of_bf16(from[k]);
  }
  template <int64_t Width>
  PUNA_INLINE void copy_weights(float* to, const W* from, int64_t count) {
    for (int64_t k = 0; k < count; k += kDepth) {
#pragma GCC unroll 64
      for (int64_t n = 0; n < Width; n += kLanes) {
        const Pairs pairs = load_pairs(from + k * kPanelRows + n * kDepth);
        store(to + k * Width + n, pairs.even);
        store(to + (k + 1) * Width + n, pairs.odd);
      }
    }
  }
};
#endif

// Where the weights of a tile lie, in elements: step k of vector v at k * step + v * vector.
struct WeightStrides {
  int64_t step, vector;
};

struct NothingEachStep {
  PUNA_INLINE_MEMBER void operator()() const {}
};

// sums[r * sums_stride + v * kLanes + lane] += x[r] . w[v * kLanes + lane] over `steps` of k;
// `each_step` may ask for memory ahead of its use.
template <class Product, int Rows, int Vectors, class EachStep = NothingEachStep>
PUNA_INLINE void multiply_tile(float* sums, int64_t sums_stride, const typename Product::X* x,
                               int64_t x_stride, const typename Product::W* w,
                               WeightStrides strides, int64_t steps, EachStep each_step = {}) {
  VF tile[Rows][Vectors];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 64
    for (int v = 0; v < Vectors; ++v) tile[r][v] = load(sums + r * sums_stride + v * kLanes);
  }
  for (int64_t k = 0; k < steps; ++k) {
    const typename Product::X* x_step = x + k * Product::kDepth;
    const typename Product::W* w_step = w + k * strides.step;
    each_step();
    // The shorter side of the step stays in registers.
    if constexpr (Rows <= Vectors) {
      typename Product::Values values[Rows];
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) values[r] = Product::values(x_step + r * x_stride);
#pragma GCC unroll 64
      for (int v = 0; v < Vectors; ++v) {
        const typename Product::Weights weights = Product::weights(w_step + v * strides.vector);
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
          tile[r][v] = Product::accumulate(tile[r][v], weights, values[r]);
        }
      }
    } else {
      typename Product::Weights weights[Vectors];
#pragma GCC unroll 64
      for (int v = 0; v < Vectors; ++v) weights[v] = Product::weights(w_step + v * strides.vector);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const typename Product::Values values = Product::values(x_step + r * x_stride);
#pragma GCC unroll 64
        for (int v = 0; v < Vectors; ++v) {
          tile[r][v] = Product::accumulate(tile[r][v], weights[v], values);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 64
    for (int v = 0; v < Vectors; ++v) store(sums + r * sums_stride + v * kLanes, tile[r][v]);
  }
}

// The same for the first `count` lanes of one vector.
template <class Product, int Rows>
PUNA_INLINE void multiply_partial_tile(float* sums, int64_t sums_stride,
                                       const typename Product::X* x, int64_t x_stride,
                                       const typename Product::W* w, int64_t step_stride,
                                       int64_t steps, int64_t count) {
  VF tile[Rows];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) tile[r] = load_n(sums + r * sums_stride, count);
  for (int64_t k = 0; k < steps; ++k) {
    const typename Product::Weights weights = Product::weights(w + k * step_stride, count);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const typename Product::Values values = Product::values(x + r * x_stride + k);
      tile[r] = Product::accumulate(tile[r], weights, values);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) store_n(sums + r * sums_stride, tile[r], count);
}

}  // namespace
}  // namespace puna
