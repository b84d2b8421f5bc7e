// A thin SIMD wrapper: the fp32 operations that element-wise kernels need, for one vector width per
// translation unit. Not a portability library: products and attention are written per instruction
// family. Everything lives in an unnamed namespace, so each instruction set owns its private copy.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "base/half.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define PUNA_INLINE [[maybe_unused]] static inline __attribute__((always_inline))
#define PUNA_INLINE_MEMBER inline __attribute__((always_inline))

namespace puna {
namespace {

// VF: a vector of VF::N floats. load_n and store_n touch the first n < VF::N; load_n fills with
// zero.
#if defined(__AVX512F__)

struct VF {
  static constexpr int64_t N = 16;
  __m512 v;
};
PUNA_INLINE __mmask16 part_mask(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
PUNA_INLINE VF load(const float* p) { return {_mm512_loadu_ps(p)}; }
PUNA_INLINE VF load_n(const float* p, int64_t n) {
  return {_mm512_maskz_loadu_ps(part_mask(n), p)};
}
PUNA_INLINE void store(float* p, VF a) { _mm512_storeu_ps(p, a.v); }
PUNA_INLINE void store_n(float* p, VF a, int64_t n) { _mm512_mask_storeu_ps(p, part_mask(n), a.v); }
PUNA_INLINE VF set1(float x) { return {_mm512_set1_ps(x)}; }
PUNA_INLINE VF operator+(VF a, VF b) { return {_mm512_add_ps(a.v, b.v)}; }
PUNA_INLINE VF operator-(VF a, VF b) { return {_mm512_sub_ps(a.v, b.v)}; }
PUNA_INLINE VF operator*(VF a, VF b) { return {_mm512_mul_ps(a.v, b.v)}; }
PUNA_INLINE VF operator/(VF a, VF b) { return {_mm512_div_ps(a.v, b.v)}; }
PUNA_INLINE VF fma(VF a, VF b, VF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
PUNA_INLINE VF min(VF a, VF b) { return {_mm512_min_ps(a.v, b.v)}; }
PUNA_INLINE VF max(VF a, VF b) { return {_mm512_max_ps(a.v, b.v)}; }
PUNA_INLINE VF abs(VF a) { return {_mm512_abs_ps(a.v)}; }
PUNA_INLINE VF nearest(VF a) { return {_mm512_roundscale_ps(a.v, 0)}; }
// a 2^k for whole k in [-126, 127]
PUNA_INLINE VF times_power_of_two(VF a, VF k) { return {_mm512_scalef_ps(a.v, k.v)}; }
PUNA_INLINE VF zero_where_less(VF a, VF x, VF least) {  // 0 where x < least, else a
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, least.v, _CMP_NLT_UQ), a.v)};
}
PUNA_INLINE VF if_negative(VF x, VF yes, VF no) {
  return {
      _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_LT_OQ), no.v, yes.v)};
}
// (x1, x0, x3, x2, ...) and (-, +, -, +, ...) for interleaved pairs.
PUNA_INLINE VF swap_pairs(VF a) { return {_mm512_permute_ps(a.v, 0xb1)}; }
PUNA_INLINE VF add_sub(VF a, VF b) {  // a0 - b0, a1 + b1, ...
  return {_mm512_fmaddsub_ps(a.v, _mm512_set1_ps(1.0f), b.v)};
}
// Lane i and lane i + Half change places, within every 2 Half lanes.
template <int Half>
PUNA_INLINE VF swap_halves(VF a) {
  if constexpr (Half == 8) return {_mm512_shuffle_f32x4(a.v, a.v, 0x4e)};
  if constexpr (Half == 4) return {_mm512_shuffle_f32x4(a.v, a.v, 0xb1)};
  return {_mm512_permute_ps(a.v, Half == 2 ? 0x4e : 0xb1)};
}
PUNA_INLINE float first_lane(VF a) { return _mm512_cvtss_f32(a.v); }
PUNA_INLINE VF twice(const float* p) {  // p0, p0, p1, p1, ... from VF::N / 2 floats
  const __m512i index = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  return {_mm512_permutexvar_ps(index, _mm512_castps256_ps512(_mm256_loadu_ps(p)))};
}
PUNA_INLINE VF load_bf16(const uint16_t* p) {
  const __m512i wide =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
PUNA_INLINE void store_bf16(uint16_t* p, VF a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded, quiet)));
}

#elif defined(__AVX2__)

struct VF {
  static constexpr int64_t N = 8;
  __m256 v;
};
PUNA_INLINE __m256i part_mask(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
PUNA_INLINE VF load(const float* p) { return {_mm256_loadu_ps(p)}; }
PUNA_INLINE VF load_n(const float* p, int64_t n) { return {_mm256_maskload_ps(p, part_mask(n))}; }
PUNA_INLINE void store(float* p, VF a) { _mm256_storeu_ps(p, a.v); }
PUNA_INLINE void store_n(float* p, VF a, int64_t n) { _mm256_maskstore_ps(p, part_mask(n), a.v); }
PUNA_INLINE VF set1(float x) { return {_mm256_set1_ps(x)}; }
PUNA_INLINE VF operator+(VF a, VF b) { return {_mm256_add_ps(a.v, b.v)}; }
PUNA_INLINE VF operator-(VF a, VF b) { return {_mm256_sub_ps(a.v, b.v)}; }
PUNA_INLINE VF operator*(VF a, VF b) { return {_mm256_mul_ps(a.v, b.v)}; }
PUNA_INLINE VF operator/(VF a, VF b) { return {_mm256_div_ps(a.v, b.v)}; }
PUNA_INLINE VF fma(VF a, VF b, VF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
PUNA_INLINE VF min(VF a, VF b) { return {_mm256_min_ps(a.v, b.v)}; }
PUNA_INLINE VF max(VF a, VF b) { return {_mm256_max_ps(a.v, b.v)}; }
PUNA_INLINE VF abs(VF a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
PUNA_INLINE VF nearest(VF a) { return {_mm256_round_ps(a.v, 0)}; }
PUNA_INLINE VF times_power_of_two(VF a, VF k) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(k.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}
PUNA_INLINE VF zero_where_less(VF a, VF x, VF least) {
  return {_mm256_andnot_ps(_mm256_cmp_ps(x.v, least.v, _CMP_LT_OQ), a.v)};
}
PUNA_INLINE VF if_negative(VF x, VF yes, VF no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_LT_OQ))};
}
PUNA_INLINE VF swap_pairs(VF a) { return {_mm256_permute_ps(a.v, 0xb1)}; }
PUNA_INLINE VF add_sub(VF a, VF b) { return {_mm256_addsub_ps(a.v, b.v)}; }
template <int Half>
PUNA_INLINE VF swap_halves(VF a) {
  if constexpr (Half == 4) return {_mm256_permute2f128_ps(a.v, a.v, 1)};
  return {_mm256_permute_ps(a.v, Half == 2 ? 0x4e : 0xb1)};
}
PUNA_INLINE float first_lane(VF a) { return _mm256_cvtss_f32(a.v); }
PUNA_INLINE VF twice(const float* p) {
  const __m256i index = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
  return {_mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), index)};
}
PUNA_INLINE VF load_bf16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
PUNA_INLINE void store_bf16(uint16_t* p, VF a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i picked = _mm256_blendv_epi8(rounded, quiet, nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(picked, picked), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

#elif defined(__ARM_NEON) && !defined(PUNA_ISA_SCALAR)

struct VF {
  static constexpr int64_t N = 4;
  float32x4_t v;
};
PUNA_INLINE VF load(const float* p) { return {vld1q_f32(p)}; }
PUNA_INLINE VF load_n(const float* p, int64_t n) {
  float lanes[4] = {0, 0, 0, 0};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return {vld1q_f32(lanes)};
}
PUNA_INLINE void store(float* p, VF a) { vst1q_f32(p, a.v); }
PUNA_INLINE void store_n(float* p, VF a, int64_t n) {
  float lanes[4];
  vst1q_f32(lanes, a.v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}
PUNA_INLINE VF set1(float x) { return {vdupq_n_f32(x)}; }
PUNA_INLINE VF operator+(VF a, VF b) { return {vaddq_f32(a.v, b.v)}; }
PUNA_INLINE VF operator-(VF a, VF b) { return {vsubq_f32(a.v, b.v)}; }
PUNA_INLINE VF operator*(VF a, VF b) { return {vmulq_f32(a.v, b.v)}; }
PUNA_INLINE VF operator/(VF a, VF b) { return {vdivq_f32(a.v, b.v)}; }
PUNA_INLINE VF fma(VF a, VF b, VF c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
PUNA_INLINE VF min(VF a, VF b) { return {vminq_f32(a.v, b.v)}; }
PUNA_INLINE VF max(VF a, VF b) { return {vmaxq_f32(a.v, b.v)}; }
PUNA_INLINE VF abs(VF a) { return {vabsq_f32(a.v)}; }
PUNA_INLINE VF nearest(VF a) { return {vrndnq_f32(a.v)}; }
PUNA_INLINE VF times_power_of_two(VF a, VF k) {
  const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(k.v), vdupq_n_s32(127));
  return {vmulq_f32(a.v, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)))};
}
PUNA_INLINE VF zero_where_less(VF a, VF x, VF least) {
  return {vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(a.v), vcltq_f32(x.v, least.v)))};
}
PUNA_INLINE VF if_negative(VF x, VF yes, VF no) {
  return {vbslq_f32(vcltzq_f32(x.v), yes.v, no.v)};
}
PUNA_INLINE VF swap_pairs(VF a) { return {vrev64q_f32(a.v)}; }
PUNA_INLINE VF add_sub(VF a, VF b) {
  const float signs[4] = {-1, 1, -1, 1};
  return {vfmaq_f32(a.v, b.v, vld1q_f32(signs))};
}
template <int Half>
PUNA_INLINE VF swap_halves(VF a) {
  return {Half == 2 ? vextq_f32(a.v, a.v, 2) : vrev64q_f32(a.v)};
}
PUNA_INLINE float first_lane(VF a) { return vgetq_lane_f32(a.v, 0); }
PUNA_INLINE VF twice(const float* p) {
  const float32x2_t pair = vld1_f32(p);
  return {vcombine_f32(vdup_lane_f32(pair, 0), vdup_lane_f32(pair, 1))};
}
PUNA_INLINE VF load_bf16(const uint16_t* p) {
  return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))};
}
PUNA_INLINE void store_bf16(uint16_t* p, VF a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a.v), upper = vshrq_n_u32(bits, 16);
  const uint32x4_t odd = vandq_u32(upper, vdupq_n_u32(1));
  const uint32x4_t half = vaddq_u32(odd, vdupq_n_u32(0x7fff));
  const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, half), 16);
  const uint32x4_t quiet = vorrq_u32(upper, vdupq_n_u32(0x40));
  const uint32x4_t number = vceqq_f32(a.v, a.v);
  vst1_u16(p, vmovn_u32(vbslq_u32(number, rounded, quiet)));
}

#else

struct VF {
  static constexpr int64_t N = 1;
  float v;
};
PUNA_INLINE VF load(const float* p) { return {*p}; }
PUNA_INLINE VF load_n(const float*, int64_t) { return {0}; }
PUNA_INLINE void store(float* p, VF a) { *p = a.v; }
PUNA_INLINE void store_n(float*, VF, int64_t) {}
PUNA_INLINE VF set1(float x) { return {x}; }
PUNA_INLINE VF operator+(VF a, VF b) { return {a.v + b.v}; }
PUNA_INLINE VF operator-(VF a, VF b) { return {a.v - b.v}; }
PUNA_INLINE VF operator*(VF a, VF b) { return {a.v * b.v}; }
PUNA_INLINE VF operator/(VF a, VF b) { return {a.v / b.v}; }
PUNA_INLINE VF fma(VF a, VF b, VF c) { return {a.v * b.v + c.v}; }
PUNA_INLINE VF min(VF a, VF b) { return {a.v < b.v ? a.v : b.v}; }
PUNA_INLINE VF max(VF a, VF b) { return {a.v > b.v ? a.v : b.v}; }
PUNA_INLINE VF abs(VF a) { return {__builtin_fabsf(a.v)}; }
PUNA_INLINE VF nearest(VF a) { return {__builtin_rintf(a.v)}; }
PUNA_INLINE VF times_power_of_two(VF a, VF k) {
  return {a.v * float_of_bits(static_cast<uint32_t>(static_cast<int32_t>(k.v) + 127) << 23)};
}
PUNA_INLINE VF zero_where_less(VF a, VF x, VF least) { return {x.v < least.v ? 0.0f : a.v}; }
template <int Half>
PUNA_INLINE VF swap_halves(VF a) {
  return a;
}
PUNA_INLINE float first_lane(VF a) { return a.v; }
PUNA_INLINE VF if_negative(VF x, VF yes, VF no) { return x.v < 0 ? yes : no; }
PUNA_INLINE VF load_bf16(const uint16_t* p) { return {float_of_bf16(*p)}; }
PUNA_INLINE void store_bf16(uint16_t* p, VF a) { *p = bf16_of_float(a.v); }

#endif

// All lanes into one by an operation of two vectors, in a fixed tree.
template <int Half = static_cast<int>(VF::N / 2), class Join>
PUNA_INLINE float join_lanes(VF a, Join join) {
  if constexpr (Half == 0) {
    return first_lane(a);
  } else {
    return join_lanes<Half / 2>(join(a, swap_halves<Half>(a)), join);
  }
}
PUNA_INLINE float sum(VF a) {
  return join_lanes(a, [](VF x, VF y) { return x + y; });
}
PUNA_INLINE float largest_lane(VF a) {
  return join_lanes(a, [](VF x, VF y) { return max(x, y); });
}

// exp(x) with a relative error below 2e-7 on [-87.3, 88]; exactly 0 below, so exp(-infinity) is 0.
// x = k ln 2 + r, |r| <= ln 2 / 2; polynomial of degree 6 (the coefficients of Cephes' expf).
PUNA_INLINE VF exp(VF x) {
  const VF clamped = min(max(x, set1(-87.3f)), set1(88.0f));
  const VF k = nearest(clamped * set1(1.44269504f));
  VF r = fma(k, set1(-0.693359375f), clamped);
  r = fma(k, set1(2.12194440e-4f), r);
  VF p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = times_power_of_two(fma(p, r * r, r + set1(1.0f)), k);
  return zero_where_less(p, x, set1(-87.3f));
}

}  // namespace
}  // namespace puna
