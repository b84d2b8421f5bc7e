#include "backend/source.h"

#include <algorithm>

#include "quant/blocks.h"

namespace puna {

float row_scale(const MatrixSource& source, int64_t row) {
  float scale;
  decode_elements(source.scales.dtype, source.scales.data, row / source.scales.rows_each, 1,
                  &scale);
  return scale;
}

void read_elements(const MatrixSource& source, int64_t row, int64_t rows, int64_t col, int64_t cols,
                   float* values, int64_t stride) {
  const auto decode = [&](int64_t r, int64_t c, int64_t count, float* to) {
    decode_elements(source.dtype, source.data, r * source.row_stride + c * source.col_stride, count,
                    to);
  };
  if (source.col_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) decode(row + r, col, cols, values + r * stride);
  } else if (source.row_stride == 1) {
    // Rows are neighbours: as many at once as make a whole line of memory worth its while.
    constexpr int64_t kLine = 512;
    float line[kLine];
    for (int64_t first = 0; first < rows; first += kLine) {
      const int64_t count = std::min(kLine, rows - first);
      for (int64_t c = 0; c < cols; ++c) {
        decode(row + first, col + c, count, line);
        for (int64_t r = 0; r < count; ++r) values[(first + r) * stride + c] = line[r];
      }
    }
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) decode(row + r, col + c, 1, values + r * stride + c);
  }
  if (source.dtype != DType::kF8E4M3) return;
  for (int64_t r = 0; r < rows; ++r) {
    const float scale = row_scale(source, row + r);
    for (int64_t c = 0; c < cols; ++c) values[r * stride + c] *= scale;
  }
}

}  // namespace puna
