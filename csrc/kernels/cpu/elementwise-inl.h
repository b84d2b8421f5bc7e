// Element-wise kernels and norms, written once over simd.h. One include per translation unit.
// An output may be the same memory as an input of the same length; a partial overlap may not.
#pragma once

#include "kernels/cpu/simd.h"
#include "kernels/kernel_table.h"

namespace puna {
namespace {

// Calls op(i, n) for each full vector (n = VF::N) and once for the rest, if any.
template <class Op>
PUNA_INLINE void for_vectors(int64_t n, const Op& op) {
  int64_t i = 0;
  for (; i + VF::N <= n; i += VF::N) op(i, VF::N);
  if (i < n) op(i, n - i);
}
PUNA_INLINE VF load_up_to(const float* p, int64_t n) { return n == VF::N ? load(p) : load_n(p, n); }
PUNA_INLINE void store_up_to(float* p, VF a, int64_t n) {
  n == VF::N ? store(p, a) : store_n(p, a, n);
}

// Norms sum in four independent vectors, joined in a fixed order: vector i of the row always goes
// to sum i mod 4.
template <class Term>
PUNA_INLINE float sum_of(int64_t n, const Term& term) {
  VF sums[4] = {set1(0), set1(0), set1(0), set1(0)};
  int64_t done = 0;
  for (; done + 4 * VF::N <= n; done += 4 * VF::N) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] = sums[j] + term(done + j * VF::N, VF::N);
  }
  int j = 0;
  for_vectors(n - done, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
    sums[j] = sums[j] + term(done + i, m);
    ++j;
  });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

[[maybe_unused]] void rms_norm(float* y, const float* x, const float* w, int64_t n, float eps) {
  const float squares = sum_of(n, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
    const VF a = load_up_to(x + i, m);
    return a * a;
  });
  const VF scale = set1(1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + eps));
  for_vectors(n, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
    const VF a = load_up_to(x + i, m) * scale;
    store_up_to(y + i, w ? a * load_up_to(w + i, m) : a, m);
  });
}

[[maybe_unused]] void layer_norm(float* y, const float* x, const float* w, const float* b,
                                 int64_t n, float eps) {
  const float mean =
      sum_of(n, [&](int64_t i, int64_t m)
                    __attribute__((always_inline)) { return load_up_to(x + i, m); }) /
      static_cast<float>(n);
  // Lanes past the end hold 0 - mean; they are cut off by multiplying with a vector of ones and
  // zeros.
  const float ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  const float squares = sum_of(n, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
    const VF a = (load_up_to(x + i, m) - set1(mean)) * load_up_to(ones, m);
    return a * a;
  });
  const VF scale = set1(1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + eps));
  for_vectors(n, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
    const VF a = (load_up_to(x + i, m) - set1(mean)) * scale;
    store_up_to(y + i, fma(a, load_up_to(w + i, m), load_up_to(b + i, m)), m);
  });
}

[[maybe_unused]] void silu_mul(float* y, const float* gate, const float* up, int64_t n) {
  for_vectors(n, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
    const VF g = load_up_to(gate + i, m);
    const VF silu = g / (set1(1.0f) + exp(set1(0.0f) - g));
    store_up_to(y + i, silu * load_up_to(up + i, m), m);
  });
}

// erfc(z) for z >= 0 as t exp(P(t) - z^2) with t = 1 / (1 + z / 2). P is a Chebyshev fit of
// ln(erfc(z) / t) + z^2 over z in [0, 10], with an error of 5e-8; beyond, the result underflows to
// 0.
PUNA_INLINE VF erfc_positive(VF z) {
  const VF t = set1(1.0f) / fma(z, set1(0.5f), set1(1.0f));
  VF p = set1(0.144930214f);
  p = fma(p, t, set1(-0.680827179f));
  p = fma(p, t, set1(1.15673376f));
  p = fma(p, t, set1(-0.696251903f));
  p = fma(p, t, set1(-0.0802804288f));
  p = fma(p, t, set1(0.00126758453f));
  p = fma(p, t, set1(0.0346028006f));
  p = fma(p, t, set1(0.386640412f));
  p = fma(p, t, set1(0.998632783f));
  p = fma(p, t, set1(-1.265448f));
  return t * exp(p - z * z);
}

[[maybe_unused]] void gelu(float* y, const float* x, int64_t n) {
  for_vectors(n, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
    const VF a = load_up_to(x + i, m);
    // 1 + erf(u) is 2 - erfc(u) for u >= 0 and erfc(-u) below: no cancellation in either.
    const VF tail = erfc_positive(abs(a) * set1(0.70710678f));
    store_up_to(y + i, a * set1(0.5f) * if_negative(a, tail, set1(2.0f) - tail), m);
  });
}

[[maybe_unused]] float exp_row(float* x, int64_t n) {
  VF largest = set1(x[0]);
  int64_t i = 0;
  for (; i + VF::N <= n; i += VF::N) largest = max(largest, load(x + i));
  float highest = largest_lane(largest);
  for (; i < n; ++i) highest = x[i] > highest ? x[i] : highest;
  const VF top = set1(highest);
  // Read again after the store, which leaves lanes past the end out of the sum.
  return sum_of(n, [&](int64_t k, int64_t m) __attribute__((always_inline)) {
    store_up_to(x + k, exp(load_up_to(x + k, m) - top), m);
    return load_up_to(x + k, m);
  });
}

[[maybe_unused]] void add(float* y, const float* x, int64_t n) {
  for_vectors(n, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
    store_up_to(y + i, load_up_to(y + i, m) + load_up_to(x + i, m), m);
  });
}

[[maybe_unused]] void scale(float* y, const float* x, float a, int64_t n) {
  for_vectors(n, [&](int64_t i, int64_t m) __attribute__((always_inline)) {
    store_up_to(y + i, load_up_to(x + i, m) * set1(a), m);
  });
}

[[maybe_unused]] void rope(float* x, const float* cos, const float* sin, int64_t n) {
  int64_t i = 0;
#if defined(__AVX2__) || (defined(__ARM_NEON) && !defined(PUNA_ISA_SCALAR))
  for (; i + VF::N <= n; i += VF::N) {
    const VF a = load(x + i);
    store(x + i, add_sub(a * twice(cos + i / 2), swap_pairs(a) * twice(sin + i / 2)));
  }
#endif
  for (; i + 2 <= n; i += 2) {
    const float a = x[i], b = x[i + 1], c = cos[i / 2], s = sin[i / 2];
    x[i] = a * c - b * s;
    x[i + 1] = b * c + a * s;
  }
}

[[maybe_unused]] void bf16_from_f32(uint16_t* y, const float* x, int64_t n) {
  int64_t i = 0;
  for (; i + VF::N <= n; i += VF::N) store_bf16(y + i, load(x + i));
  for (; i < n; ++i) y[i] = bf16_of_float(x[i]);
}

[[maybe_unused]] void f32_from_bf16(float* y, const uint16_t* x, int64_t n) {
  int64_t i = 0;
  for (; i + VF::N <= n; i += VF::N) store(y + i, load_bf16(x + i));
  for (; i < n; ++i) y[i] = float_of_bf16(x[i]);
}

}  // namespace
}  // namespace puna
