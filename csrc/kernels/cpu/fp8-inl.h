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

// The values of VF::N codes, none of them not-a-number, times 2^-8. The code's sign goes to the top
// bit and, since the byte is widened as signed, to the next one, where it is cleared.
PUNA_INLINE VF load_e4m3(const uint8_t* p) {
#if defined(__AVX512F__)
  const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(words, 7),
                                           _mm256_set1_epi16(static_cast<int16_t>(0xbfff))))};
#elif defined(__AVX2__)
  const __m128i words = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_cvtph_ps(
      _mm_and_si128(_mm_slli_epi16(words, 7), _mm_set1_epi16(static_cast<int16_t>(0xbfff))))};
#elif defined(__ARM_NEON) && !defined(PUNA_ISA_SCALAR)
  uint32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  const int16x4_t words = vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four))));
  const uint16x4_t halves =
      vand_u16(vreinterpret_u16_s16(vshl_n_s16(words, 7)), vdup_n_u16(0xbfff));
  return {vcvt_f32_f16(vreinterpret_f16_u16(halves))};
#else
  return {float_of_e4m3(*p) / kE4M3Factor};
#endif
}

// Many rows: the codes are widened once. Fused without vectors too, so that all give the same bits.
struct WidenedFp8Product : F32Product {
  PUNA_INLINE VF accumulate(VF total, Weights w, Values x) {
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
// Few rows: the codes are widened in registers.
struct Fp8Product : WidenedFp8Product {
  using W = uint8_t;
  PUNA_INLINE Weights weights(const W* w) { return load_e4m3(w); }
};

// sums[Rows][kPanelRows] += x * w^T over `cols` columns.
template <class Product, int Rows>
void multiply_fp8_rows(float* sums, const float* x, int64_t x_stride, const typename Product::W* w,
                       int64_t cols) {
  // One row takes the whole width of the panel at once: memory is then read strictly in order.
  constexpr int kVectors =
      Rows == 1 && kLanes > 1 ? static_cast<int>(kPanelRows / kLanes) : Product::kVectors;
  for (int64_t column = 0; column < kPanelRows; column += kVectors * kLanes)
    multiply_tile<Product, Rows, kVectors>(sums + column, kPanelRows, x, x_stride, w + column,
                                           {kPanelRows, kLanes}, cols);
}

template <class Product, int Rows = Product::kRows>
void multiply_fp8(int64_t rows, float* sums, const float* x, int64_t x_stride,
                  const typename Product::W* w, int64_t cols) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return multiply_fp8<Product, Rows - 1>(rows, sums, x, x_stride, w, cols);
  }
  multiply_fp8_rows<Product, Rows>(sums, x, x_stride, w, cols);
}

// Many rows: a chunk of columns, widened once (64 KiB), stays in the second cache while a block of
// rows passes, whose sums (24 KiB) wait on the stack between chunks.
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
    for (int64_t i = 0; i < count * kPanelRows; ++i) sums[i] = 0.0f;
    if (count <= Fp8Product::kRows) {
      multiply_fp8<Fp8Product>(count, sums, block, x_stride, codes, cols);
    } else {
      for (int64_t column = 0; column < cols; column += kFp8ChunkCols) {
        const int64_t part = cols - column < kFp8ChunkCols ? cols - column : kFp8ChunkCols;
        for (int64_t i = 0; i < part * kPanelRows; i += kLanes)
          store(chunk + i, load_e4m3(codes + column * kPanelRows + i));
        for (int64_t row = 0; row < count; row += WidenedFp8Product::kRows) {
          const int64_t tile =
              count - row < WidenedFp8Product::kRows ? count - row : WidenedFp8Product::kRows;
          multiply_fp8<WidenedFp8Product>(tile, sums + row * kPanelRows,
                                          block + row * x_stride + column, x_stride, chunk, part);
        }
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
