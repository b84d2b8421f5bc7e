// The codes of sealed pages and their products with 16-bit words, for one instruction set.
//
// A vector of codes holds 4 bytes of each of several rows (tokens of keys, channels of values); its
// even and odd bytes, widened to 16 bits, are multiplied with two words each and added in pairs.
// Hence the order of words: of every four, 0, 2, 1, 3.
#pragma once

#include "kernels/cpu/quantized-dot-inl.h"
#include "kernels/kernel_table.h"

namespace puna {
namespace {

#if defined(PUNA_DOT)

// Vectors of one line of 32 rows.
constexpr int kLineVectors = static_cast<int>(32 / VF::N);

// The largest tile: its sums, four vectors of codes and a few more registers must fit the machine.
#if defined(__AVX512F__)
constexpr int kSealedRows = 10, kGroupVectors = 2;
#else
constexpr int kSealedRows = 2, kGroupVectors = 1;
#endif

// multiply_words(sums, codes, words): two products of 16 bits each, added to the sum of their row.
#if defined(__AVX512F__)

PUNA_INLINE Codes even_bytes(Codes a) { return _mm512_and_si512(a, _mm512_set1_epi16(0xff)); }
PUNA_INLINE Codes odd_bytes(Codes a) { return _mm512_srli_epi16(a, 8); }
// The upper four bits of every byte of a, the lower four of b.
PUNA_INLINE Codes halves_of(Codes a, Codes b) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi8(static_cast<char>(0xf0)), a, b, 0xca);
}
template <int Bits>
PUNA_INLINE Codes left(Codes a) {
  return _mm512_slli_epi16(a, Bits);
}
template <int Bits>
PUNA_INLINE Codes right(Codes a) {
  return _mm512_srli_epi16(a, Bits);
}
PUNA_INLINE Codes two_words(const int16_t* p) {
  int32_t two;
  __builtin_memcpy(&two, p, sizeof(two));
  return _mm512_set1_epi32(two);
}
PUNA_INLINE void multiply_words(Dots& sums, Codes codes, Codes words) {
#if defined(__AVX512VNNI__)
  sums = _mm512_dpwssd_epi32(sums, codes, words);
#else
  sums = _mm512_add_epi32(sums, _mm512_madd_epi16(codes, words));
#endif
}
// Whole numbers as words, in their order; their int32 form is returned.
PUNA_INLINE Dots store_words(int16_t* p, VF a) {
  const __m512i whole = _mm512_cvtps_epi32(a.v);
  const __m256i words = _mm512_cvtepi32_epi16(whole);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xd8), 0xd8));
  return whole;
}

#elif defined(__AVX2__)

PUNA_INLINE Codes even_bytes(Codes a) { return _mm256_and_si256(a, _mm256_set1_epi16(0xff)); }
PUNA_INLINE Codes odd_bytes(Codes a) { return _mm256_srli_epi16(a, 8); }
PUNA_INLINE Codes halves_of(Codes a, Codes b) {
  const __m256i upper = _mm256_set1_epi8(static_cast<char>(0xf0));
  return _mm256_or_si256(_mm256_and_si256(upper, a), _mm256_andnot_si256(upper, b));
}
template <int Bits>
PUNA_INLINE Codes left(Codes a) {
  return _mm256_slli_epi16(a, Bits);
}
template <int Bits>
PUNA_INLINE Codes right(Codes a) {
  return _mm256_srli_epi16(a, Bits);
}
PUNA_INLINE Codes two_words(const int16_t* p) {
  int32_t two;
  __builtin_memcpy(&two, p, sizeof(two));
  return _mm256_set1_epi32(two);
}
PUNA_INLINE void multiply_words(Dots& sums, Codes codes, Codes words) {
#if defined(__AVXVNNI__)
  sums = _mm256_dpwssd_avx_epi32(sums, codes, words);
#else
  sums = _mm256_add_epi32(sums, _mm256_madd_epi16(codes, words));
#endif
}
PUNA_INLINE Dots store_words(int16_t* p, VF a) {
  const __m256i whole = _mm256_cvtps_epi32(a.v);
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_shufflehi_epi16(_mm_shufflelo_epi16(words, 0xd8), 0xd8));
  return whole;
}

#else  // NEON

PUNA_INLINE Codes even_bytes(Codes a) {
  return vreinterpretq_u8_u16(vandq_u16(vreinterpretq_u16_u8(a), vdupq_n_u16(0xff)));
}
PUNA_INLINE Codes odd_bytes(Codes a) {
  return vreinterpretq_u8_u16(vshrq_n_u16(vreinterpretq_u16_u8(a), 8));
}
PUNA_INLINE Codes halves_of(Codes a, Codes b) { return vbslq_u8(vdupq_n_u8(0xf0), a, b); }
template <int Bits>
PUNA_INLINE Codes left(Codes a) {
  return vreinterpretq_u8_u16(vshlq_n_u16(vreinterpretq_u16_u8(a), Bits));
}
template <int Bits>
PUNA_INLINE Codes right(Codes a) {
  return vreinterpretq_u8_u16(vshrq_n_u16(vreinterpretq_u16_u8(a), Bits));
}
PUNA_INLINE Codes two_words(const int16_t* p) {
  int32_t two;
  __builtin_memcpy(&two, p, sizeof(two));
  return vreinterpretq_u8_s32(vdupq_n_s32(two));
}
PUNA_INLINE void multiply_words(Dots& sums, Codes codes, Codes words) {
  const int16x8_t a = vreinterpretq_s16_u8(codes), b = vreinterpretq_s16_u8(words);
  sums = vaddq_s32(sums,
                   vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b)));
}
PUNA_INLINE Dots store_words(int16_t* p, VF a) {
  const int32x4_t whole = vcvtnq_s32_f32(a.v);
  const int32x4_t ordered =
      vcombine_s32(vget_low_s32(vuzp1q_s32(whole, whole)), vget_low_s32(vuzp2q_s32(whole, whole)));
  vst1_s16(p, vmovn_s32(ordered));
  return whole;
}

#endif

// words = numbers * factor, to the nearest; returns their sum.
PUNA_INLINE int32_t store_words(int16_t* words, const float* numbers, int64_t count, float factor) {
  Dots sum = same_dots(0);
  for (int64_t i = 0; i < count; i += VF::N)
    sum = add_dots(sum, store_words(words + i, load(numbers + i) * set1(factor)));
  return sum_of(sum);
}

// Sources of codes; a step takes kLines lines of 128 bytes: kWords vectors of two 16-bit codes of
// each row, `at` bytes into them. A line of 4 bits has first the four codes in the lower halves of
// its bytes, then those in the upper.
struct SealedFourBits {
  static constexpr int kLines = 1, kWords = 4;
  const uint8_t* codes;
  const uint8_t* unused = nullptr;
  PUNA_INLINE_MEMBER void load(Codes (&w)[kWords], int64_t at) const {
    const Codes both = load_codes(codes + at);
    const Codes first = bits_of<0, 4, 0>(both), second = bits_of<4, 4, 0>(both);
    w[0] = even_bytes(first);
    w[1] = odd_bytes(first);
    w[2] = even_bytes(second);
    w[3] = odd_bytes(second);
  }
};
struct SealedTwoPlanes {
  static constexpr int kLines = 2, kWords = 4;
  const uint8_t *upper, *lower;
  PUNA_INLINE_MEMBER void load(Codes (&w)[kWords], int64_t at) const {
    const Codes high = load_codes(upper + at), low = load_codes(lower + at);
    const Codes first = halves_of(left<4>(high), low), second = halves_of(high, right<4>(low));
    w[0] = even_bytes(first);
    w[1] = odd_bytes(first);
    w[2] = even_bytes(second);
    w[3] = odd_bytes(second);
  }
};
struct SealedBytes {
  static constexpr int kLines = 1, kWords = 2;
  const uint8_t* codes;
  PUNA_INLINE_MEMBER void load(Codes (&w)[kWords], int64_t at) const {
    const Codes all = load_codes(codes + at);
    w[0] = even_bytes(all);
    w[1] = odd_bytes(all);
  }
};

// Sums of one line's 32 rows for some rows of words.
template <int Rows>
struct CodeSums {
  Dots dots[Rows][kLineVectors];

  PUNA_INLINE_MEMBER void start(int r, int32_t value) {
#pragma GCC unroll 32
    for (int v = 0; v < kLineVectors; ++v) dots[r][v] = same_dots(value);
  }
  // A pair of words is loaded once for the vectors of a group; not more pairs at a time, or they
  // would drive the sums out of the registers.
  template <class Source>
  PUNA_INLINE_MEMBER void add(const Source& source, int64_t at, const int16_t* words,
                              int64_t stride) {
#pragma GCC unroll 32
    for (int first = 0; first < kLineVectors; first += kGroupVectors) {
      Codes codes[kGroupVectors][Source::kWords];
#pragma GCC unroll 4
      for (int v = 0; v < kGroupVectors; ++v) source.load(codes[v], at + (first + v) * VF::N * 4);
#pragma GCC unroll 4
      for (int i = 0; i < Source::kWords; ++i) {
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
          const Codes pair = two_words(words + r * stride + 2 * i);
#pragma GCC unroll 4
          for (int v = 0; v < kGroupVectors; ++v)
            multiply_words(dots[r][first + v], codes[v][i], pair);
        }
      }
      asm volatile("" ::: "memory");
    }
  }
};

#else  // plain

constexpr int kLineVectors = 32;
constexpr int kSealedRows = 1;

PUNA_INLINE VF to_float(int32_t a) { return {static_cast<float>(a)}; }

PUNA_INLINE int32_t store_words(int16_t* words, const float* numbers, int64_t count, float factor) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float whole = nearest({numbers[i] * factor}).v;
    words[i] = whole == whole ? static_cast<int16_t>(whole) : int16_t{0};
    sum += words[i];
  }
  return sum;
}

// Sources of codes: code(at, row, i) is the i-th of row `row` of the line that begins at `at`.
struct SealedFourBits {
  static constexpr int kLines = 1, kWords = 4;
  const uint8_t* codes;
  const uint8_t* unused = nullptr;
  int32_t code(int64_t at, int64_t row, int i) const {
    return codes[at + row * 4 + i % 4] >> (i / 4 * 4) & 15;
  }
};
struct SealedTwoPlanes {
  static constexpr int kLines = 2, kWords = 4;
  const uint8_t *upper, *lower;
  int32_t code(int64_t at, int64_t row, int i) const {
    const int64_t byte = at + row * 4 + i % 4;
    const int shift = i / 4 * 4;
    return (upper[byte] >> shift & 15) << 4 | (lower[byte] >> shift & 15);
  }
};
struct SealedBytes {
  static constexpr int kLines = 1, kWords = 2;
  const uint8_t* codes;
  int32_t code(int64_t at, int64_t row, int i) const { return codes[at + row * 4 + i]; }
};

template <int Rows>
struct CodeSums {
  int32_t dots[Rows][kLineVectors];

  void start(int r, int32_t value) {
    for (int32_t& dot : dots[r]) dot = value;
  }
  template <class Source>
  void add(const Source& source, int64_t at, const int16_t* words, int64_t stride) {
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < kLineVectors; ++v)
        for (int i = 0; i < 2 * Source::kWords; ++i)
          dots[r][v] += source.code(at, v, i) * words[r * stride + i];
  }
};

#endif

struct SealedInt8 {
  static constexpr int kPlanes = 2, kTokens = 4, kCentre = 128;  // kTokens: in a line of values
  using Keys = SealedTwoPlanes;
  using Values = SealedBytes;
};
struct SealedInt4 {
  static constexpr int kPlanes = 1, kTokens = 8, kCentre = 8;
  using Keys = SealedFourBits;
  using Values = SealedFourBits;
};

}  // namespace
}  // namespace puna
