#include "backend/cpu/pack.h"

#include <algorithm>

#include "base/half.h"
#include "kernels/kernel_table.h"

namespace puna {
namespace {

// Sources: how an element is read as the packed type.
struct FromF32 {
  using Element = float;
  static float widen(float value) { return value; }
};
struct FromF16 {
  using Element = uint16_t;
  static float widen(uint16_t value) { return float_of_f16(value); }
};
struct FromBF16 {
  using Element = uint16_t;
  static float widen(uint16_t value) { return float_of_bf16(value); }
};

// Targets: a panel is [unit][kPanelRows] of Word, a unit being kCols columns of one row. read()
// makes the word of a row; the column after the matrix's last one is zero.
template <class Source>
struct ToF32 {
  using Word = float;
  static constexpr int64_t kCols = 1;
  static Word read(const typename Source::Element* x, int64_t, bool) { return Source::widen(*x); }
};
struct ToBF16 {
  using Word = uint32_t;  // columns k and k + 1 in the lower and upper half
  static constexpr int64_t kCols = 2;
  static Word read(const uint16_t* x, int64_t col_stride, bool last) {
    return x[0] | (last ? 0u : static_cast<uint32_t>(x[col_stride]) << 16);
  }
};

// Rows [row, row + rows) and units [unit, unit + units) of a part whose first row is `base` of the
// whole; all rows are of one panel. Reads along the rows: the tile written is contiguous and stays
// in L1, while lines of many rows could not, since their distance is often a power of two.
template <class Source, class Target>
void pack_tile(const MatrixSource& part, int64_t base, int64_t row, int64_t rows, int64_t unit,
               int64_t units, typename Target::Word* packed) {
  const int64_t total_units = (part.cols + Target::kCols - 1) / Target::kCols;
  const auto* data = static_cast<const typename Source::Element*>(part.data);
  // A row's few lines are too short a run for the processor to see it coming.
  constexpr int64_t kAhead = 8;
  constexpr int64_t kLineUnits = 64 / (Target::kCols * sizeof(typename Source::Element));
  const bool odd = (unit + units) * Target::kCols > part.cols;
  for (int64_t r = row; r < row + rows; ++r) {
    auto* to = packed + ((base + r) / kPanelRows * total_units + unit) * kPanelRows +
               (base + r) % kPanelRows;
    const auto* from = data + r * part.row_stride + unit * Target::kCols * part.col_stride;
    if (part.col_stride == 1 && r + kAhead < row + rows)
      for (int64_t u = 0; u < units; u += kLineUnits)
        __builtin_prefetch(from + kAhead * part.row_stride + u * Target::kCols);
    for (int64_t u = 0; u < units - odd; ++u, from += Target::kCols * part.col_stride)
      to[u * kPanelRows] = Target::read(from, part.col_stride, false);
    if (odd) to[(units - 1) * kPanelRows] = Target::read(from, part.col_stride, true);
  }
}

// The same of any number of rows, for a part whose neighbours in memory are rows (row_stride 1).
template <class Source, class Target>
void pack_transposed(const MatrixSource& part, int64_t base, int64_t row, int64_t rows,
                     int64_t unit, int64_t units, typename Target::Word* packed) {
  const int64_t total_units = (part.cols + Target::kCols - 1) / Target::kCols;
  const auto* data = static_cast<const typename Source::Element*>(part.data);
  for (int64_t u = unit; u < unit + units; ++u) {
    const auto* from = data + row + u * Target::kCols * part.col_stride;
    const bool last = (u + 1) * Target::kCols > part.cols;
    for (int64_t r = base + row; r < base + row + rows;) {
      auto* to = packed + (r / kPanelRows * total_units + u) * kPanelRows + r % kPanelRows;
      const int64_t count = std::min(base + row + rows - r, kPanelRows - r % kPanelRows);
      if (last)
        for (int64_t i = 0; i < count; ++i) to[i] = Target::read(from + i, part.col_stride, true);
      else
        for (int64_t i = 0; i < count; ++i) to[i] = Target::read(from + i, part.col_stride, false);
      r += count;
      from += count;
    }
  }
}

template <class Source, class Target>
void pack_all(ThreadPool& pool, std::span<const MatrixSource> parts, const MatrixShape& shape,
              void* packed) {
  // A lane takes 16 panels by 1024 units at once. Of a transposed source it reads 16 panels (2 KiB
  // of bfloat16) in a row, since shorter runs waste most of each page of memory.
  constexpr int64_t kGroupRows = 16 * kPanelRows, kSpanUnits = 1024;
  constexpr int64_t kTileUnits = 64;  // 16 KiB: half of L1
  const int64_t units = (shape.cols + Target::kCols - 1) / Target::kCols;
  const int64_t spans = (units + kSpanUnits - 1) / kSpanUnits;
  const int64_t groups = (shape.rows + kGroupRows - 1) / kGroupRows;
  auto* words = static_cast<typename Target::Word*>(packed);
  TileCounter counter;
  pool.run([&](Lane&) {
    for (int64_t tile; (tile = counter.next()) < groups * spans;) {
      const int64_t group_begin = tile / spans * kGroupRows;
      const int64_t unit_begin = tile % spans * kSpanUnits;
      const int64_t unit_end = std::min(units, unit_begin + kSpanUnits);
      int64_t base = 0;
      for (const MatrixSource& part : parts) {
        int64_t row = std::max<int64_t>(0, group_begin - base);
        const int64_t end = std::min(part.rows, group_begin + kGroupRows - base);
        if (row < end && part.row_stride == 1)
          pack_transposed<Source, Target>(part, base, row, end - row, unit_begin,
                                          unit_end - unit_begin, words);
        else
          while (row < end) {
            const int64_t count = std::min(end - row, kPanelRows - (base + row) % kPanelRows);
            for (int64_t unit = unit_begin; unit < unit_end; unit += kTileUnits)
              pack_tile<Source, Target>(part, base, row, count, unit,
                                        std::min(kTileUnits, unit_end - unit), words);
            row += count;
          }
        base += part.rows;
      }
    }
  });
}

}  // namespace

void pack_panels(ThreadPool& pool, std::span<const MatrixSource> parts, const MatrixShape& shape,
                 WeightFormat format, void* packed) {
  if (format == WeightFormat::kBF16)
    pack_all<FromBF16, ToBF16>(pool, parts, shape, packed);
  else if (shape.dtype == DType::kBF16)
    pack_all<FromBF16, ToF32<FromBF16>>(pool, parts, shape, packed);
  else if (shape.dtype == DType::kF16)
    pack_all<FromF16, ToF32<FromF16>>(pool, parts, shape, packed);
  else
    pack_all<FromF32, ToF32<FromF32>>(pool, parts, shape, packed);
}

}  // namespace puna
