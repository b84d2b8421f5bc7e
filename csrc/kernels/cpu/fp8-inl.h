// Products of fp32 activations with one packed panel of fp8 weights (quant/fp8.h).
//
// The codes are widened by way of fp16, whose bits an e4m3 code fills from the top: that gives the
// code's value times 2^-8, exactly, subnormal ones included and whatever the processor does with
// denormal floats. The row's scale makes up for the factor at the end.
#pragma once

#include "base/float8.h"
#include "kernels/cpu/tile-inl.h"
#include "quant/fp8.h"

namespace puna {
namespace {

constexpr float kE4M3Factor = 256.0f;  // by which load_e4m3 falls short

// The values of 2 VF::N codes, none of them not-a-number, times 2^-8. A code's sign goes to the top
// bit and, since the byte is widened as signed, to the next one, where it is cleared.
struct Fp8Values {
  VF first, second;
};
PUNA_INLINE Fp8Values load_e4m3(const uint8_t* p) {
#if defined(__AVX512F__)
  const __m512i words =
      _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const __m512i halves = _mm512_and_si512(_mm512_slli_epi16(words, 7),
                                          _mm512_set1_epi16(static_cast<int16_t>(0xbfff)));
  return {{_mm512_cvtph_ps(_mm512_castsi512_si256(halves))},
          {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))}};
#elif defined(__AVX2__)
  const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(words, 7),
                                          _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
  return {{_mm256_cvtph_ps(_mm256_castsi256_si128(halves))},
          {_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))}};
#elif defined(__ARM_NEON) && !defined(PUNA_ISA_SCALAR)
  const int16x8_t words = vmovl_s8(vreinterpret_s8_u8(vld1_u8(p)));
  const float16x8_t halves = vreinterpretq_f16_u16(
      vandq_u16(vreinterpretq_u16_s16(vshlq_n_s16(words, 7)), vdupq_n_u16(0xbfff)));
  return {{vcvt_f32_f16(vget_low_f16(halves))}, {vcvt_f32_f16(vget_high_f16(halves))}};
#else
  return {{float_of_e4m3(p[0]) / kE4M3Factor}, {float_of_e4m3(p[1]) / kE4M3Factor}};
#endif
}

// One step of a sum. Fused without vectors too, so that all instruction sets give the same bits.
struct Fp8Product : F32Product {
  PUNA_INLINE VF accumulate(VF total, VF w, VF x) {
    if constexpr (kLanes == 1)
      return set1(__builtin_fmaf(lane(w), lane(x), lane(total)));
    else
      return fma(w, x, total);
  }
  PUNA_INLINE float lane(VF a) {
    float value[kLanes];
    store(value, a);
    return value[0];
  }
};

// Few rows: the codes are widened in registers. sums[Rows][kPanelRows] = x * w^T.
template <int Rows>
void multiply_few_fp8(float* sums, const float* x, int64_t x_stride, const uint8_t* codes,
                      int64_t cols) {
  // One row takes the whole width of the panel at once: memory is then read strictly in order.
  constexpr int kVectors = Rows == 1 && kLanes > 1 ? static_cast<int>(kPanelRows / kLanes)
                           : kLanes == 8           ? (Rows <= 2 ? 4 : 2)
                                                   : 4;
  for (int64_t column = 0; column < kPanelRows; column += kVectors * kLanes) {
    VF tile[Rows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) tile[r][v] = set1(0.0f);
    }
    for (int64_t k = 0; k < cols; ++k) {
      const uint8_t* w = codes + k * kPanelRows + column;
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; v += 2) {
        const Fp8Values values = load_e4m3(w + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const VF one = set1(x[r * x_stride + k]);
          tile[r][v] = Fp8Product::accumulate(tile[r][v], values.first, one);
          tile[r][v + 1] = Fp8Product::accumulate(tile[r][v + 1], values.second, one);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v)
        store(sums + r * kPanelRows + column + v * kLanes, tile[r][v]);
    }
  }
}

template <int Rows = Fp8Product::kRows>
void multiply_few_fp8(int64_t rows, float* sums, const float* x, int64_t x_stride,
                      const uint8_t* codes, int64_t cols) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return multiply_few_fp8<Rows - 1>(rows, sums, x, x_stride, codes, cols);
  }
  multiply_few_fp8<Rows>(sums, x, x_stride, codes, cols);
}

// Many rows: the codes are widened once. sums[rows][kPanelRows] += x * chunk^T, rows <= Rows.
template <int Rows = Fp8Product::kRows>
void multiply_chunk_fp8(int64_t rows, float* sums, const float* x, int64_t x_stride,
                        const float* chunk, int64_t cols) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return multiply_chunk_fp8<Rows - 1>(rows, sums, x, x_stride, chunk, cols);
  }
  constexpr int kVectors = Fp8Product::kVectors;
  for (int64_t column = 0; column < kPanelRows; column += kVectors * kLanes)
    multiply_tile<Fp8Product, Rows, kVectors>(sums + column, kPanelRows, x, x_stride,
                                              chunk + column, {kPanelRows, kLanes}, cols);
}

// A chunk of columns, widened (64 KiB), stays in the second cache while a block of rows passes,
// whose sums (24 KiB) wait on the stack between chunks.
constexpr int64_t kFp8ChunkCols = 256, kFp8RowBlock = 96;

[[maybe_unused]] void gemm_fp8(float* out, int64_t out_stride, const float* x, int64_t x_stride,
                               const void* panel, const float* bias, int64_t rows, int64_t cols,
                               int64_t width) {
  const auto* scales = static_cast<const float*>(panel);
  const uint8_t* codes = static_cast<const uint8_t*>(panel) + kFp8ScaleBytes;
  alignas(64) float sums[kFp8RowBlock * kPanelRows];
  alignas(64) float chunk[kFp8ChunkCols * kPanelRows];
  for (int64_t first = 0; first < rows; first += kFp8RowBlock) {
    const int64_t count = rows - first < kFp8RowBlock ? rows - first : kFp8RowBlock;
    const float* block = x + first * x_stride;
    if (count <= Fp8Product::kRows) {
      multiply_few_fp8(count, sums, block, x_stride, codes, cols);
    } else {
      for (int64_t i = 0; i < count * kPanelRows; ++i) sums[i] = 0.0f;
      for (int64_t column = 0; column < cols; column += kFp8ChunkCols) {
        const int64_t part = cols - column < kFp8ChunkCols ? cols - column : kFp8ChunkCols;
        for (int64_t i = 0; i < part * kPanelRows; i += 2 * kLanes) {
          const Fp8Values values = load_e4m3(codes + column * kPanelRows + i);
          store(chunk + i, values.first);
          store(chunk + i + kLanes, values.second);
        }
        for (int64_t row = 0; row < count; row += Fp8Product::kRows)
          multiply_chunk_fp8(count - row < Fp8Product::kRows ? count - row : Fp8Product::kRows,
                             sums + row * kPanelRows, block + row * x_stride + column, x_stride,
                             chunk, part);
      }
    }
    for (int64_t row = 0; row < count; ++row) {
      const float* from = sums + row * kPanelRows;
      float* to = out + (first + row) * out_stride;
      for (int64_t n = 0; n < width; ++n) {
        const float sum = from[n] * (scales[n] * kE4M3Factor);
        to[n] = bias ? sum + bias[n] : sum;
      }
    }
  }
}

}  // namespace
}  // namespace puna
