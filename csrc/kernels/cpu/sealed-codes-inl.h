// The codes of sealed pages and their products with 16-bit words, for one instruction set.
//
// A vector of codes holds 4 bytes of each of several rows (tokens of keys, channels of values).
// Where there are products of four bytes and registers enough (PUNA_LIMBS), a word is two signed
// bytes, each with sums of its own: of every four words there are first the upper bytes, then the
// lower. Elsewhere the even and the odd bytes of the codes, widened to 16 bits, are multiplied with
// two words each and added in pairs; hence the order of words: of every four, 0, 2, 1, 3.
#pragma once

#include "kernels/cpu/quantized-dot-inl.h"
#include "kernels/kernel_table.h"

namespace puna {
namespace {

#if defined(PUNA_DOT)

// Vectors of one line of 32 rows.
constexpr int kLineVectors = static_cast<int>(32 / VF::N);

// The largest tile: its sums (two of each with limbs), twice its vectors for codes and two more
// registers must fit the machine. Five rows are the query heads of one KV head in Scout and
// Maverick.
#if defined(__AVX512VNNI__)
#define PUNA_LIMBS
constexpr int kSealedRows = 5, kSealedVectors = 2;
#elif defined(__AVX512F__)
constexpr int kSealedRows = 10, kSealedVectors = 2;
#elif defined(__AVX2__)
constexpr int kSealedRows = 5, kSealedVectors = 2;
#else
constexpr int kSealedRows = 5, kSealedVectors = 4;
#endif

// multiply_words(sums, codes, words): two products of 16 bits each, added to the sum of their row.
// store_words(p, a): whole numbers as words, in their order; their int32 form is returned.
#if defined(__AVX512F__)

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
#if defined(PUNA_LIMBS)
// Four products of an unsigned and a signed byte. Written out: GCC moves the sums of a tile that
// fills the registers about otherwise, in memory too.
PUNA_INLINE void multiply_fours(Dots& sums, Codes codes, Codes bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(bytes));
}
// A word is 256 * upper + lower, both in [-128, 127].
PUNA_INLINE Dots store_words(int16_t* p, VF a) {
  const __m512i whole = _mm512_cvtps_epi32(a.v);
  // Of each number the lower byte of itself, and the upper one of what is half of 256 more.
  const __m512i bytes = _mm512_ternarylogic_epi32(
      _mm512_set1_epi32(0xff), whole, _mm512_add_epi32(whole, _mm512_set1_epi32(128)), 0xca);
  const __m512i fours = _mm512_shuffle_epi8(bytes, _mm512_set4_epi32(0, 0, 0x0c080400, 0x0d090501));
  const __m512i joined = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 0, 0, 0, 0), fours);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(joined));
  return whole;
}
#else
PUNA_INLINE Codes even_bytes(Codes a) { return _mm512_and_si512(a, _mm512_set1_epi16(0xff)); }
PUNA_INLINE Codes odd_bytes(Codes a) { return _mm512_srli_epi16(a, 8); }
PUNA_INLINE void multiply_words(Dots& sums, Codes codes, Codes words) {
  sums = in_order(_mm512_add_epi32(sums, _mm512_madd_epi16(codes, words)));
}
PUNA_INLINE Dots store_words(int16_t* p, VF a) {
  const __m512i whole = _mm512_cvtps_epi32(a.v);
  const __m256i words = _mm512_cvtepi32_epi16(whole);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xd8), 0xd8));
  return whole;
}
#endif

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
  sums = in_order(_mm256_dpwssd_avx_epi32(sums, codes, words));
#else
  sums = in_order(_mm256_add_epi32(sums, _mm256_madd_epi16(codes, words)));
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
  sums = in_order(vaddq_s32(
      sums, vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b))));
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

// Sources of codes; a step takes kLines lines of 128 bytes: kFours vectors of four codes of each
// row, of which four(i, at) is the i-th of the rows `at` bytes into them. A line of 4 bits has
// first the four codes in the lower halves of its bytes, then those in the upper.
struct SealedFourBits {
  static constexpr int kLines = 1, kFours = 2;
  const uint8_t* codes;
  const uint8_t* unused = nullptr;
  PUNA_INLINE_MEMBER Codes four(int i, int64_t at) const {
    const Codes both = load_codes(codes + at);
    return i == 0 ? bits_of<0, 4, 0>(both) : bits_of<4, 4, 0>(both);
  }
};
struct SealedTwoPlanes {
  static constexpr int kLines = 2, kFours = 2;
  const uint8_t *upper, *lower;
  PUNA_INLINE_MEMBER Codes four(int i, int64_t at) const {
    const Codes high = load_codes(upper + at), low = load_codes(lower + at);
    return i == 0 ? halves_of(left<4>(high), low) : halves_of(high, right<4>(low));
  }
};
struct SealedBytes {
  static constexpr int kLines = 1, kFours = 1;
  const uint8_t* codes;
  PUNA_INLINE_MEMBER Codes four(int, int64_t at) const { return load_codes(codes + at); }
};

// Sums of the rows of kSealedVectors vectors of a line for some rows of words.
#if defined(PUNA_LIMBS)
template <int Rows>
struct CodeSums {
  Dots upper[Rows][kSealedVectors], lower[Rows][kSealedVectors];

  PUNA_INLINE_MEMBER void start(int r, int32_t value) {
#pragma GCC unroll 2
    for (int v = 0; v < kSealedVectors; ++v) {
      upper[r][v] = in_place(same_dots(0));
      lower[r][v] = in_place(same_dots(value));
    }
  }
  PUNA_INLINE_MEMBER Dots total(int r, int v) const {
    return in_place(add_dots(lower[r][v], _mm512_slli_epi32(upper[r][v], 8)));
  }
  template <class Source>
  PUNA_INLINE_MEMBER void add(const Source& source, int64_t at, const int16_t* words,
                              int64_t stride) {
    Codes codes[kSealedVectors][Source::kFours];
#pragma GCC unroll 2
    for (int v = 0; v < kSealedVectors; ++v) {
#pragma GCC unroll 2
      for (int i = 0; i < Source::kFours; ++i) codes[v][i] = source.four(i, at + v * VF::N * 4);
    }
#pragma GCC unroll 2
    for (int i = 0; i < Source::kFours; ++i) {
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const int16_t* four = words + r * stride + 4 * i;
        const Codes high = two_words(four), low = two_words(four + 2);
#pragma GCC unroll 2
        for (int v = 0; v < kSealedVectors; ++v) {
          multiply_fours(upper[r][v], codes[v][i], high);
          multiply_fours(lower[r][v], codes[v][i], low);
        }
      }
    }
    asm volatile("" ::: "memory");
  }
};
#else
template <int Rows>
struct CodeSums {
  Dots dots[Rows][kSealedVectors];

  PUNA_INLINE_MEMBER void start(int r, int32_t value) {
#pragma GCC unroll 32
    for (int v = 0; v < kSealedVectors; ++v) dots[r][v] = same_dots(value);
  }
  PUNA_INLINE_MEMBER Dots total(int r, int v) const { return dots[r][v]; }
  template <class Source>
  PUNA_INLINE_MEMBER void add(const Source& source, int64_t at, const int16_t* words,
                              int64_t stride) {
#pragma GCC unroll 2
    for (int i = 0; i < Source::kFours; ++i) {
      Codes fours[kSealedVectors], codes[kSealedVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kSealedVectors; ++v) {
        fours[v] = source.four(i, at + v * VF::N * 4);
        codes[v] = even_bytes(fours[v]);
      }
      add_words(codes, words + 4 * i, stride);
#pragma GCC unroll 4
      for (int v = 0; v < kSealedVectors; ++v) codes[v] = odd_bytes(fours[v]);
      add_words(codes, words + 4 * i + 2, stride);
    }
  }
  // A pair of words is loaded once for all vectors. Not more pairs and codes at a time, or they
  // would drive the sums out of the registers.
  PUNA_INLINE_MEMBER void add_words(const Codes (&codes)[kSealedVectors], const int16_t* words,
                                    int64_t stride) {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Codes pair = two_words(words + r * stride);
#pragma GCC unroll 4
      for (int v = 0; v < kSealedVectors; ++v) multiply_words(dots[r][v], codes[v], pair);
    }
    asm volatile("" ::: "memory");
  }
};
#endif

#else  // plain

constexpr int kLineVectors = 32;
constexpr int kSealedRows = 1, kSealedVectors = 32;

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
  static constexpr int kLines = 1, kFours = 2;
  const uint8_t* codes;
  const uint8_t* unused = nullptr;
  int32_t code(int64_t at, int64_t row, int i) const {
    return codes[at + row * 4 + i % 4] >> (i / 4 * 4) & 15;
  }
};
struct SealedTwoPlanes {
  static constexpr int kLines = 2, kFours = 2;
  const uint8_t *upper, *lower;
  int32_t code(int64_t at, int64_t row, int i) const {
    const int64_t byte = at + row * 4 + i % 4;
    const int shift = i / 4 * 4;
    return (upper[byte] >> shift & 15) << 4 | (lower[byte] >> shift & 15);
  }
};
struct SealedBytes {
  static constexpr int kLines = 1, kFours = 1;
  const uint8_t* codes;
  int32_t code(int64_t at, int64_t row, int i) const { return codes[at + row * 4 + i]; }
};

template <int Rows>
struct CodeSums {
  int32_t dots[Rows][kSealedVectors];

  int32_t total(int r, int v) const { return dots[r][v]; }
  void start(int r, int32_t value) {
    for (int32_t& dot : dots[r]) dot = value;
  }
  template <class Source>
  void add(const Source& source, int64_t at, const int16_t* words, int64_t stride) {
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < kSealedVectors; ++v)
        for (int i = 0; i < 4 * Source::kFours; ++i)
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
