// How a quantised format lies in memory: its panels of 64 rows, block by block of columns.
//
// A panel is [blocks][block]; a block of kBlock columns is
//   scale       fp16 [64]
//   offset      fp16 [64]                            if kOffset
//   sub         [kNumbers * kSubBits / 8][64]        if kSubBits
//   codes       [kBlock / 32][4][64 * kBits bytes]   slabs of 32 columns by 16 rows
// so that every part starts at a multiple of 64 bytes. A slab holds 8 vectors of 64 codes; vector s
// is columns 4 s .. 4 s + 3 of 16 rows, [16][4], which is what the integer dot-product instructions
// take (in halves or quarters on narrower machines). Its bits lie in planes:
//   8 bits  8 x 64 bytes, one a vector
//   4       4 x 64: vector s in the lower (s < 4) or upper half of the bytes of plane s % 4
//   2       2 x 64: vector s in bits 2 (s % 4) .. of plane s / 4
//   1       1 x 64: vector s in bit s
// and 3, 5 and 6 bits are a plane of 2, 4, 4 low bits followed by one of 1, 1, 2 high bits.
// The small whole numbers of a block, one a group for the scale and with kOffset behind those one a
// group for the offset, kNumbers in all, lie in planes of a byte for each row: of 4 bits number n
// in plane n % P from bit 4 (n / P) on, P = kNumbers / 2; of 6 bits such planes of the 4 low ones,
// then likewise kNumbers / 4 planes of the 2 high ones; of 8 bits one a plane. Those with a sign
// are stored kSubZero higher, but as they are in 8 bits. Columns past the matrix have code kZero (0
// with kTable and with kOffset), so they add nothing to a product with activations that are zero
// there. Freestanding.
#pragma once

#include <stdint.h>

#include "base/half.h"
#include "quant/formats/int4.h"
#include "quant/formats/int5.h"
#include "quant/formats/int8.h"
#include "quant/formats/k_quants.h"
#include "quant/formats/table4.h"

namespace puna {

constexpr int64_t kSlabRows = 16, kSlabCols = 32;
constexpr int kSlabVectors = 8;  // of 64 codes
constexpr int64_t kMaxBlock = 256, kMaxGroups = 16;

// Where the parts of a block start, in bytes.
template <class Format>
struct PanelLayout {
  static constexpr int64_t kGroups = Format::kBlock / Format::kGroup;
  static constexpr int64_t kScale = 0;
  static constexpr int64_t kOffsets = kScale + 2 * kPanelRows;
  static constexpr int64_t kNumbers = Format::kSubBits ? kGroups * (Format::kOffset ? 2 : 1) : 0;
  static constexpr int64_t kSubPlanes = kNumbers * Format::kSubBits / 8;
  static constexpr int kLeastSub = Format::kOffset ? 0 : -(1 << Format::kSubBits >> 1);
  static constexpr int kMostSub = kLeastSub + (1 << Format::kSubBits) - 1;
  static constexpr int kSubZero = Format::kSubBits == 8 ? 0 : -kLeastSub;
  static constexpr int64_t kSub = kOffsets + (Format::kOffset ? 2 * kPanelRows : 0);
  static constexpr int64_t kCodes = kSub + kSubPlanes * kPanelRows;
  static constexpr int64_t kSlab = 64 * Format::kBits;
  static constexpr int64_t kBytes =
      kCodes + Format::kBlock / kSlabCols * (kPanelRows / kSlabRows) * kSlab;
  static_assert(Format::kBlock <= kMaxBlock && kGroups <= kMaxGroups);
  static_assert(Format::kBlock % kSlabCols == 0 && Format::kGroup % kSlabRows == 0);
  static_assert(kNumbers * Format::kSubBits % 8 == 0 && kLeastSub >= -128 && kMostSub <= 127);
};

// Where Bits bits (8, 4 or 2) of number n of a block lie: the plane, and the first bit in its
// bytes.
template <class Format, int Bits>
constexpr int64_t kNumberPlanes = PanelLayout<Format>::kNumbers * Bits / 8;
template <class Format, int Bits>
constexpr int64_t number_plane(int64_t n) {
  return n % kNumberPlanes<Format, Bits>;
}
template <class Format, int Bits>
constexpr int number_shift(int64_t n) {
  return static_cast<int>(n / kNumberPlanes<Format, Bits>) * Bits;
}

// One row's share of a block, taken apart.
struct RowBlock {
  uint16_t scale, offset;  // fp16
  int8_t sub_scale[kMaxGroups];
  uint8_t sub_offset[kMaxGroups];
  uint8_t codes[kMaxBlock];
};

namespace {

// The vector whose codes are the i-th bits of the bytes of a plane.
template <int Bits>
constexpr int vector_of(int plane, int i) {
  // 4 bits go by halves (s and s + 4 share a byte), 2 and 1 by neighbours.
  return Bits == 4 ? i * 4 + plane : plane * (8 / Bits) + i;
}

// Bits that lie in two kinds of planes, and how many of them in the first.
template <int Bits>
constexpr bool kTwoPlanes = Bits == 3 || Bits == 5 || Bits == 6;
template <int Bits>
constexpr int kLowBits = Bits == 3 ? 2 : 4;

// A row's 32 codes of a slab as words of 4 bytes, word s for vector s, to and from its planes. `at`
// is where the row starts in the slab, 4 bytes (row % kSlabRows) on; planes are 64 bytes apart.
template <int Bits>
inline void write_codes(uint8_t* at, const uint32_t (&words)[kSlabVectors]) {
  if constexpr (kTwoPlanes<Bits>) {
    constexpr int kLow = kLowBits<Bits>;
    constexpr uint32_t kMask = ((1u << kLow) - 1) * 0x01010101u;
    uint32_t low[kSlabVectors], high[kSlabVectors];
    for (int s = 0; s < kSlabVectors; ++s) {
      low[s] = words[s] & kMask;
      high[s] = words[s] >> kLow & ~kMask >> kLow;
    }
    write_codes<kLow>(at, low);
    write_codes<Bits - kLow>(at + 64 * kLow, high);
  } else {
    static_assert(Bits == 8 || Bits == 4 || Bits == 2 || Bits == 1);
    constexpr int kPerByte = 8 / Bits;
    for (int plane = 0; plane < Bits; ++plane) {
      uint32_t bytes = 0;
      for (int i = 0; i < kPerByte; ++i) bytes |= words[vector_of<Bits>(plane, i)] << Bits * i;
      __builtin_memcpy(at + plane * 64, &bytes, sizeof(bytes));
    }
  }
}

template <int Bits>
inline void read_codes(const uint8_t* at, uint32_t (&words)[kSlabVectors]) {
  if constexpr (kTwoPlanes<Bits>) {
    constexpr int kLow = kLowBits<Bits>;
    uint32_t high[kSlabVectors];
    read_codes<kLow>(at, words);
    read_codes<Bits - kLow>(at + 64 * kLow, high);
    for (int s = 0; s < kSlabVectors; ++s) words[s] |= high[s] << kLow;
  } else {
    constexpr int kPerByte = 8 / Bits;
    constexpr uint32_t kMask = ((1u << Bits) - 1) * 0x01010101u;
    for (int plane = 0; plane < Bits; ++plane) {
      uint32_t bytes;
      __builtin_memcpy(&bytes, at + plane * 64, sizeof(bytes));
      for (int i = 0; i < kPerByte; ++i)
        words[vector_of<Bits>(plane, i)] = bytes >> Bits * i & kMask;
    }
  }
}

// A row's numbers to and from their planes; `at` is the row's byte of the first plane.
template <class Format, int Bits>
inline void write_numbers(uint8_t* at, const uint8_t (&numbers)[2 * kMaxGroups]) {
  if constexpr (kTwoPlanes<Bits>) {
    constexpr int kLow = kLowBits<Bits>;
    uint8_t low[2 * kMaxGroups], high[2 * kMaxGroups];
    for (int64_t n = 0; n < PanelLayout<Format>::kNumbers; ++n) {
      low[n] = numbers[n] & ((1u << kLow) - 1);
      high[n] = static_cast<uint8_t>(numbers[n] >> kLow);
    }
    write_numbers<Format, kLow>(at, low);
    write_numbers<Format, Bits - kLow>(at + kNumberPlanes<Format, kLow> * kPanelRows, high);
  } else {
    constexpr int64_t kPlanes = kNumberPlanes<Format, Bits>;
    for (int64_t plane = 0; plane < kPlanes; ++plane) {
      unsigned byte = 0;
      for (int i = 0; i < 8 / Bits; ++i) byte |= unsigned{numbers[i * kPlanes + plane]} << Bits * i;
      at[plane * kPanelRows] = static_cast<uint8_t>(byte);
    }
  }
}

template <class Format, int Bits>
inline unsigned read_number(const uint8_t* at, int64_t n) {
  if constexpr (kTwoPlanes<Bits>) {
    constexpr int kLow = kLowBits<Bits>;
    const uint8_t* high = at + kNumberPlanes<Format, kLow> * kPanelRows;
    return read_number<Format, kLow>(at, n) | read_number<Format, Bits - kLow>(high, n) << kLow;
  } else {
    return unsigned{at[number_plane<Format, Bits>(n) * kPanelRows]} >>
               number_shift<Format, Bits>(n) &
           ((1u << Bits) - 1);
  }
}

// Where row `row` of 64 starts in the slab of 32 columns from `column` on.
template <class Format>
inline int64_t slab_row(int64_t row, int64_t column) {
  using Layout = PanelLayout<Format>;
  return Layout::kCodes +
         (column / kSlabCols * (kPanelRows / kSlabRows) + row / kSlabRows) * Layout::kSlab +
         row % kSlabRows * 4;
}

// Row `row` of 64 into the block at `block`.
template <class Format>
void put_row_block(uint8_t* block, int64_t row, const RowBlock& from) {
  using Layout = PanelLayout<Format>;
  __builtin_memcpy(block + Layout::kScale + 2 * row, &from.scale, 2);
  if constexpr (Format::kOffset)
    __builtin_memcpy(block + Layout::kOffsets + 2 * row, &from.offset, 2);
  if constexpr (Format::kSubBits > 0) {
    uint8_t numbers[2 * kMaxGroups];
    for (int64_t g = 0; g < Layout::kGroups; ++g) {
      numbers[g] = static_cast<uint8_t>(from.sub_scale[g] + Layout::kSubZero);
      if constexpr (Format::kOffset) numbers[Layout::kGroups + g] = from.sub_offset[g];
    }
    write_numbers<Format, Format::kSubBits>(block + Layout::kSub + row, numbers);
  }
  for (int64_t c = 0; c < Format::kBlock; c += kSlabCols) {
    uint32_t words[kSlabVectors];
    __builtin_memcpy(words, from.codes + c, sizeof(words));
    write_codes<Format::kBits>(block + slab_row<Format>(row, c), words);
  }
}

template <class Format>
void get_row_block(const uint8_t* block, int64_t row, RowBlock* to) {
  using Layout = PanelLayout<Format>;
  __builtin_memcpy(&to->scale, block + Layout::kScale + 2 * row, 2);
  if constexpr (Format::kOffset)
    __builtin_memcpy(&to->offset, block + Layout::kOffsets + 2 * row, 2);
  if constexpr (Format::kSubBits > 0) {
    const uint8_t* numbers = block + Layout::kSub + row;
    for (int64_t g = 0; g < Layout::kGroups; ++g) {
      const auto number = static_cast<int>(read_number<Format, Format::kSubBits>(numbers, g));
      to->sub_scale[g] = static_cast<int8_t>(number - Layout::kSubZero);
      if constexpr (Format::kOffset)
        to->sub_offset[g] = static_cast<uint8_t>(
            read_number<Format, Format::kSubBits>(numbers, Layout::kGroups + g));
    }
  }
  for (int64_t c = 0; c < Format::kBlock; c += kSlabCols) {
    uint32_t words[kSlabVectors];
    read_codes<Format::kBits>(block + slab_row<Format>(row, c), words);
    __builtin_memcpy(to->codes + c, words, sizeof(words));
  }
}

// The scalar truth: scale and offset of group g, and the weight of column c, in fp32. All products
// and sums in them are exact but the last one of a weight.
template <class Format>
inline float group_scale(const RowBlock& block, int64_t g) {
  const float scale = float_of_f16(block.scale);
  return Format::kSubBits > 0 ? scale * static_cast<float>(block.sub_scale[g]) : scale;
}
template <class Format>
inline float group_offset(const RowBlock& block, int64_t g) {
  if constexpr (!Format::kOffset) return 0.0f;
  const float offset = float_of_f16(block.offset);
  return Format::kSubBits > 0 ? offset * static_cast<float>(block.sub_offset[g]) : offset;
}
template <class Format>
inline int code_value(unsigned code) {  // value(code) - kZero
  return static_cast<int>(Format::kTable ? kTable16[code] : code) - Format::kZero;
}
template <class Format>
inline float weight_of(const RowBlock& block, int64_t c) {
  const int64_t g = c / Format::kGroup;
  return group_scale<Format>(block, g) * static_cast<float>(code_value<Format>(block.codes[c])) +
         group_offset<Format>(block, g);
}

}  // namespace
}  // namespace puna
