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

// Targets: a panel is [unit][kPanelRows] of Word, a unit being kCols columns of one row.
template <class Source>
struct ToF32 {
  using Word = float;
  static constexpr int64_t kCols = 1;
  static Word read(const typename Source::Element* x, int64_t, int64_t) {
    return Source::widen(*x);
  }
};
struct ToBF16 {
  using Word = uint32_t;  // columns k and k + 1 in the lower and upper half
  static constexpr int64_t kCols = 2;
  static Word read(const uint16_t* x, int64_t col_stride, int64_t cols_left) {
    const uint32_t high = cols_left > 1 ? x[col_stride] : 0;
    return x[0] | high << 16;
  }
};

// The tile of rows [row, row + rows) and units [unit, unit + units) of a part whose first row is
// `base` of the whole.
template <class Source, class Target>
void pack_tile(const MatrixSource& part, int64_t base, int64_t row, int64_t rows, int64_t unit,
               int64_t units, typename Target::Word* packed) {
  const int64_t total_units = (part.cols + Target::kCols - 1) / Target::kCols;
  const auto* data = static_cast<const typename Source::Element*>(part.data);
  for (int64_t u = unit; u < unit + units; ++u) {
    const int64_t col = u * Target::kCols;
    const auto* from = data + row * part.row_stride + col * part.col_stride;
    for (int64_t r = base + row; r < base + row + rows;) {
      auto* to = packed + (r / kPanelRows * total_units + u) * kPanelRows;
      const int64_t end = std::min(base + row + rows, (r / kPanelRows + 1) * kPanelRows);
      for (; r < end; ++r, from += part.row_stride)
        to[r % kPanelRows] = Target::read(from, part.col_stride, part.cols - col);
    }
  }
}

template <class Source, class Target>
void pack_all(ThreadPool& pool, std::span<const MatrixSource> parts, const MatrixShape& shape,
              void* packed) {
  // A transposed source is read along its rows, 16 panels (2 KiB of bfloat16) at a time, since
  // shorter runs waste most of each page of memory. Otherwise a tile is one panel by one cache line
  // of columns: its kPanelRows lines stay in L1 while they are read a word at a time.
  constexpr int64_t kGroupRows = 16 * kPanelRows;
  constexpr int64_t kUnits = 64 / sizeof(typename Target::Word);
  // What a lane takes at once: small enough to balance, long enough to stream.
  constexpr int64_t kSpanUnits = 64 * kUnits;
  const int64_t units = (shape.cols + Target::kCols - 1) / Target::kCols;
  const int64_t spans = (units + kSpanUnits - 1) / kSpanUnits;
  const int64_t groups = (shape.rows + kGroupRows - 1) / kGroupRows;
  TileCounter counter;
  pool.run([&](Lane&) {
    for (int64_t tile; (tile = counter.next()) < groups * spans;) {
      const int64_t group_begin = tile / spans * kGroupRows;
      const int64_t unit_begin = tile % spans * kSpanUnits;
      const int64_t unit_end = std::min(units, unit_begin + kSpanUnits);
      int64_t base = 0;
      for (const MatrixSource& part : parts) {
        const int64_t begin = std::max<int64_t>(0, group_begin - base);
        const int64_t end = std::min(part.rows, group_begin + kGroupRows - base);
        const bool transposed = part.row_stride == 1 && part.col_stride != 1;
        const int64_t step = transposed ? kGroupRows : kPanelRows;
        for (int64_t row = begin; row < end; row += step)
          for (int64_t unit = unit_begin; unit < unit_end; unit += kUnits)
            pack_tile<Source, Target>(part, base, row, std::min(step, end - row), unit,
                                      std::min(kUnits, unit_end - unit),
                                      static_cast<typename Target::Word*>(packed));
        base += part.rows;
      }
    }
  });
}

}  // namespace

size_t panel_bytes(WeightFormat format, int64_t cols) {
  return static_cast<size_t>(format == WeightFormat::kF32 ? cols * 4 : (cols + 1) / 2 * 4) *
         kPanelRows;
}

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
