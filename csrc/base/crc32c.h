// CRC-32C (Castagnoli), by the processor's instruction where it has one: finds damage in files.
#pragma once

#include <cstddef>
#include <cstdint>

namespace puna {

// Of the bytes that `crc` was computed over, followed by these.
uint32_t crc32c(const void* data, size_t bytes, uint32_t crc = 0);

// The same by tables alone, for processors without the instruction.
uint32_t crc32c_by_table(const void* data, size_t bytes, uint32_t crc = 0);

}  // namespace puna
