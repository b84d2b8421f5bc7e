// How a format's block becomes vectors of values, scales and offsets (the layout: quant/panel.h).
// Nothing here multiplies.
#pragma once

#include "kernels/cpu/quantized-dot-inl.h"
#include "quant/panel.h"

#if defined(PUNA_DOT)

namespace puna {
namespace {

constexpr int kPanelVectors = static_cast<int>(kPanelRows / kCodeRows);

// body(Index<0>{}), ..., body(Index<Count - 1>{}).
template <int I>
struct Index {
  static constexpr int value = I;
};
template <int Count, int First = 0, class Body>
PUNA_INLINE void unrolled(const Body& body) {
  if constexpr (First < Count) {
    body(Index<First>{});
    unrolled<Count, First + 1>(body);
  }
}

// The codes of vector S of a slab, times 2^To. `part` is where the rows at hand start, in bytes.
template <int Bits, int S, int To = 0>
PUNA_INLINE Codes codes_of(const uint8_t* slab, int64_t part) {
  if constexpr (kTwoPlanes<Bits>) {
    constexpr int kLow = kLowBits<Bits>;
    return both(codes_of<kLow, S, To>(slab, part),
                codes_of<Bits - kLow, S, To + kLow>(slab + 64 * kLow, part));
  } else if constexpr (Bits == 4) {
    return bits_of<S / 4 * 4, 4, To>(load_codes(slab + S % 4 * 64 + part));
  } else if constexpr (Bits == 8) {
    return load_codes(slab + S * 64 + part);
  } else {
    constexpr int kPerByte = 8 / Bits;
    return bits_of<S % kPerByte * Bits, Bits, To>(load_codes(slab + S / kPerByte * 64 + part));
  }
}

// What goes into multiply_codes.
template <class Format, int S>
PUNA_INLINE Codes values_of(const uint8_t* slab, int64_t part) {
  static_assert(!kIsSigned<Format> || Format::kZero == 128);
  Codes values = codes_of<Format::kBits, S>(slab, part);
  if constexpr (Format::kTable) values = look_up(kTable16, values);
  if constexpr (kIsSigned<Format>) values = flip_top_bit(values);  // value - 128
  return values;
}

// A panel as it lies in memory. Vector v is rows [v kCodeRows, + kCodeRows); slabs and groups count
// from the first column.
template <class Traits>
struct PackedPanel {
  using Format = Traits;
  using Layout = PanelLayout<Format>;
  static constexpr int64_t kSlabs = Format::kBlock / kSlabCols;  // of a block
  // The order in which the vectors of a slab are best taken: those that share bytes are neighbours.
  static constexpr bool kHalves = Format::kBits == 4 || Format::kBits == 5 || Format::kBits == 6;

  const uint8_t* panel;

  // Bytes of `cols` columns, whole blocks.
  PUNA_INLINE int64_t bytes(int64_t cols) { return cols / Format::kBlock * Layout::kBytes; }

  template <int S>
  PUNA_INLINE_MEMBER Codes values(int64_t slab, int v) const {
    return values_of<Format, S>(codes_of_rows(slab, v), v * kCodeRows % kSlabRows * 4);
  }
  // Those of a block; of its groups, too, unless they have numbers of their own.
  PUNA_INLINE_MEMBER VF scale(int64_t g, int v) const {
    return load_f16(block_of(g) + Layout::kScale + 2 * v * kCodeRows);
  }
  PUNA_INLINE_MEMBER VF offset(int64_t g, int v) const {
    return load_f16(block_of(g) + Layout::kOffsets + 2 * v * kCodeRows);
  }
  // The codes of the rows of vector v.
  PUNA_INLINE_MEMBER const uint8_t* codes_of_rows(int64_t slab, int v) const {
    const int64_t part = v * kCodeRows / kSlabRows;
    return panel + slab / kSlabs * Layout::kBytes + Layout::kCodes +
           (slab % kSlabs * (kPanelRows / kSlabRows) + part) * Layout::kSlab;
  }

  PUNA_INLINE_MEMBER const uint8_t* block_of(int64_t g) const {
    return panel + g / Layout::kGroups * Layout::kBytes;
  }
};

// The scales and offsets of the groups of one block.
template <class Format>
struct BlockScales {
  using Layout = PanelLayout<Format>;
  static constexpr bool kUnpacks = Format::kSubBits == 4 || Format::kSubBits == 6;

  const uint8_t* numbers;  // int8 [kNumbers][kPanelRows], in `unpacked` or the panel
  VF scales[kPanelVectors], offsets[kPanelVectors];  // of the block
  alignas(64) uint8_t unpacked[kUnpacks ? Layout::kNumbers * kPanelRows : 1];

  // Takes those of the block of group g.
  PUNA_INLINE_MEMBER void enter(const PackedPanel<Format>& packed, int64_t g) {
#pragma GCC unroll 16
    for (int v = 0; v < kPanelVectors; ++v) {
      scales[v] = packed.scale(g, v);
      if constexpr (Format::kOffset) offsets[v] = packed.offset(g, v);
    }
    const uint8_t* planes = packed.block_of(g) + Layout::kSub;
    numbers = kUnpacks ? unpacked : planes;
    if constexpr (kUnpacks) {
      for (int64_t part = 0; part < kPanelRows; part += static_cast<int64_t>(sizeof(Codes)))
        unrolled<Layout::kNumbers>([&](auto n) __attribute__((always_inline)) {
          constexpr int kN = decltype(n)::value;
          store_codes(unpacked + kN * kPanelRows + part, number<kN>(planes + part));
        });
    }
  }
  PUNA_INLINE_MEMBER VF scale(int64_t g, int v) const {
    return scales[v] * number_of_group(g % Layout::kGroups, v);
  }
  PUNA_INLINE_MEMBER VF offset(int64_t g, int v) const {
    return offsets[v] * number_of_group(Layout::kGroups + g % Layout::kGroups, v);
  }

 private:
  PUNA_INLINE_MEMBER VF number_of_group(int64_t n, int v) const {
    return to_float(load_signed_bytes(numbers + n * kPanelRows + v * kCodeRows));
  }
  // Number N of as many rows as Codes has bytes.
  template <int N>
  PUNA_INLINE Codes number(const uint8_t* planes) {
    Codes codes = number_bits<N, 4, 0>(planes);
    if constexpr (Format::kSubBits == 6)
      codes = both(codes, number_bits<N, 2, 4>(planes + kNumberPlanes<Format, 4> * kPanelRows));
    if constexpr (Layout::kSubZero != 0) codes = less(codes, Layout::kSubZero);
    return codes;
  }
  template <int N, int Bits, int To>
  PUNA_INLINE Codes number_bits(const uint8_t* planes) {
    constexpr int64_t kPlane = number_plane<Format, Bits>(N);
    return bits_of<number_shift<Format, Bits>(N), Bits, To>(
        load_codes(planes + kPlane * kPanelRows));
  }
};

// A panel that is read once, in the order of memory.
//
// A processor finds out by itself what comes next, unless a line is left out and read later: then
// it learns anew, which was measured to halve the speed of a core of Zen 4. So scales, which are
// used after the codes behind them, are asked for before those, and codes in two planes in order.
// Only where scales take so much of a block that asking for them keeps all else waiting, each
// vector asks for a share of what lies kAhead behind it.
template <class Traits>
struct PanelInOrder {
  using Format = Traits;
  using Layout = PanelLayout<Format>;
  static constexpr bool kHalves = PackedPanel<Format>::kHalves;
  static constexpr bool kAsksAhead = 5 * Layout::kCodes > Layout::kBytes;
  static constexpr int64_t kAhead = 8192;  // best of 4, 8 and 16 KiB on Zen 4

  PackedPanel<Format> packed;
  BlockScales<Format> of_block;  // if its groups have numbers of their own

  // Comes before what is read of the groups from g on, which are of one block.
  PUNA_INLINE_MEMBER void enter_groups(int64_t g) {
    if (!kAsksAhead && g % Layout::kGroups == 0) ask_for_lines(packed.block_of(g), Layout::kCodes);
  }
  // Comes before the scales of groups from g on are used.
  PUNA_INLINE_MEMBER void enter_scales(int64_t g) {
    if (Format::kSubBits > 0 && g % Layout::kGroups == 0) of_block.enter(packed, g);
  }
  // Comes before what is read of vector V of a slab. Past the last panel it touches nothing.
  template <int V>
  PUNA_INLINE_MEMBER void enter_vector(int64_t slab) const {
    constexpr int64_t kSlabs = PackedPanel<Format>::kSlabs, kShares = kSlabs * kPanelVectors;
    if constexpr (kAsksAhead) {
      const int64_t share = slab % kSlabs * kPanelVectors + V;
      ask_for_lines(
          packed.panel + slab / kSlabs * Layout::kBytes + kAhead + share * Layout::kBytes / kShares,
          Layout::kBytes / kShares);
    } else if constexpr (kTwoPlanes<Format::kBits> && V * kCodeRows % kSlabRows == 0) {
      ask_for_lines(packed.codes_of_rows(slab, V), Layout::kSlab);
    }
  }
  template <int S>
  PUNA_INLINE_MEMBER Codes values(int64_t slab, int v) const {
    return packed.template values<S>(slab, v);
  }
  PUNA_INLINE_MEMBER VF scale(int64_t g, int v) const {
    return Format::kSubBits > 0 ? of_block.scale(g, v) : packed.scale(g, v);
  }
  PUNA_INLINE_MEMBER VF offset(int64_t g, int v) const {
    return Format::kSubBits > 0 ? of_block.offset(g, v) : packed.offset(g, v);
  }
};

// For products with many rows kChunkCols columns are taken apart once: into 16 KiB of values and up
// to 8 KiB of scales and offsets, so that they stay in the first cache. Slabs and groups count from
// the chunk's first column.
constexpr int64_t kChunkCols = kMaxBlock;
constexpr int64_t kUnpackedSlab = 64 * kSlabVectors;

template <class Format>
struct ChunkScales {
  using Layout = PanelLayout<Format>;
  static constexpr int64_t kGroups = kChunkCols / Format::kGroup;

  alignas(64) float scales[kGroups * kPanelRows];  // [kGroups][kPanelRows]
  alignas(64) float offsets[Format::kOffset ? kGroups * kPanelRows : 1];

  // Takes those of the first `cols` columns of `packed`.
  void unpack(const PackedPanel<Format>& packed, int64_t cols) {
    BlockScales<Format> of_block;
    for (int64_t g = 0; g < cols / Format::kGroup; ++g) {
      if (Format::kSubBits > 0 && g % Layout::kGroups == 0) of_block.enter(packed, g);
      for (int v = 0; v < kPanelVectors; ++v) {
        const int64_t at = g * kPanelRows + v * kCodeRows;
        store(scales + at, Format::kSubBits > 0 ? of_block.scale(g, v) : packed.scale(g, v));
        if constexpr (Format::kOffset)
          store(offsets + at, Format::kSubBits > 0 ? of_block.offset(g, v) : packed.offset(g, v));
      }
    }
  }
  PUNA_INLINE_MEMBER VF scale(int64_t g, int v) const {
    return load(scales + g * kPanelRows + v * kCodeRows);
  }
  PUNA_INLINE_MEMBER VF offset(int64_t g, int v) const {
    return load(offsets + g * kPanelRows + v * kCodeRows);
  }
};

// Scales taken apart, codes as they lie in memory.
template <class Traits>
struct ScaledPanel {
  using Format = Traits;
  static constexpr bool kHalves = PackedPanel<Format>::kHalves;

  const PackedPanel<Format>& packed;
  const ChunkScales<Format>& scales;

  template <int S>
  PUNA_INLINE_MEMBER Codes values(int64_t slab, int v) const {
    return packed.template values<S>(slab, v);
  }
  PUNA_INLINE_MEMBER VF scale(int64_t g, int v) const { return scales.scale(g, v); }
  PUNA_INLINE_MEMBER VF offset(int64_t g, int v) const { return scales.offset(g, v); }
};

template <class Traits>
struct Chunk {
  using Format = Traits;
  static constexpr bool kHalves = false;

  alignas(64) uint8_t codes[kChunkCols * kPanelRows];  // [slab][4][kSlabVectors][64]
  ChunkScales<Format> scales;

  // Takes the first `cols` columns of `packed`.
  void unpack(const PackedPanel<Format>& packed, int64_t cols) {
    for (int64_t slab = 0; slab < cols / kSlabCols; ++slab) {
      for (int v = 0; v < kPanelVectors; ++v) {
        uint8_t* to = codes + place(slab, v);
        unrolled<kSlabVectors>([&](auto s) __attribute__((always_inline)) {
          constexpr int kS = decltype(s)::value;
          store_codes(to + kS * 64, packed.template values<kS>(slab, v));
        });
      }
    }
    scales.unpack(packed, cols);
  }

  template <int S>
  PUNA_INLINE_MEMBER Codes values(int64_t slab, int v) const {
    return load_codes(codes + place(slab, v) + S * 64);
  }
  // The vectors from those of `column` on for 16 rows from `row` on, 64 bytes each.
  PUNA_INLINE_MEMBER const uint8_t* vectors(int64_t column, int64_t row) const {
    return codes + place(column / kSlabCols, static_cast<int>(row / kCodeRows)) +
           column % kSlabCols / 4 * 64;
  }
  PUNA_INLINE_MEMBER VF scale(int64_t g, int v) const { return scales.scale(g, v); }
  PUNA_INLINE_MEMBER VF offset(int64_t g, int v) const { return scales.offset(g, v); }

 private:
  PUNA_INLINE int64_t place(int64_t slab, int v) {
    const int64_t row = v * kCodeRows;
    return (slab * (kPanelRows / kSlabRows) + row / kSlabRows) * kUnpackedSlab +
           row % kSlabRows * 4;
  }
};

}  // namespace
}  // namespace puna

#endif  // PUNA_DOT
