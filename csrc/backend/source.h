// Elements of a checkpoint's matrices as numbers, whatever type and order they are stored in.
#pragma once

#include <cstdint>

#include "backend/buffer.h"

namespace puna {

// The factor of row `row` of a float8 source.
float row_scale(const MatrixSource& source, int64_t row);

// values[r * stride + c] = element (row + r, col + c) for r < rows, c < cols. Exact for float
// types; blocks of GGUF as decode_elements() has them, `col` and `cols` being whole blocks; float8
// times its scale.
void read_elements(const MatrixSource& source, int64_t row, int64_t rows, int64_t col, int64_t cols,
                   float* values, int64_t stride);

}  // namespace puna
