// Products of quantised activations with one packed panel of quantised weights, and quantising of
// activations. The same bits as quantized-plain-inl.h: sums of a group are whole numbers, and what
// follows is the same chain of operations for every element, whatever tile it is in.
//
// A format says how its blocks become vectors (quantized-codes-inl.h), an instruction set how they
// are multiplied (quantized-dot-inl.h); here is what every pair of them shares.
#pragma once

#include "kernels/cpu/quantized-codes-inl.h"
#include "kernels/cpu/quantized-plain-inl.h"

namespace puna {
namespace {

#if defined(PUNA_DOT)

// One row of activations, from some multiple of kActivationGroup columns on.
struct QuantizedRow {
  const int8_t* codes;
  const float* scales;
  const int32_t* sums;
};
template <class Format>
PUNA_INLINE QuantizedRow row_of(const QuantizedRows& x, int64_t row, int64_t column) {
  return {x.codes + row * x.cols + column, x.scales + row * x.spans + column / kActivationGroup,
          x.sums + row * x.groups + column / Format::kGroup};
}

// Memory that is needed next, asked for a little at a time: in a burst it would wait for the core's
// few buffers of lines on the way.
struct NextChunk {
  const uint8_t *at, *end;
  int64_t step;  // bytes

  PUNA_INLINE_MEMBER void ask() {
    const uint8_t* to = end - at < step ? end : at + step;
    for (; at < to; at += 64) __builtin_prefetch(at);
  }
};

// Groups that share a slab, or 1; slabs of a group, or 1.
template <class Format>
constexpr int kGroupsOfSlab = Format::kGroup < kSlabCols ? kSlabCols / Format::kGroup : 1;
template <class Format>
constexpr int64_t kSlabsOfGroup = Format::kGroup > kSlabCols ? Format::kGroup / kSlabCols : 1;

// What the dot products of group g start from: what kZero adds to them, taken off.
template <class Format>
PUNA_INLINE Dots first_dots(const QuantizedRow& x, int64_t g) {
  constexpr int kZero = kIsSigned<Format> ? 0 : Format::kZero;
  if constexpr (kZero == 0) {
    return same_dots(0);
  } else {
    constexpr int kZeroBits = __builtin_ctz(kZero);
    static_assert(kZero == 1 << kZeroBits);
    return minus_shifted<kZeroBits>(same_dots(x.sums[g]));
  }
}

// parts[r][v] += the dot products of group g, scaled as the weights are.
template <class Source, int Rows, int Vectors>
PUNA_INLINE void add_group(VF (&parts)[Rows][Vectors], const Dots (&dots)[Rows][Vectors],
                           const Source& w, const QuantizedRow (&x)[Rows], int64_t g, int v0) {
#pragma GCC unroll 16
  for (int v = 0; v < Vectors; ++v) {
    const VF scale = w.scale(g, v0 + v);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) parts[r][v] = fma(to_float(dots[r][v]), scale, parts[r][v]);
  }
  if constexpr (Source::Format::kOffset) {
    VF offsets[Vectors];
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) offsets[v] = w.offset(g, v0 + v);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const VF total = to_float(same_dots(x[r].sums[g]));
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) parts[r][v] = fma(offsets[v], total, parts[r][v]);
    }
  }
}

// parts[r][v] += a group of the source times that of the rows for vectors v0 + v; the group's first
// vector in its slab is FirstVector. Every vector of weights meets all rows while it is in its
// register.
template <class Source, int Rows, int Vectors, int FirstVector>
PUNA_INLINE void multiply_group(VF (&parts)[Rows][Vectors], const Source& w,
                                const QuantizedRow (&x)[Rows], int64_t g, int v0) {
  using Format = typename Source::Format;
  constexpr int kCount = kSlabVectors / kGroupsOfSlab<Format>;
  constexpr bool kHalves = Source::kHalves && kCount == kSlabVectors;
  Dots dots[Rows][Vectors], partial[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    const Dots start = first_dots<Format>(x[r], g);
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) partial[r][v] = dots[r][v] = start;
  }
#pragma GCC unroll 1
  for (int64_t i = 0; i < kSlabsOfGroup<Format>; ++i) {
    const int64_t column = g * Format::kGroup + i * kSlabCols, slab = column / kSlabCols;
    unrolled<kCount>([&](auto index) __attribute__((always_inline)) {
      constexpr int kI = decltype(index)::value;
      constexpr int kS = FirstVector + (kHalves ? kI % 2 * 4 + kI / 2 : kI);
      Codes values[Vectors];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) values[v] = w.template values<kS>(slab, v0 + v);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const Codes four = four_codes(x[r].codes + column + (kS - FirstVector) * 4);
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v)
          multiply_codes<Format, kI, kCount>(dots[r][v], partial[r][v], values[v], four);
      }
    });
  }
  add_group(parts, dots, w, x, g, v0);
}

// The same for all vectors of the panel and the kGroupsOfSlab groups from g on, with the weights
// read in the order of memory: for so few rows that reading them takes longest.
template <class Source, int Rows>
PUNA_INLINE void multiply_group_in_order(VF (&parts)[Rows][kPanelVectors], Source& w,
                                         const QuantizedRow (&x)[Rows], int64_t g) {
  using Format = typename Source::Format;
  constexpr int kGroups = kGroupsOfSlab<Format>, kCount = kSlabVectors / kGroups;
  Dots dots[kGroups][Rows][kPanelVectors], partial[kGroups][Rows][kPanelVectors];
#pragma GCC unroll 2
  for (int i = 0; i < kGroups; ++i) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Dots start = first_dots<Format>(x[r], g + i);
#pragma GCC unroll 16
      for (int v = 0; v < kPanelVectors; ++v) partial[i][r][v] = dots[i][r][v] = start;
    }
  }
#pragma GCC unroll 1
  for (int64_t i = 0; i < kSlabsOfGroup<Format>; ++i) {
    const int64_t column = g * Format::kGroup + i * kSlabCols, slab = column / kSlabCols;
    unrolled<kPanelVectors>([&](auto vector) __attribute__((always_inline)) {
      constexpr int kV = decltype(vector)::value;
      w.template enter_vector<kV>(slab);
      unrolled<kSlabVectors>([&](auto index) __attribute__((always_inline)) {
        constexpr int kI = decltype(index)::value;
        constexpr int kS = Source::kHalves ? kI % 2 * 4 + kI / 2 : kI;
        constexpr int kG = kS / kCount;
        constexpr int kPlace = kGroups == 1 ? kI : Source::kHalves ? kI / 2 : kS % kCount;
        const Codes values = w.template values<kS>(slab, kV);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
          multiply_codes<Format, kPlace, kCount>(dots[kG][r][kV], partial[kG][r][kV], values,
                                                 four_codes(x[r].codes + column + kS * 4));
      });
    });
  }
  w.enter_scales(g);
#pragma GCC unroll 2
  for (int i = 0; i < kGroups; ++i) add_group(parts, dots[i], w, x, g + i, 0);
}

// sums[r][v] += scales[r] * parts[r][v]
template <int Rows, int Vectors>
PUNA_INLINE void add_parts(float* sums, const VF (&parts)[Rows][Vectors],
                           const QuantizedRow (&x)[Rows], int64_t span, int v0) {
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    const VF scale = set1(x[r].scales[span]);
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) {
      float* sum = sums + r * kPanelRows + (v0 + v) * kCodeRows;
      store(sum, fma(parts[r][v], scale, load(sum)));
    }
  }
}

// body(span, first group, groups) for the spans of kActivationGroup columns in `cols` columns.
template <class Format, class Body>
PUNA_INLINE void for_spans(int64_t cols, const Body& body) {
  constexpr int64_t kGroups = kActivationGroup / Format::kGroup;
  const int64_t groups = cols / Format::kGroup;
  for (int64_t g = 0; g < groups; g += kGroups)
    body(g / kGroups, g, groups - g < kGroups ? groups - g : kGroups);
}

// sums[Rows][kPanelRows] += `cols` columns of the source times as many of the rows, for vectors
// [v0, v0 + Vectors).
template <class Source, int Rows, int Vectors>
PUNA_INLINE void multiply_vectors(float* sums, const Source& w, const QuantizedRow (&x)[Rows],
                                  int64_t cols, int v0, NextChunk& next) {
  using Format = typename Source::Format;
  for_spans<Format>(
      cols, [&](int64_t span, int64_t first, int64_t groups) __attribute__((always_inline)) {
        VF parts[Rows][Vectors];
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
          for (int v = 0; v < Vectors; ++v) parts[r][v] = set1(0.0f);
        }
        for (int64_t g = first; g < first + groups; g += kGroupsOfSlab<Format>) {
          next.ask();
          multiply_group<Source, Rows, Vectors, 0>(parts, w, x, g, v0);
          if constexpr (kGroupsOfSlab<Format> == 2)
            multiply_group<Source, Rows, Vectors, kSlabVectors / 2>(parts, w, x, g + 1, v0);
        }
        add_parts(sums, parts, x, span, v0);
      });
}

// A tile of at most Rows rows, `rows` of which exist: its width is what its sums leave registers
// for.
template <int Rows = kTileRows, class Source>
void multiply_rows(float* sums, const Source& w, const QuantizedRows& x, int64_t first,
                   int64_t rows, int64_t column, int64_t cols, NextChunk& next) {
  constexpr int kFewer = Rows > 2 ? Rows - 2 : 1;
  if constexpr (Rows > 1) {
    if (rows <= kFewer) return multiply_rows<kFewer>(sums, w, x, first, rows, column, cols, next);
  }
  constexpr int kVectors =
      kTileVectors < kPanelVectors && 2 * Rows <= kTileRows ? 2 * kTileVectors : kTileVectors;
  QuantizedRow row[Rows];  // the last one stands in for one past it
  for (int64_t r = 0; r < Rows; ++r)
    row[r] = row_of<typename Source::Format>(x, first + (r < rows ? r : rows - 1), column);
  for (int v = 0; v < kPanelVectors; v += kVectors)
    multiply_vectors<Source, Rows, kVectors>(sums, w, row, cols, v, next);
}

PUNA_INLINE void write_rows(float* out, int64_t out_stride, const float* sums, const float* bias,
                            int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t n = 0; n < width; ++n) {
      const float sum = sums[r * kPanelRows + n];
      out[r * out_stride + n] = bias ? sum + bias[n] : sum;
    }
  }
}

// One or two rows.
template <class Format, int Rows>
void multiply_in_order(float* out, int64_t out_stride, const QuantizedRows& x, const uint8_t* panel,
                       const float* bias, int64_t width) {
  // Groups that are of one block and one span.
  constexpr int64_t kColumns =
      Format::kBlock < kActivationGroup ? Format::kBlock : kActivationGroup;
  constexpr int64_t kGroups = kColumns / Format::kGroup;
  PanelInOrder<Format> source{{panel}, {}};
  alignas(64) float sums[Rows * kPanelRows] = {};
  QuantizedRow row[Rows];
  for (int64_t r = 0; r < Rows; ++r) row[r] = row_of<Format>(x, r, 0);
  for_spans<Format>(
      x.cols, [&](int64_t span, int64_t first, int64_t groups) __attribute__((always_inline)) {
        VF parts[Rows][kPanelVectors];
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
          for (int v = 0; v < kPanelVectors; ++v) parts[r][v] = set1(0.0f);
        }
        for (int64_t g = first; g < first + groups; g += kGroupsOfSlab<Format>) {
          if ((g - first) % kGroups == 0) source.enter_groups(g);
          multiply_group_in_order(parts, source, row, g);
        }
        add_parts(sums, parts, row, span, 0);
      });
  write_rows(out, out_stride, sums, bias, Rows, width);
}

// Rows that pass by a chunk of weights: their sums take 32 KiB.
constexpr int64_t kQuantizedRowBlock = 128;

// More rows: chunk by chunk of the columns. Codes of other than 4 or 8 bits are taken apart once
// for all of them if they are more than one tile; the others in registers, and their scales if that
// takes more than loading them. Those of 4 bits too are taken apart once by AVX2, whose products
// are several operations each and whose tile fills the registers (5 to 10 % faster on Zen 3).
template <class Format>
void multiply_tiles(float* out, int64_t out_stride, const QuantizedRows& x, int64_t first_row,
                    const uint8_t* panel, const float* bias, int64_t rows, int64_t width) {
  constexpr bool kUnpacks = Format::kBits != 8 && (Format::kBits != 4 || kCodeRows == 8);
  alignas(64) float sums[kQuantizedRowBlock * kPanelRows];
  for (int64_t i = 0; i < rows * kPanelRows; ++i) sums[i] = 0.0f;
  [[maybe_unused]] Chunk<Format> chunk;
  for (int64_t column = 0; column < x.cols; column += kChunkCols) {
    const int64_t cols = x.cols - column < kChunkCols ? x.cols - column : kChunkCols;
    const PackedPanel<Format> packed{panel + PackedPanel<Format>::bytes(column)};
    const int64_t bytes = PackedPanel<Format>::bytes(cols);
    // The next chunk is asked for; past the last panel this touches nothing.
    const int64_t steps = (rows + kTileRows - 1) / kTileRows * (kPanelVectors / kTileVectors) *
                          (cols / (Format::kGroup < kSlabCols ? kSlabCols : Format::kGroup));
    NextChunk next{packed.panel + bytes, packed.panel + 2 * bytes, bytes / steps + 64};
    const auto multiply = [&](const auto& source) __attribute__((always_inline)) {
      for (int64_t row = 0; row < rows; row += kTileRows) {
        // Rows lie too far apart for the processor to see what comes next.
        for (int64_t r = row + kTileRows; r < row + 2 * kTileRows && r < rows; ++r)
          for (int64_t c = 0; c < cols; c += 64)
            __builtin_prefetch(x.codes + (first_row + r) * x.cols + column + c);
        multiply_rows(sums + row * kPanelRows, source, x, first_row + row, rows - row, column, cols,
                      next);
      }
    };
    if (kUnpacks && rows > kTileRows) {
      chunk.unpack(packed, cols);
      multiply(chunk);
    } else if constexpr (Format::kSubBits > 0) {
      chunk.scales.unpack(packed, cols);
      multiply(ScaledPanel<Format>{packed, chunk.scales});
    } else {
      multiply(packed);
    }
  }
  write_rows(out, out_stride, sums, bias, rows, width);
}

template <class Format>
void gemm_quantized(float* out, int64_t out_stride, const QuantizedRows& x, const void* panel,
                    const float* bias, int64_t rows, int64_t width) {
  const auto* weights = static_cast<const uint8_t*>(panel);
  if (rows == 1) return multiply_in_order<Format, 1>(out, out_stride, x, weights, bias, width);
  if (rows == 2) return multiply_in_order<Format, 2>(out, out_stride, x, weights, bias, width);
  for (int64_t first = 0; first < rows; first += kQuantizedRowBlock)
    multiply_tiles<Format>(out + first * out_stride, out_stride, x, first, weights, bias,
                           rows - first < kQuantizedRowBlock ? rows - first : kQuantizedRowBlock,
                           width);
}

[[maybe_unused]] void quantize_row(int8_t* codes, float* scales, int32_t* sums, const float* x,
                                   int64_t cols, int64_t padded, int64_t group) {
  for (int64_t first = 0; first < padded; first += kActivationGroup) {
    const int64_t end = padded - first < kActivationGroup ? padded - first : kActivationGroup;
    const int64_t count = cols - first;
    const auto part = [&](int64_t c) __attribute__((always_inline)) {
      const int64_t left = count - c;
      return left >= VF::N ? load(x + first + c) : left > 0 ? load_n(x + first + c, left) : set1(0);
    };
    VF most = set1(0.0f), poisons = set1(0.0f);
    for (int64_t c = 0; c < end; c += VF::N) {
      const VF values = part(c);
      most = max(abs(values), most);
      poisons = fma(values, set1(0.0f), poisons);  // NaN if a value is not finite
    }
    const float largest = largest_lane(most);
    const float poison = sum(poisons);
    const bool zeros = largest < 0x1p-100f;
    const float inverse = zeros || !(poison == 0) ? 0.0f : 127.0f / largest;
    scales[first / kActivationGroup] = (zeros ? 0.0f : largest / 127.0f) + poison;
    for (int64_t g = 0; g < end; g += group) {
      Dots totals = same_dots(0);
      // Codes of 0 where there is nothing to scale: NaN has no integer.
      for (int64_t c = g; c < g + group; c += VF::N)
        totals = add_dots(totals, store_i8(codes + first + c,
                                           inverse > 0 ? part(c) * set1(inverse) : set1(0.0f)));
      sums[(first + g) / group] = sum_of(totals);
    }
  }
}

#else

template <class Format>
void gemm_quantized(float* out, int64_t out_stride, const QuantizedRows& x, const void* panel,
                    const float* bias, int64_t rows, int64_t width) {
  gemm_quantized_plain<Format>(out, out_stride, x, panel, bias, rows, width);
}
[[maybe_unused]] void quantize_row(int8_t* codes, float* scales, int32_t* sums, const float* x,
                                   int64_t cols, int64_t padded, int64_t group) {
  quantize_row_plain(codes, scales, sums, x, cols, padded, group);
}

#endif

}  // namespace
}  // namespace puna
