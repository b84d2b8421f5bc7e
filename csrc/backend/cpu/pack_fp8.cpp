// fp8 matrices from whatever a checkpoint holds.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "backend/cpu/pack.h"
#include "backend/source.h"
#include "quant/fp8.h"

namespace puna {
namespace {

// What a lane takes at once: panels, and columns of them that are read together.
constexpr int64_t kGroupRows = 8 * kPanelRows, kGroupCols = 256;

// A matrix that is being packed: where row r of the whole has its scale, and its code of column 0;
// those of the next columns are kPanelRows further each.
struct Fp8Panels {
  uint8_t* packed;
  size_t panel;
  float& scale(int64_t r) const {
    return reinterpret_cast<float*>(packed +
                                    static_cast<size_t>(r / kPanelRows) * panel)[r % kPanelRows];
  }
  uint8_t* codes(int64_t r) const {
    return packed + static_cast<size_t>(r / kPanelRows) * panel + kFp8ScaleBytes + r % kPanelRows;
  }
};

// Copies codes, not-a-numbers as 0; nan[i] becomes 1 where there was one.
void copy_codes(uint8_t* __restrict to, int64_t to_stride, const uint8_t* __restrict from,
                int64_t from_stride, int64_t count, uint8_t* __restrict nan, int64_t nan_stride) {
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t code = from[i * from_stride];
    const bool is_nan = is_nan_e4m3(code);
    nan[i * nan_stride] |= static_cast<uint8_t>(is_nan);
    to[i * to_stride] = is_nan ? uint8_t{0} : code;
  }
}

// Rows [row, row + rows) of a part in float8, which begins at row `base` of the whole: as they are.
void copy_rows(const MatrixSource& part, int64_t base, int64_t row, int64_t rows,
               const Fp8Panels& to) {
  const auto* data = static_cast<const uint8_t*>(part.data) + row * part.row_stride;
  uint8_t nan[kGroupRows] = {};
  // Along whichever axis is contiguous, in tiles that stay in the first cache.
  constexpr int64_t kTile = 64;
  for (int64_t col = 0; col < part.cols; col += kTile) {
    const int64_t cols = std::min(kTile, part.cols - col);
    if (part.row_stride == 1) {
      for (int64_t c = col; c < col + cols; ++c) {
        for (int64_t r = 0; r < rows;) {
          const int64_t count = std::min(rows - r, kPanelRows - (base + row + r) % kPanelRows);
          copy_codes(to.codes(base + row + r) + c * kPanelRows, 1, data + r + c * part.col_stride,
                     1, count, nan + r, 1);
          r += count;
        }
      }
    } else {
      for (int64_t r = 0; r < rows; ++r)
        copy_codes(to.codes(base + row + r) + col * kPanelRows, kPanelRows,
                   data + r * part.row_stride + col * part.col_stride, part.col_stride, cols,
                   nan + r, 0);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    to.scale(base + row + r) =
        nan[r] ? std::numeric_limits<float>::quiet_NaN() : row_scale(part, row + r);
}

// The same for a part of another type: quantised. `values` [kGroupRows][kGroupCols].
void encode_rows(const MatrixSource& part, int64_t base, int64_t row, int64_t rows, float* values,
                 const Fp8Panels& to) {
  const auto for_tiles = [&](auto body) {
    for (int64_t col = 0; col < part.cols; col += kGroupCols) {
      const int64_t cols = std::min(kGroupCols, part.cols - col);
      read_elements(part, row, rows, col, cols, values, kGroupCols);
      for (int64_t r = 0; r < rows; ++r) body(r, col, cols, values + r * kGroupCols);
    }
  };
  float most[kGroupRows] = {};
  for_tiles([&](int64_t r, int64_t, int64_t cols, const float* x) {
    for (int64_t c = 0; c < cols; ++c) most[r] = std::fmax(most[r], fp8_finite(std::fabs(x[c])));
  });
  for (int64_t r = 0; r < rows; ++r) to.scale(base + row + r) = fp8_scale(most[r]);
  for_tiles([&](int64_t r, int64_t col, int64_t cols, const float* x) {
    const float scale = to.scale(base + row + r);
    uint8_t* codes = to.codes(base + row + r) + col * kPanelRows;
    for (int64_t c = 0; c < cols; ++c) codes[c * kPanelRows] = fp8_code(fp8_finite(x[c]), scale);
  });
}

}  // namespace

void pack_fp8(ThreadPool& pool, std::span<const MatrixSource> parts, const MatrixShape& shape,
              void* packed) {
  const Fp8Panels panels{static_cast<uint8_t*>(packed),
                         panel_bytes(WeightFormat::kFP8, shape.cols)};
  const int64_t groups = (shape.rows + kGroupRows - 1) / kGroupRows;
  TileCounter counter;
  pool.run([&](Lane&) {
    std::vector<float> values(static_cast<size_t>(kGroupRows * kGroupCols));
    for (int64_t group; (group = counter.next()) < groups;) {
      const int64_t begin = group * kGroupRows;
      int64_t base = 0;
      for (const MatrixSource& part : parts) {
        const int64_t row = std::max<int64_t>(0, begin - base);
        const int64_t end = std::min(part.rows, begin + kGroupRows - base);
        if (row < end && part.dtype == DType::kF8E4M3)
          copy_rows(part, base, row, end - row, panels);
        else if (row < end)
          encode_rows(part, base, row, end - row, values.data(), panels);
        base += part.rows;
      }
    }
  });
}

}  // namespace puna
