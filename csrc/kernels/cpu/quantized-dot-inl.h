// Dot products of bytes, for one instruction set: how vectors of codes are loaded, taken apart and
// multiplied. Nothing here knows a format beyond the range of its values.
//
// A vector Codes holds kCodeRows output rows by 4 columns, [kCodeRows][4]; Dots one int32 sum of
// each of the rows. Activations come as 4 columns in every row.
#pragma once

#include "kernels/cpu/simd.h"
#include "quant/traits.h"

#if defined(__AVX2__) || defined(__AVX512F__) || \
    (defined(__ARM_FEATURE_DOTPROD) && !defined(PUNA_ISA_SCALAR))
#define PUNA_DOT

namespace puna {
namespace {

constexpr int64_t kCodeRows = VF::N;

// Asks for a line of memory, here and not elsewhere: the compiler would gather the requests of an
// unrolled loop in one burst.
PUNA_INLINE void ask_for(const uint8_t* line) {
#if defined(__x86_64__)
  asm volatile("prefetcht0 %0" : : "m"(*line));
#else
  __builtin_prefetch(line);
#endif
}
PUNA_INLINE void ask_for_lines(const uint8_t* from, int64_t bytes) {
#pragma GCC unroll 64
  for (int64_t i = 0; i < bytes; i += 64) ask_for(from + i);
}

// How the values of a format go into a product. Those of at most 6 bits are the codes themselves,
// and kZero times the activations' sum is taken off the result. Values of 8 bits likewise, or as
// signed bytes value - kZero where the instruction set wants both sides signed (kSignedBytes).
template <class Format>
constexpr bool kIsBytes = Format::kBits == 8 || Format::kTable;
template <class Format>
constexpr int kMostValue = Format::kTable ? kTable16[15] : (1 << Format::kBits) - 1;

#if defined(__AVX512F__)

using Codes = __m512i;
using Dots = __m512i;
PUNA_INLINE Codes load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
PUNA_INLINE void store_codes(uint8_t* p, Codes codes) { _mm512_storeu_si512(p, codes); }
PUNA_INLINE Codes four_codes(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  return _mm512_set1_epi32(four);
}
// Bits [From, From + Count) of every byte, moved to [To, To + Count); the others are 0.
template <int From, int Count, int To>
PUNA_INLINE Codes bits_of(Codes codes) {
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(((1 << Count) - 1) << To));
  if constexpr (From > To) codes = _mm512_srli_epi16(codes, From - To);
  if constexpr (From < To) codes = _mm512_slli_epi16(codes, To - From);
  return _mm512_and_si512(codes, mask);
}
PUNA_INLINE Codes both(Codes a, Codes b) { return _mm512_or_si512(a, b); }
PUNA_INLINE Codes less(Codes a, int b) {
  return _mm512_sub_epi8(a, _mm512_set1_epi8(static_cast<char>(b)));
}
PUNA_INLINE Codes flip_top_bit(Codes a) {
  return _mm512_xor_si512(a, _mm512_set1_epi8(static_cast<char>(0x80)));
}
PUNA_INLINE Codes look_up(const uint8_t (&table)[16], Codes index) {
  const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), index);
}
PUNA_INLINE Dots same_dots(int32_t value) { return _mm512_set1_epi32(value); }
template <int Bits>
PUNA_INLINE Dots minus_shifted(Dots a) {  // -(a << Bits)
  return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(a, Bits));
}
PUNA_INLINE VF to_float(Dots a) { return {_mm512_cvtepi32_ps(a)}; }
PUNA_INLINE VF load_f16(const uint8_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
PUNA_INLINE Dots load_signed_bytes(const uint8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// Whole values as int8; their int32 form is returned.
PUNA_INLINE Dots store_i8(int8_t* p, VF a) {
  const __m512i whole = _mm512_cvtps_epi32(a.v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(whole));
  return whole;
}
PUNA_INLINE Dots add_dots(Dots a, Dots b) { return _mm512_add_epi32(a, b); }

#elif defined(__AVX2__)

using Codes = __m256i;
using Dots = __m256i;
PUNA_INLINE Codes load_codes(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
PUNA_INLINE void store_codes(uint8_t* p, Codes codes) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), codes);
}
PUNA_INLINE Codes four_codes(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  return _mm256_set1_epi32(four);
}
template <int From, int Count, int To>
PUNA_INLINE Codes bits_of(Codes codes) {
  const __m256i mask = _mm256_set1_epi8(static_cast<char>(((1 << Count) - 1) << To));
  if constexpr (From > To) codes = _mm256_srli_epi16(codes, From - To);
  if constexpr (From < To) codes = _mm256_slli_epi16(codes, To - From);
  return _mm256_and_si256(codes, mask);
}
PUNA_INLINE Codes both(Codes a, Codes b) { return _mm256_or_si256(a, b); }
PUNA_INLINE Codes less(Codes a, int b) {
  return _mm256_sub_epi8(a, _mm256_set1_epi8(static_cast<char>(b)));
}
PUNA_INLINE Codes flip_top_bit(Codes a) {
  return _mm256_xor_si256(a, _mm256_set1_epi8(static_cast<char>(0x80)));
}
PUNA_INLINE Codes look_up(const uint8_t (&table)[16], Codes index) {
  const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), index);
}
PUNA_INLINE Dots same_dots(int32_t value) { return _mm256_set1_epi32(value); }
template <int Bits>
PUNA_INLINE Dots minus_shifted(Dots a) {
  return _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(a, Bits));
}
PUNA_INLINE VF to_float(Dots a) { return {_mm256_cvtepi32_ps(a)}; }
PUNA_INLINE VF load_f16(const uint8_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
PUNA_INLINE Dots load_signed_bytes(const uint8_t* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
PUNA_INLINE Dots store_i8(int8_t* p, VF a) {
  const __m256i whole = _mm256_cvtps_epi32(a.v);
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
  return whole;
}
PUNA_INLINE Dots add_dots(Dots a, Dots b) { return _mm256_add_epi32(a, b); }

#else  // NEON with dot products

using Codes = uint8x16_t;
using Dots = int32x4_t;
PUNA_INLINE Codes load_codes(const uint8_t* p) { return vld1q_u8(p); }
PUNA_INLINE void store_codes(uint8_t* p, Codes codes) { vst1q_u8(p, codes); }
PUNA_INLINE Codes four_codes(const int8_t* p) {
  uint32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  return vreinterpretq_u8_u32(vdupq_n_u32(four));
}
template <int From, int Count, int To>
PUNA_INLINE Codes bits_of(Codes codes) {
  if constexpr (From > To) codes = vshrq_n_u8(codes, From - To);
  if constexpr (From < To) codes = vshlq_n_u8(codes, To - From);
  return vandq_u8(codes, vdupq_n_u8(static_cast<uint8_t>(((1 << Count) - 1) << To)));
}
PUNA_INLINE Codes both(Codes a, Codes b) { return vorrq_u8(a, b); }
PUNA_INLINE Codes less(Codes a, int b) { return vsubq_u8(a, vdupq_n_u8(static_cast<uint8_t>(b))); }
PUNA_INLINE Codes flip_top_bit(Codes a) { return veorq_u8(a, vdupq_n_u8(0x80)); }
PUNA_INLINE Codes look_up(const uint8_t (&table)[16], Codes index) {
  return vqtbl1q_u8(vld1q_u8(table), index);
}
PUNA_INLINE Dots same_dots(int32_t value) { return vdupq_n_s32(value); }
template <int Bits>
PUNA_INLINE Dots minus_shifted(Dots a) {
  return vnegq_s32(vshlq_n_s32(a, Bits));
}
PUNA_INLINE VF to_float(Dots a) { return {vcvtq_f32_s32(a)}; }
PUNA_INLINE VF load_f16(const uint8_t* p) {
  uint16x4_t halves;
  __builtin_memcpy(&halves, p, sizeof(halves));
  return {vcvt_f32_f16(vreinterpret_f16_u16(halves))};
}
PUNA_INLINE uint8x8_t load_four(const uint8_t* p) {
  uint32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  return vreinterpret_u8_u32(vdup_n_u32(four));
}
PUNA_INLINE Dots load_signed_bytes(const uint8_t* p) {
  const int16x8_t words = vmovl_s8(vreinterpret_s8_u8(load_four(p)));
  return vmovl_s16(vget_low_s16(words));
}
PUNA_INLINE Dots store_i8(int8_t* p, VF a) {
  const int32x4_t whole = vcvtnq_s32_f32(a.v);
  const int16x4_t words = vmovn_s32(whole);
  const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
  __builtin_memcpy(p, &bytes, 4);
  return whole;
}
PUNA_INLINE Dots add_dots(Dots a, Dots b) { return vaddq_s32(a, b); }

#endif

// Unsigned: as those of vectors, sums that leave int32 wrap.
PUNA_INLINE int32_t sum_of(Dots a) {
  uint32_t lanes[kCodeRows], total = 0;
  __builtin_memcpy(lanes, &a, sizeof(lanes));
  for (const uint32_t lane : lanes) total += lane;
  return static_cast<int32_t>(total);
}

// One after the other: the compiler would regroup sums of whole numbers to trees of products that
// no machine has the registers for.
PUNA_INLINE Dots in_order(Dots total) {
#if defined(__ARM_NEON)
  asm("" : "+w"(total));
#else
  asm("" : "+v"(total));
#endif
  return total;
}

// multiply_codes<Format, I, Count>(dots, partial, w, x): the I-th of Count products of vectors that
// are added to `dots`; exact. `partial` belongs to the function between the products.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

constexpr bool kSignedBytes = false;
// In the order written, each sum in one register: left to itself the compiler moves sums of a tile
// that fills the registers about.
PUNA_INLINE Dots in_place(Dots dots) {
  asm volatile("" : "+v"(dots));
  return dots;
}
template <class Format, int I, int Count>
PUNA_INLINE void multiply_codes(Dots& dots, Dots&, Codes w, Codes x) {
#if defined(__AVX512VNNI__)
  dots = in_place(_mm512_dpbusd_epi32(dots, w, x));
#else
  dots = _mm256_dpbusd_avx_epi32(dots, w, x);
#endif
}

#elif defined(__ARM_NEON)

constexpr bool kSignedBytes = true;
template <class Format, int I, int Count>
PUNA_INLINE void multiply_codes(Dots& dots, Dots&, Codes w, Codes x) {
  dots = vdotq_s32(dots, vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(x));
}

#else

// Pairs of products of an unsigned and a signed byte are added in int16, as many as cannot overflow
// it; then pairs of those in int32.
#if defined(__AVX512F__)
PUNA_INLINE Dots pairs_of(Codes w, Codes x) { return _mm512_maddubs_epi16(w, x); }
PUNA_INLINE Dots add_words(Dots a, Dots b) { return _mm512_add_epi16(a, b); }
PUNA_INLINE Dots dots_of_pairs(Dots pairs) {
  return _mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}
PUNA_INLINE Codes magnitude(Codes w) { return _mm512_abs_epi8(w); }
PUNA_INLINE Codes with_sign(Codes x, Codes w) {  // -x where w < 0; x where w is 0 does no harm
  return _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
}
#else
PUNA_INLINE Dots pairs_of(Codes w, Codes x) { return _mm256_maddubs_epi16(w, x); }
PUNA_INLINE Dots add_words(Dots a, Dots b) { return _mm256_add_epi16(a, b); }
PUNA_INLINE Dots dots_of_pairs(Dots pairs) {
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
PUNA_INLINE Codes magnitude(Codes w) { return _mm256_abs_epi8(w); }
PUNA_INLINE Codes with_sign(Codes x, Codes w) { return _mm256_sign_epi8(x, w); }
#endif

constexpr bool kSignedBytes = true;
template <class Format, int I, int Count>
PUNA_INLINE void multiply_codes(Dots& dots, Dots& partial, Codes w, Codes x) {
  constexpr int kMostPair = 2 * 127 * (kIsBytes<Format> ? 128 : kMostValue<Format>);
  static_assert(kMostPair <= 32767);
  constexpr int kFit = 32767 / kMostPair;
  constexpr int kBatch = kFit >= 8 ? 8 : kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
  Dots pairs;
  if constexpr (kIsBytes<Format>)
    pairs = pairs_of(magnitude(w), with_sign(x, w));
  else
    pairs = pairs_of(w, x);
  partial = I % kBatch == 0 ? pairs : in_order(add_words(partial, pairs));
  if constexpr (I % kBatch == kBatch - 1 || I == Count - 1) {
    dots = add_dots(dots, dots_of_pairs(partial));
    // Batches of one are many: a tree of them does not fit the registers of AVX2 and passes through
    // memory (11 % slower on Zen 3).
    if constexpr (kBatch == 1 && kCodeRows == 8) dots = in_order(dots);
  }
}

#endif

template <class Format>
constexpr bool kIsSigned = kIsBytes<Format> && kSignedBytes;

// The largest tile of a product with many rows: its sums, the weights of a step and a few more
// registers must fit those of the machine.
#if defined(__AVX512VNNI__) || defined(__ARM_NEON)
constexpr int kTileRows = 4, kTileVectors = 4;
#else
constexpr int kTileRows = 4, kTileVectors = 2;
#endif

}  // namespace
}  // namespace puna

#endif  // the instruction set has dot products
