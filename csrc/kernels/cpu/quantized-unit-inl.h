// Products of quantised weights with many rows by a matrix unit: one that multiplies tiles, such as
// Intel's AMX. The bits are those of quantized-inl.h, since sums of a group are whole numbers and
// what follows is the same chain of operations.
//
// A unit is a type of which an object is made for the time of its use:
//   Unit(cols)                    prepares tiles 0 .. 3 of 16 rows of 16 int32, 4 and 5 of 16 rows
//                                 of `cols` bytes, 6 and 7 of cols / 4 rows of 64 bytes
//   zero<T>(), load<T>(p, stride), store<T>(p, stride)      stride: bytes from row to row
//   multiply<Signed, C, A, B>()   C[m][n] += sum over k, j of A[m][4 k + j] * B[k][4 n + j], bytes
//                                 of A signed, those of B signed or not
// so that B is as vectors of a slab lie in memory: [cols / 4][16 rows of weights][4 columns].
#pragma once

#include "kernels/cpu/quantized-inl.h"

#if defined(PUNA_DOT)

namespace puna {
namespace {

constexpr int64_t kUnitRows = 16;  // of a tile
// Two tiles of activations by two of weights: every tile that is read is used twice.
constexpr int64_t kUnitBlock = 2 * kUnitRows;
constexpr int kBlockVectors = static_cast<int>(kUnitBlock / kCodeRows);

// Columns of one multiplication: a group must not share its sums with the next.
template <class Format>
constexpr int64_t kUnitCols = Format::kGroup < kSlabCols ? Format::kGroup : kSlabCols;

PUNA_INLINE Dots load_dots(const int32_t* p) {
  Dots dots;
  __builtin_memcpy(&dots, p, sizeof(dots));
  return dots;
}

// dots[kUnitBlock][kUnitBlock]: those of group g of the rows at `codes` with weights
// [first, first + kUnitBlock) of the panel.
template <class Format, class Unit>
PUNA_INLINE void multiply_group_by(Unit& unit, int32_t* dots, const Chunk<Format>& chunk,
                                   const int8_t* codes, int64_t stride, int64_t g, int64_t first) {
  constexpr int64_t kDotsStride = kUnitBlock * sizeof(int32_t);
  constexpr bool kSigned = kIsSigned<Format>;
  unit.template zero<0>();
  unit.template zero<1>();
  unit.template zero<2>();
  unit.template zero<3>();
  for (int64_t c = g * Format::kGroup; c < (g + 1) * Format::kGroup; c += kUnitCols<Format>) {
    unit.template load<4>(codes + c, stride);
    unit.template load<5>(codes + kUnitRows * stride + c, stride);
    unit.template load<6>(chunk.vectors(c, first), 64);
    unit.template load<7>(chunk.vectors(c, first + kUnitRows), 64);
    unit.template multiply<kSigned, 0, 4, 6>();
    unit.template multiply<kSigned, 1, 4, 7>();
    unit.template multiply<kSigned, 2, 5, 6>();
    unit.template multiply<kSigned, 3, 5, 7>();
  }
  unit.template store<0>(dots, kDotsStride);
  unit.template store<1>(dots + kUnitRows, kDotsStride);
  unit.template store<2>(dots + kUnitRows * kUnitBlock, kDotsStride);
  unit.template store<3>(dots + kUnitRows * kUnitBlock + kUnitRows, kDotsStride);
}

// sums[rows][kPanelRows] += `cols` columns of the chunk times those of `rows` rows, for weights
// [first, first + kUnitBlock). `codes` are of kUnitBlock rows.
template <class Format, class Unit>
void multiply_block_by(Unit& unit, float* sums, const Chunk<Format>& chunk, const int8_t* codes,
                       int64_t stride, const QuantizedRow (&x)[kUnitBlock], int64_t rows,
                       int64_t cols, int64_t first) {
  alignas(64) int32_t dots[kUnitBlock * kUnitBlock];
  alignas(64) float parts[kUnitBlock * kUnitBlock];
  const int v0 = static_cast<int>(first / kCodeRows);
  for_spans<Format>(cols, [&](int64_t span, int64_t from, int64_t groups) {
    for (int64_t i = 0; i < rows * kUnitBlock; ++i) parts[i] = 0.0f;
    for (int64_t g = from; g < from + groups; ++g) {
      multiply_group_by<Format>(unit, dots, chunk, codes, stride, g, first);
      for (int v = 0; v < kBlockVectors; ++v) {
        const VF scale = chunk.scale(g, v0 + v);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t at = r * kUnitBlock + v * kCodeRows;
          const Dots sum = add_dots(load_dots(dots + at), first_dots<Format>(x[r], g));
          VF part = fma(to_float(sum), scale, load(parts + at));
          if constexpr (Format::kOffset)
            part = fma(chunk.offset(g, v0 + v), to_float(same_dots(x[r].sums[g])), part);
          store(parts + at, part);
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const VF scale = set1(x[r].scales[span]);
      for (int64_t n = 0; n < kUnitBlock; n += VF::N) {
        float* sum = sums + r * kPanelRows + first + n;
        store(sum, fma(load(parts + r * kUnitBlock + n), scale, load(sum)));
      }
    }
  });
}

template <class Format, class Unit>
void gemm_quantized_by(float* out, int64_t out_stride, const QuantizedRows& x, const void* panel,
                       const float* bias, int64_t rows, int64_t width) {
  Unit unit(kUnitCols<Format>);
  alignas(64) float sums[kQuantizedRowBlock * kPanelRows];
  alignas(64) int8_t last[kUnitBlock * kChunkCols];  // rows of a block that is not full, and zeros
  Chunk<Format> chunk;
  for (int64_t first = 0; first < rows; first += kQuantizedRowBlock) {
    const int64_t count = rows - first < kQuantizedRowBlock ? rows - first : kQuantizedRowBlock;
    for (int64_t i = 0; i < count * kPanelRows; ++i) sums[i] = 0.0f;
    for (int64_t column = 0; column < x.cols; column += kChunkCols) {
      const int64_t cols = x.cols - column < kChunkCols ? x.cols - column : kChunkCols;
      chunk.unpack({static_cast<const uint8_t*>(panel) + PackedPanel<Format>::bytes(column)}, cols);
      for (int64_t row = 0; row < count; row += kUnitBlock) {
        const int64_t some = count - row < kUnitBlock ? count - row : kUnitBlock;
        const int8_t* codes = x.codes + (first + row) * x.cols + column;
        int64_t stride = x.cols;
        if (some < kUnitBlock) {
          for (int64_t r = 0; r < kUnitBlock; ++r)
            for (int64_t c = 0; c < cols; ++c)
              last[r * kChunkCols + c] = r < some ? codes[r * x.cols + c] : int8_t{0};
          codes = last;
          stride = kChunkCols;
        }
        QuantizedRow of_block[kUnitBlock] = {};
        for (int64_t r = 0; r < some; ++r) of_block[r] = row_of<Format>(x, first + row + r, column);
        for (int64_t n = 0; n < kPanelRows; n += kUnitBlock)
          multiply_block_by<Format>(unit, sums + row * kPanelRows, chunk, codes, stride, of_block,
                                    some, cols, n);
      }
    }
    write_rows(out + first * out_stride, out_stride, sums, bias, count, width);
  }
}

}  // namespace
}  // namespace puna

#endif  // PUNA_DOT
