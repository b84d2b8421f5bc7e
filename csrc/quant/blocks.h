// GGUF's quantised blocks: which weight format holds each without loss, and how one is taken apart.
// Sources: the GGUF specification and the layout of llama.cpp's files.
#pragma once

#include <cstdint>
#include <optional>

#include "base/dtype.h"
#include "quant/format.h"

namespace puna {

// The format that holds `dtype` exactly: every block type has one, and bfloat16, float32 and, with
// scales by row, float8 e4m3.
std::optional<WeightFormat> exact_format(DType dtype);

// One block of a blocked type (info_of(dtype).block_elements columns of one row), as the RowBlock
// of its exact format. Any bytes are a valid block.
void unpack_block(DType dtype, const void* block, RowBlock* to);

// Elements [first, first + count) of an array of a float type or a blocked type, in fp32. Exact for
// the plain types (float8 e4m3 without its scale); for blocked ones the scalar truth of their
// format. `first` and `count` are whole blocks.
void decode_elements(DType dtype, const void* data, int64_t first, int64_t count, float* out);

// Row `row` of a packed matrix (any format) in fp32: out [cols].
void unpack_row(WeightFormat format, const void* packed, int64_t row, int64_t cols, float* out);

}  // namespace puna
