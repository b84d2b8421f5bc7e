// Products of activations with one packed panel of weights: gemm_f32 and gemm_bf16.
#pragma once

#include "kernels/cpu/tile-inl.h"

namespace puna {
namespace {

// Blocks of a product with many rows: kStepBlock steps of the panel (64 KiB) stay in the second
// cache while kRowBlock rows pass, whose sums (24 KiB) wait on the stack between blocks. Measured
// on Zen 4 for 512 rows and 5,120 or 8,192 columns; a quarter or four times as much costs 1 to 3 %.
constexpr int64_t kStepBlock = 256, kRowBlock = 96;

// sums[Rows][kPanelRows] += x * panel^T over `steps` steps.
template <class Product, int Rows>
void multiply_panel_rows(float* sums, const typename Product::X* x, int64_t x_stride,
                         const typename Product::W* panel, int64_t steps) {
  constexpr int64_t kStep = kPanelRows * Product::kDepth, kVector = kLanes * Product::kDepth;
  // One row takes the whole width of the panel at once: memory is then read strictly in order.
  constexpr int kVectors =
      Rows == 1 && kLanes > 1 ? static_cast<int>(kPanelRows / kLanes) : Product::kVectors;
  for (int64_t column = 0; column < kPanelRows; column += kVectors * kLanes) {
    multiply_tile<Product, Rows, kVectors>(sums + column, kPanelRows, x, x_stride,
                                           panel + column * Product::kDepth, {kStep, kVector},
                                           steps);
  }
}

// The same for any number of rows up to Product::kRows.
template <class Product, int Rows = Product::kRows>
void multiply_panel(int64_t rows, float* sums, const typename Product::X* x, int64_t x_stride,
                    const typename Product::W* panel, int64_t steps) {
  if constexpr (Rows > 1) {
    if (rows < Rows) {
      return multiply_panel<Product, Rows - 1>(rows, sums, x, x_stride, panel, steps);
    }
  }
  multiply_panel_rows<Product, Rows>(sums, x, x_stride, panel, steps);
}

template <class Product>
void gemm(float* out, int64_t out_stride, const typename Product::X* x, int64_t x_stride,
          const typename Product::W* panel, const float* bias, int64_t rows, int64_t cols,
          int64_t width) {
  const int64_t steps = (cols + Product::kDepth - 1) / Product::kDepth;
  alignas(64) float sums[kRowBlock * kPanelRows];
  for (int64_t first = 0; first < rows; first += kRowBlock) {
    const int64_t block_rows = rows - first < kRowBlock ? rows - first : kRowBlock;
    for (int64_t i = 0; i < block_rows * kPanelRows; ++i) sums[i] = 0.0f;
    // A single tile has no use for blocks: nothing is read twice.
    const int64_t block_steps = block_rows <= Product::kRows ? steps : kStepBlock;
    for (int64_t step = 0; step < steps; step += block_steps) {
      const int64_t count = steps - step < block_steps ? steps - step : block_steps;
      for (int64_t row = 0; row < block_rows; row += Product::kRows) {
        const int64_t tile_rows =
            block_rows - row < Product::kRows ? block_rows - row : Product::kRows;
        multiply_panel<Product>(tile_rows, sums + row * kPanelRows,
                                x + (first + row) * x_stride + step * Product::kDepth, x_stride,
                                panel + step * kPanelRows * Product::kDepth, count);
      }
    }
    for (int64_t row = 0; row < block_rows; ++row) {
      const float* from = sums + row * kPanelRows;
      float* to = out + (first + row) * out_stride;
      for (int64_t n = 0; n < width; ++n) to[n] = bias ? from[n] + bias[n] : from[n];
    }
  }
}

[[maybe_unused]] void gemm_f32(float* out, int64_t out_stride, const float* x, int64_t x_stride,
                               const float* panel, const float* bias, int64_t rows, int64_t cols,
                               int64_t width) {
  gemm<F32Product>(out, out_stride, x, x_stride, panel, bias, rows, cols, width);
}

[[maybe_unused]] void gemm_bf16(float* out, int64_t out_stride, const uint16_t* x, int64_t x_stride,
                                const uint16_t* panel, const float* bias, int64_t rows,
                                int64_t cols, int64_t width) {
  gemm<Bf16Product>(out, out_stride, x, x_stride, panel, bias, rows, cols, width);
}

}  // namespace
}  // namespace puna
