// Quantised matrices from whatever a checkpoint holds.
#include <algorithm>
#include <vector>

#include "backend/cpu/pack.h"
#include "backend/source.h"
#include "base/half.h"
#include "quant/blocks.h"
#include "quant/encode.h"
#include "quant/repack.h"

namespace puna {
namespace {

// What a lane takes at once: panels by columns, a whole number of blocks of every type. Of a
// transposed source it reads 512 rows (1 KiB of bfloat16) in a row, since shorter runs waste most
// of each page of memory. So many columns of a panel of four or six bits fit L1, and of a row they
// are some lines of memory; of those that are decoded, half as many are at once.
constexpr int64_t kTilePanels = 8, kTileCols = 512, kDecodedCols = 256;
constexpr int64_t kTileRows = kTilePanels * kPanelRows;

template <class Format>
void encode_tile(const MatrixSource& part, int64_t base, int64_t row, int64_t rows, int64_t col,
                 int64_t cols, const float* importance, WeightFormat format, float* values,
                 uint8_t* packed) {
  using Layout = PanelLayout<Format>;
  const size_t panel = panel_bytes(format, part.cols);
  read_elements(part, row, rows, col, cols, values, kDecodedCols);
  RowBlock block{};
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t place = base + row + r;
    uint8_t* to = packed + static_cast<size_t>(place / kPanelRows) * panel +
                  col / Format::kBlock * Layout::kBytes;
    for (int64_t c = 0; c < cols; c += Format::kBlock, to += Layout::kBytes) {
      encode_block(format, values + r * kDecodedCols + c,
                   importance ? importance + col + c : nullptr, std::min(Format::kBlock, cols - c),
                   &block);
      put_row_block<Format>(to, place % kPanelRows, block);
    }
  }
}

// Of a part that is stored in the blocked type of the same format.
template <class Format>
void repack_tile(const MatrixSource& part, int64_t base, int64_t row, int64_t rows, int64_t col,
                 int64_t cols, WeightFormat format, uint8_t* packed) {
  using Layout = PanelLayout<Format>;
  const size_t panel = panel_bytes(format, part.cols);
  const auto* from =
      static_cast<const uint8_t*>(part.data) + bytes_of(part.dtype, row * part.row_stride + col);
  const size_t stride = bytes_of(part.dtype, part.row_stride), bytes = bytes_of(part.dtype, cols);
  // A row's few lines are too short a run for the processor to see it coming.
  constexpr int64_t kAhead = 12;
  for (int64_t r = 0; r < rows; ++r, from += stride) {
    if (r + kAhead < rows)
      for (size_t line = 0; line < bytes; line += 64)
        __builtin_prefetch(from + kAhead * stride + line);
    const int64_t place = base + row + r;
    repack_blocks(part.dtype, from, cols / Format::kBlock, place % kPanelRows,
                  packed + static_cast<size_t>(place / kPanelRows) * panel +
                      col / Format::kBlock * Layout::kBytes);
  }
}

}  // namespace

void pack_quantized(ThreadPool& pool, std::span<const MatrixSource> parts, const MatrixShape& shape,
                    WeightFormat format, const float* importance, void* packed) {
  const int64_t spans = (shape.cols + kTileCols - 1) / kTileCols;
  const int64_t groups = (shape.rows + kTileRows - 1) / kTileRows;
  TileCounter counter;
  pool.run([&](Lane&) {
    std::vector<float> values;  // of a tile, where some are decoded
    for (int64_t tile; (tile = counter.next()) < groups * spans;) {
      const int64_t begin = tile / spans * kTileRows, col = tile % spans * kTileCols;
      const int64_t cols = std::min(kTileCols, shape.cols - col);
      int64_t base = 0;
      for (const MatrixSource& part : parts) {
        const int64_t row = std::max<int64_t>(0, begin - base);
        const int64_t end = std::min(part.rows, begin + kTileRows - base);
        if (row < end)
          with_traits(format, [&](auto traits) {
            using Format = decltype(traits);
            auto* to = static_cast<uint8_t*>(packed);
            if (exact_format(part.dtype) == format)
              return repack_tile<Format>(part, base, row, end - row, col, cols, format, to);
            values.resize(static_cast<size_t>(kTileRows * kDecodedCols));
            for (int64_t c = 0; c < cols; c += kDecodedCols)
              encode_tile<Format>(part, base, row, end - row, col + c,
                                  std::min(kDecodedCols, cols - c), importance, format,
                                  values.data(), to);
          });
        base += part.rows;
      }
    }
  });
}

}  // namespace puna
