// Quantised matrices from whatever a checkpoint holds.
#include <algorithm>
#include <vector>

#include "backend/cpu/pack.h"
#include "backend/source.h"
#include "base/half.h"
#include "quant/blocks.h"
#include "quant/encode.h"

namespace puna {
namespace {

// What a lane takes at once: panels by columns, a whole number of blocks of every type. Of a
// transposed source it reads 512 rows (1 KiB of bfloat16) in a row, since shorter runs waste most
// of each page of memory.
constexpr int64_t kTilePanels = 8, kTileCols = 256;
constexpr int64_t kTileRows = kTilePanels * kPanelRows;

// One block of one row that is stored in the blocked type of the same format.
template <class Format>
void take_apart(const MatrixSource& part, int64_t row, int64_t col, RowBlock* to) {
  unpack_block(
      part.dtype,
      static_cast<const uint8_t*>(part.data) + bytes_of(part.dtype, row * part.row_stride + col),
      to);
}

template <class Format>
void pack_tile(const MatrixSource& part, int64_t base, int64_t row, int64_t rows, int64_t col,
               int64_t cols, const float* importance, WeightFormat format, float* values,
               uint8_t* packed) {
  using Layout = PanelLayout<Format>;
  const size_t panel = panel_bytes(format, part.cols);
  const bool exact = exact_format(part.dtype) == format;
  if (!exact) read_elements(part, row, rows, col, cols, values, kTileCols);
  RowBlock block{};
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t place = base + row + r;
    uint8_t* to = packed + static_cast<size_t>(place / kPanelRows) * panel +
                  col / Format::kBlock * Layout::kBytes;
    for (int64_t c = 0; c < cols; c += Format::kBlock, to += Layout::kBytes) {
      if (exact)
        take_apart<Format>(part, row + r, col + c, &block);
      else
        encode_block(format, values + r * kTileCols + c,
                     importance ? importance + col + c : nullptr,
                     std::min(Format::kBlock, cols - c), &block);
      put_row_block<Format>(to, place % kPanelRows, block);
    }
  }
}

}  // namespace

void pack_quantized(ThreadPool& pool, std::span<const MatrixSource> parts, const MatrixShape& shape,
                    WeightFormat format, const float* importance, void* packed) {
  const int64_t spans = (shape.cols + kTileCols - 1) / kTileCols;
  const int64_t groups = (shape.rows + kTileRows - 1) / kTileRows;
  TileCounter counter;
  pool.run([&](Lane&) {
    std::vector<float> values(static_cast<size_t>(kTileRows * kTileCols));
    for (int64_t tile; (tile = counter.next()) < groups * spans;) {
      const int64_t begin = tile / spans * kTileRows, col = tile % spans * kTileCols;
      const int64_t cols = std::min(kTileCols, shape.cols - col);
      int64_t base = 0;
      for (const MatrixSource& part : parts) {
        const int64_t row = std::max<int64_t>(0, begin - base);
        const int64_t end = std::min(part.rows, begin + kTileRows - base);
        if (row < end)
          with_traits(format, [&](auto traits) {
            pack_tile<decltype(traits)>(part, base, row, end - row, col, cols, importance, format,
                                        values.data(), static_cast<uint8_t*>(packed));
          });
        base += part.rows;
      }
    }
  });
}

}  // namespace puna
