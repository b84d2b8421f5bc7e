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
  using Layout = PanelLayout<Format>;
  constexpr int64_t kBlock = Format::kBlock, kGroup = Format::kGroup;
  constexpr int64_t kBlocks = kBlock < kActivationGroup ? kActivationGroup / kBlock : 1;
  for (int64_t n = 0; n < width; ++n) {
    for (int64_t r = 0; r < rows; ++r) out[r * out_stride + n] = 0.0f;
    for (int64_t first = 0; first < x.cols; first += kActivationGroup) {
      const int64_t end = first + kActivationGroup < x.cols ? first + kActivationGroup : x.cols;
      RowBlock blocks[kBlocks];
      for (int64_t c = first; c < end; c += kBlock)
        get_row_block<Format>(static_cast<const uint8_t*>(panel) + c / kBlock * Layout::kBytes, n,
                              &blocks[c / kBlock % kBlocks]);
      for (int64_t r = 0; r < rows; ++r) {
        float part = 0;
        for (int64_t c = first; c < end; c += kGroup) {
          const RowBlock& w = blocks[c / kBlock % kBlocks];
          const int64_t at = c % kBlock;
          int32_t dot = 0;
          for (int64_t i = 0; i < kGroup; ++i)
            dot += x.codes[r * x.cols + c + i] * code_value<Format>(w.codes[at + i]);
          part = __builtin_fmaf(static_cast<float>(dot), group_scale<Format>(w, at / kGroup), part);
          if constexpr (Format::kOffset) {
            const auto codes_sum = static_cast<float>(x.sums[r * x.groups + c / kGroup]);
            part = __builtin_fmaf(group_offset<Format>(w, at / kGroup), codes_sum, part);
          }
        }
        float& sum = out[r * out_stride + n];
        sum = __builtin_fmaf(part, x.scales[r * x.spans + first / kActivationGroup], sum);
      }
    }
    if (bias)
      for (int64_t r = 0; r < rows; ++r) out[r * out_stride + n] += bias[n];
  }
}

[[maybe_unused]] void quantize_row_plain(int8_t* codes, float* scales, int32_t* sums,
                                         const float* x, int64_t cols, int64_t padded,
                                         int64_t group) {
  for (int64_t first = 0; first < padded; first += kActivationGroup) {
    const int64_t end = first + kActivationGroup < padded ? first + kActivationGroup : padded;
    float largest = 0, poison = 0;
    for (int64_t c = first; c < end && c < cols; ++c) {
      const float magnitude = __builtin_fabsf(x[c]);
      largest = magnitude > largest ? magnitude : largest;
      poison += x[c] * 0.0f;  // NaN if x[c] is not finite
    }
    const bool zeros = largest < 0x1p-100f;
    const float inverse = zeros || !(poison == 0) ? 0.0f : 127.0f / largest;
    for (int64_t c = first; c < end; ++c) {
      codes[c] = c < cols && inverse > 0 ? static_cast<int8_t>(__builtin_rintf(x[c] * inverse)) : 0;
      if (c % group == 0) sums[c / group] = 0;
      sums[c / group] += codes[c];
    }
    scales[first / kActivationGroup] = (zeros ? 0.0f : largest / 127.0f) + poison;
  }
}

}  // namespace
}  // namespace puna
