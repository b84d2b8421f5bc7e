// Products of quantised activations with one packed panel of quantised weights, and quantising of
// activations, element by element: the contract of kernel_table.h written down. The fast forms of
// quantized-inl.h give the same bits.
#pragma once

#include "kernels/kernel_table.h"
#include "quant/panel.h"

namespace puna {
namespace {

template <class Format>
[[maybe_unused]] void gemm_quantized_plain(float* out, int64_t out_stride, const QuantizedRows& x,
                                           const void* panel, const float* bias, int64_t rows,
                                           int64_t width) {
  const int64_t blocks = x.cols / Format::kBlock;
  for (int64_t n = 0; n < width; ++n) {
    for (int64_t r = 0; r < rows; ++r) out[r * out_stride + n] = 0.0f;
    for (int64_t b = 0; b < blocks; ++b) {
      RowBlock block;
      get_row_block<Format>(static_cast<const uint8_t*>(panel) + b * PanelLayout<Format>::kBytes, n,
                            &block);
      for (int64_t r = 0; r < rows; ++r) {
        float& sum = out[r * out_stride + n];
        for (int64_t g = 0; g < PanelLayout<Format>::kGroups; ++g) {
          const int64_t group = b * PanelLayout<Format>::kGroups + g;
          const int8_t* codes = x.codes + r * x.cols + group * Format::kGroup;
          const float scale = x.scales[r * x.groups + group];
          int32_t dot = 0;
          for (int64_t c = 0; c < Format::kGroup; ++c)
            dot += codes[c] * code_value<Format>(block.codes[g * Format::kGroup + c]);
          sum = __builtin_fmaf(static_cast<float>(dot), group_scale<Format>(block, g) * scale, sum);
          if constexpr (Format::kOffset) {
            const auto codes_sum = static_cast<float>(x.sums[r * x.groups + group]);
            sum = __builtin_fmaf(group_offset<Format>(block, g), scale * codes_sum, sum);
          }
        }
      }
    }
    if (bias)
      for (int64_t r = 0; r < rows; ++r) out[r * out_stride + n] += bias[n];
  }
}

[[maybe_unused]] void quantize_row_plain(int8_t* codes, float* scales, int32_t* sums,
                                         const float* x, int64_t cols, int64_t padded,
                                         int64_t group) {
  for (int64_t first = 0; first < padded; first += group) {
    float largest = 0, poison = 0;
    for (int64_t c = first; c < first + group && c < cols; ++c) {
      const float magnitude = __builtin_fabsf(x[c]);
      largest = magnitude > largest ? magnitude : largest;
      poison += x[c] * 0.0f;  // NaN if x[c] is not finite
    }
    const bool zeros = largest < 0x1p-100f;
    const float scale = (zeros ? 0.0f : largest / 127.0f) + poison;
    const float inverse = zeros || !(poison == 0) ? 0.0f : 127.0f / largest;
    int32_t sum = 0;
    for (int64_t c = first; c < first + group; ++c) {
      codes[c] = c < cols && inverse > 0 ? static_cast<int8_t>(__builtin_rintf(x[c] * inverse)) : 0;
      sum += codes[c];
    }
    scales[first / group] = scale;
    sums[first / group] = sum;
  }
}

}  // namespace
}  // namespace puna
