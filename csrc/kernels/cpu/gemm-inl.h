// Products of activations with one packed panel of weights: gemm_f32 and gemm_bf16.
#pragma once

#include "kernels/cpu/tile-inl.h"

namespace puna {
namespace {

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

// out = sums[rows][kPanelRows] + bias, `width` columns of it.
[[maybe_unused]] void store_rows(float* out, int64_t out_stride, const float* sums,
                                 const float* bias, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = sums + row * kPanelRows;
    float* to = out + row * out_stride;
    for (int64_t n = 0; n < width; ++n) to[n] = bias ? from[n] + bias[n] : from[n];
  }
}

// --- many rows ----------------------------------------------------------------------------------
//
// Blocks after Goto and van de Geijn (2008), with Product::Blocked doing the arithmetic. kBlockCols
// columns of kRowBlock rows of activations are copied (102 KiB of fp32: in the second cache) and
// multiplied with kStripPanels panels; of each, the weights of one tile's width are copied in turn
// (16 KiB: half of the first cache). The copies widen bfloat16 where the processor cannot multiply
// it, once for many uses, and lie where they do not compete for the same lines of the cache, as
// rows of a power-of-two length would. Sums (96 KiB) wait between blocks.
constexpr int64_t kBlockCols = 256, kRowBlock = 96;

template <class Product>
struct Blocks {
  using Blocked = typename Product::Blocked;
  using X = typename Blocked::X;
  using W = typename Blocked::W;
  static constexpr int64_t kSteps = kBlockCols / Blocked::kDepth;
  static constexpr int64_t kTileCols = Blocked::kVectors * kLanes;
  static constexpr int64_t kStep = kTileCols * Blocked::kDepth;  // of `w`, in elements
  // A row of a block and one line of cache.
  static constexpr int64_t kRowStride = kBlockCols + 64 / static_cast<int64_t>(sizeof(X));

  alignas(64) X x[kRowBlock * kRowStride];
  alignas(64) W w[kSteps * kStep];
  alignas(64) float sums[kStripPanels][kRowBlock * kPanelRows];
};

// sums[Rows][kTileCols] += x * w over `steps` steps of a block.
template <class Product, int Rows = Product::Blocked::kRows>
void multiply_block(int64_t rows, float* sums, const typename Product::Blocked::X* x,
                    const typename Product::Blocked::W* w, int64_t steps) {
  using B = Blocks<Product>;
  if constexpr (Rows > 1) {
    if (rows < Rows) return multiply_block<Product, Rows - 1>(rows, sums, x, w, steps);
  }
  constexpr int kVectors = Product::Blocked::kVectors;
  multiply_tile<typename Product::Blocked, Rows, kVectors>(
      sums, kPanelRows, x, B::kRowStride, w, {B::kStep, kLanes * Product::Blocked::kDepth}, steps);
}

// The weights of one tile's width in `count` columns of a panel.
template <class W>
struct TileWeights {
  const W* from;
  int64_t count;
};

// Part `part` of `parts` of a strip on its way into the second cache.
template <class Product>
PUNA_INLINE void prefetch(TileWeights<typename Product::W> strip, int64_t part, int64_t parts) {
  constexpr int64_t kStepBytes = kPanelRows * Product::kDepth * sizeof(typename Product::W);
  constexpr int64_t kStripBytes =
      Blocks<Product>::kTileCols * Product::kDepth * sizeof(typename Product::W);
  const int64_t steps = strip.count / Product::kDepth;
  const auto* bytes = reinterpret_cast<const char*>(strip.from);
  for (int64_t step = steps * part / parts; step < steps * (part + 1) / parts; ++step) {
    for (int64_t at = 0; at < kStripBytes; at += 64) {
      __builtin_prefetch(bytes + step * kStepBytes + at, 0, 2);
    }
  }
}

template <class Product>
void gemm_many(float* out, int64_t out_stride, const typename Product::X* x, int64_t x_stride,
               const typename Product::W* weights, const float* bias, int64_t rows, int64_t cols,
               int64_t width) {
  using B = Blocks<Product>;
  constexpr int64_t kTileRows = Product::Blocked::kRows;
  constexpr int64_t kTiles = kPanelRows / B::kTileCols;
  const int64_t padded = (cols + Product::kDepth - 1) / Product::kDepth * Product::kDepth;
  const int64_t panels = (width + kPanelRows - 1) / kPanelRows;
  // Blocks of one size, but for what whole tiles leave to the last.
  const int64_t row_blocks = (rows + kRowBlock - 1) / kRowBlock;
  const int64_t most_rows =
      ((rows + row_blocks - 1) / row_blocks + kTileRows - 1) / kTileRows * kTileRows;
  B block;
  for (int64_t first = 0; first < rows; first += most_rows) {
    const int64_t block_rows = rows - first < most_rows ? rows - first : most_rows;
    const int64_t tiles = (block_rows + kTileRows - 1) / kTileRows;
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int64_t i = 0; i < block_rows * kPanelRows; ++i) block.sums[panel][i] = 0.0f;
    }
    for (int64_t col = 0; col < padded; col += kBlockCols) {
      const int64_t count = padded - col < kBlockCols ? padded - col : kBlockCols;
      for (int64_t row = 0; row < block_rows; ++row) {
        Product::copy_row(block.x + row * B::kRowStride, x + (first + row) * x_stride + col, count);
      }
      const auto strip_at = [&](int64_t strip) -> TileWeights<typename Product::W> {
        const int64_t panel = strip / kTiles, column = strip % kTiles * B::kTileCols;
        if (panel == panels) {  // the next block's first
          const int64_t next = col + kBlockCols;
          if (next >= padded) return {weights, 0};
          return {weights + next * kPanelRows,
                  padded - next < kBlockCols ? padded - next : kBlockCols};
        }
        return {weights + (panel * padded + col) * kPanelRows + column * Product::kDepth, count};
      };
      for (int64_t strip = 0; strip < panels * kTiles; ++strip) {
        const TileWeights<typename Product::W> next = strip_at(strip + 1);
        Product::template copy_weights<B::kTileCols>(block.w, strip_at(strip).from, count);
        float* sums = block.sums[strip / kTiles] + strip % kTiles * B::kTileCols;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t row = tile * kTileRows, left = block_rows - row;
          prefetch<Product>(next, tile, tiles);
          multiply_block<Product>(left < kTileRows ? left : kTileRows, sums + row * kPanelRows,
                                  block.x + row * B::kRowStride, block.w,
                                  count / Product::Blocked::kDepth);
        }
      }
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t column = panel * kPanelRows;
      store_rows(out + first * out_stride + column, out_stride, block.sums[panel],
                 bias ? bias + column : nullptr, block_rows,
                 width - column < kPanelRows ? width - column : kPanelRows);
    }
  }
}

// --- few rows -----------------------------------------------------------------------------------

// Up to here rows are multiplied with the panel as it lies: it is read once, in order, and nothing
// is worth copying.
constexpr int64_t kFewRows = 8;

template <class Product>
void gemm_few(float* out, int64_t out_stride, const typename Product::X* x, int64_t x_stride,
              const typename Product::W* panel, const float* bias, int64_t rows, int64_t cols,
              int64_t width) {
  const int64_t steps = (cols + Product::kDepth - 1) / Product::kDepth;
  alignas(64) float sums[kFewRows * kPanelRows] = {};
  for (int64_t row = 0; row < rows; row += Product::kRows) {
    const int64_t left = rows - row;
    multiply_panel<Product>(left < Product::kRows ? left : Product::kRows, sums + row * kPanelRows,
                            x + row * x_stride, x_stride, panel, steps);
  }
  store_rows(out, out_stride, sums, bias, rows, width);
}

template <class Product>
void gemm(float* out, int64_t out_stride, const typename Product::X* x, int64_t x_stride,
          const typename Product::W* weights, const float* bias, int64_t rows, int64_t cols,
          int64_t width) {
  const int64_t panel_elements =
      (cols + Product::kDepth - 1) / Product::kDepth * Product::kDepth * kPanelRows;
  const int64_t group = rows > kFewRows ? kStripPanels : 1;
  for (int64_t column = 0; column < width; column += group * kPanelRows) {
    const int64_t left = width - column;
    const auto product = rows > kFewRows ? gemm_many<Product> : gemm_few<Product>;
    product(out + column, out_stride, x, x_stride, weights + column / kPanelRows * panel_elements,
            bias ? bias + column : nullptr, rows, cols,
            left < group * kPanelRows ? left : group * kPanelRows);
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
