// GGUF's blocks into panels without taking their codes apart, for loading.
#pragma once

#include <cstdint>

#include "base/dtype.h"

namespace puna {

// `count` neighbouring blocks of one row, of a blocked type, into row `row` of 64 of as many
// neighbouring blocks of a panel of the type's exact format: the bytes that unpack_block() and
// put_row_block() would write, and no others. Any bytes are valid blocks.
void repack_blocks(DType dtype, const void* blocks, int64_t count, int64_t row, uint8_t* panel);

}  // namespace puna
