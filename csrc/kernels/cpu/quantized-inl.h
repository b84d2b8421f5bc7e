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

// One row of activations, from some group on.
struct QuantizedRow {
  const int8_t* codes;
  const float* scales;
  const int32_t* sums;
};
PUNA_INLINE QuantizedRow row_of(const QuantizedRows& x, int64_t row, int64_t column,
                                int64_t group) {
  return {x.codes + row * x.cols + column, x.scales + row * x.groups + group,
          x.sums + row * x.groups + group};
}

// sums[r][v] += the group g (of the source and of the rows) for vectors v0 + v. The group's first
// vector in its slab is FirstVector.
template <class Source, int Rows, int Vectors, int FirstVector>
PUNA_INLINE void multiply_group(VF (&sums)[Rows][Vectors], const Source& w,
                                const QuantizedRow (&x)[Rows], int64_t g, int v0) {
  using Format = typename Source::Format;
  constexpr int64_t kSlabs = Format::kGroup > kSlabCols ? Format::kGroup / kSlabCols : 1;
  constexpr int kCount = Format::kGroup < kSlabCols ? Format::kGroup / 4 : kSlabVectors;
  constexpr bool kHalves = Source::kHalves && kCount == kSlabVectors;
  constexpr int kZero = kIsSigned<Format> ? 0 : Format::kZero;
  constexpr int kZeroBits = kZero == 0 ? 0 : __builtin_ctz(kZero);
  static_assert(kZero == 0 || kZero == 1 << kZeroBits);

  Dots dots[Rows][Vectors], partial[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    Dots start = same_dots(0);
    if constexpr (kZero > 0) start = minus_shifted<kZeroBits>(same_dots(x[r].sums[g]));
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) partial[r][v] = dots[r][v] = start;
  }
#pragma GCC unroll 1
  for (int64_t i = 0; i < kSlabs; ++i) {
    const int64_t column = g * Format::kGroup + i * kSlabCols, slab = column / kSlabCols;
    if constexpr (FirstVector == 0) w.template ask_ahead<Vectors>(slab, v0);
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
  VF scales[Vectors];
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; ++v) scales[v] = w.scale(g, v0 + v);
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    const VF scale = set1(x[r].scales[g]);
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v)
      sums[r][v] = fma(to_float(dots[r][v]), scales[v] * scale, sums[r][v]);
    if constexpr (Format::kOffset) {
      const VF total = scale * to_float(same_dots(x[r].sums[g]));
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sums[r][v] = fma(w.offset(g, v0 + v), total, sums[r][v]);
    }
  }
}

// sums[Rows][kPanelRows] += `groups` groups of the source times as many of the rows, for vectors
// [v0, v0 + Vectors).
template <class Source, int Rows, int Vectors>
PUNA_INLINE void multiply_groups(float* sums, const Source& w, const QuantizedRow (&x)[Rows],
                                 int64_t groups, int v0) {
  VF tile[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v)
      tile[r][v] = load(sums + r * kPanelRows + (v0 + v) * kCodeRows);
  }
  // Two groups of 16 columns share a slab.
  if constexpr (Source::Format::kGroup == kSlabCols / 2) {
    for (int64_t g = 0; g < groups; g += 2) {
      multiply_group<Source, Rows, Vectors, 0>(tile, w, x, g, v0);
      multiply_group<Source, Rows, Vectors, 4>(tile, w, x, g + 1, v0);
    }
  } else {
    for (int64_t g = 0; g < groups; ++g)
      multiply_group<Source, Rows, Vectors, 0>(tile, w, x, g, v0);
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v)
      store(sums + r * kPanelRows + (v0 + v) * kCodeRows, tile[r][v]);
  }
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

// Few rows: weights are taken apart in registers, and memory is read in order. The last row stands
// in for rows past it.
template <class Format, int Rows>
void multiply_few(float* out, int64_t out_stride, const QuantizedRows& x, const uint8_t* panel,
                  const float* bias, int64_t rows, int64_t width) {
  using Layout = PanelLayout<Format>;
  alignas(64) float sums[Rows * kPanelRows] = {};
  for (int64_t block = 0; block < x.cols / Format::kBlock; ++block) {
    const PackedBlock<Format> packed{panel + block * Layout::kBytes};
    QuantizedRow row[Rows];
    for (int64_t r = 0; r < Rows; ++r)
      row[r] = row_of(x, r < rows ? r : rows - 1, block * Format::kBlock, block * Layout::kGroups);
    for (int v = 0; v < kPanelVectors; v += kTileVectors)
      multiply_groups<PackedBlock<Format>, Rows, kTileVectors>(sums, packed, row, Layout::kGroups,
                                                               v);
  }
  write_rows(out, out_stride, sums, bias, rows, width);
}

// Rows that pass by a chunk of weights: their sums take 32 KiB.
constexpr int64_t kQuantizedRowBlock = 128;
static_assert(kQuantizedRowBlock % kTileRows == 0);

// Many rows: weights are taken apart once for a block of rows.
template <class Format>
void multiply_many(float* out, int64_t out_stride, const QuantizedRows& x, const uint8_t* panel,
                   const float* bias, int64_t rows, int64_t width) {
  using Layout = PanelLayout<Format>;
  constexpr int64_t kBlocks = kChunkCols / Format::kBlock;
  const int64_t blocks = x.cols / Format::kBlock;
  Chunk<Format> chunk;
  alignas(64) float sums[kQuantizedRowBlock * kPanelRows];
  for (int64_t i = 0; i < kQuantizedRowBlock * kPanelRows; ++i) sums[i] = 0.0f;
  for (int64_t block = 0; block < blocks; block += kBlocks) {
    const int64_t count = blocks - block < kBlocks ? blocks - block : kBlocks;
    for (int64_t b = 0; b < count; ++b)
      chunk.unpack(b, PackedBlock<Format>{panel + (block + b) * Layout::kBytes});
    for (int64_t first = 0; first < rows; first += kTileRows) {
      QuantizedRow row[kTileRows];
      for (int64_t r = 0; r < kTileRows; ++r)
        row[r] = row_of(x, first + r < rows ? first + r : rows - 1, block * Format::kBlock,
                        block * Layout::kGroups);
      for (int v = 0; v < kPanelVectors; v += kTileVectors)
        multiply_groups<Chunk<Format>, kTileRows, kTileVectors>(sums + first * kPanelRows, chunk,
                                                                row, count * Layout::kGroups, v);
    }
  }
  write_rows(out, out_stride, sums, bias, rows, width);
}

template <class Format>
void gemm_quantized(float* out, int64_t out_stride, const QuantizedRows& x, const void* panel,
                    const float* bias, int64_t rows, int64_t width) {
  const auto* weights = static_cast<const uint8_t*>(panel);
  for (int64_t first = 0; first < rows; first += kQuantizedRowBlock) {
    const int64_t count = rows - first < kQuantizedRowBlock ? rows - first : kQuantizedRowBlock;
    const QuantizedRow row = row_of(x, first, 0, 0);
    const QuantizedRows part{row.codes, row.scales, row.sums, x.cols, x.groups};
    float* to = out + first * out_stride;
    if (count == 1)
      multiply_few<Format, 1>(to, out_stride, part, weights, bias, count, width);
    else if (count == 2)
      multiply_few<Format, 2>(to, out_stride, part, weights, bias, count, width);
    else if (count <= kTileRows)
      multiply_few<Format, kTileRows>(to, out_stride, part, weights, bias, count, width);
    else
      multiply_many<Format>(to, out_stride, part, weights, bias, count, width);
  }
}

[[maybe_unused]] void quantize_row(int8_t* codes, float* scales, int32_t* sums, const float* x,
                                   int64_t cols, int64_t padded, int64_t group) {
  for (int64_t first = 0; first < padded; first += group) {
    const int64_t count = cols - first < group ? (cols > first ? cols - first : 0) : group;
    const auto part = [&](int64_t c) __attribute__((always_inline)) {
      const int64_t left = count - c;
      return left >= VF::N ? load(x + first + c) : left > 0 ? load_n(x + first + c, left) : set1(0);
    };
    VF most = set1(0.0f), poisons = set1(0.0f);
    for (int64_t c = 0; c < group; c += VF::N) {
      const VF values = part(c);
      most = max(abs(values), most);
      poisons = fma(values, set1(0.0f), poisons);  // NaN if a value is not finite
    }
    float lanes[VF::N], largest = 0;
    store(lanes, most);
    for (const float lane : lanes) largest = lane > largest ? lane : largest;
    const float poison = sum(poisons);
    const bool zeros = largest < 0x1p-100f;
    const float inverse = zeros || !(poison == 0) ? 0.0f : 127.0f / largest;
    Dots totals = same_dots(0);
    // Codes of 0 where there is nothing to scale: NaN has no integer.
    for (int64_t c = 0; c < group; c += VF::N)
      totals = add_dots(
          totals, store_i8(codes + first + c, inverse > 0 ? part(c) * set1(inverse) : set1(0.0f)));
    scales[first / group] = (zeros ? 0.0f : largest / 127.0f) + poison;
    sums[first / group] = sum_of(totals);
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
