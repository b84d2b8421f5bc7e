// Quantising: fp32 weights to the codes and scales of a format.
#pragma once

#include <cstdint>

#include "quant/format.h"

namespace puna {

// Formats that weights can be quantised to: fp8, and those whose groups have fp16 scales of their
// own. The others, in blocks of 256, are read from GGUF files only.
bool can_encode(WeightFormat format);
// The same without fp8, whose rows are no blocks.
bool can_encode_blocks(WeightFormat format);

// Quantises one block of a row: x [count], count <= kBlock; the columns past it get the code next
// to 0. Minimises sum over c of importance[c] * (weight - x)^2 over the scale (and offset) of each
// group; importance null: 1. Not-a-number becomes 0, infinities the largest fp32.
void encode_block(WeightFormat format, const float* x, const float* importance, int64_t count,
                  RowBlock* to);

}  // namespace puna
