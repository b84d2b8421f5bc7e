// The products by a matrix unit, on a model of one: the bits of the plain form. Compiled with flags
// that give it dot products of vectors (CMakeLists.txt), as kernels are.
#include "kernels/cpu/quantized-unit-inl.h"

#include "quantized_checks.h"

namespace {

using namespace puna;

// Eight tiles, as the manual of AMX has them: what is read past a tile's rows or bytes of a row is
// an error of the kernel, shown as a failure.
class UnitModel {
 public:
  explicit UnitModel(int64_t cols) {
    for (int t = 0; t < 8; ++t) {
      tiles_[t].rows = t >= 6 ? cols / 4 : 16;
      tiles_[t].row_bytes = t == 4 || t == 5 ? cols : 64;
    }
  }

  template <int T>
  void zero() {
    tiles_[T].bytes.fill(0);
  }
  template <int T>
  void load(const void* p, int64_t stride) {
    for (int64_t r = 0; r < tiles_[T].rows; ++r)
      std::copy_n(static_cast<const uint8_t*>(p) + r * stride, tiles_[T].row_bytes,
                  tiles_[T].row(r));
  }
  template <int T>
  void store(void* p, int64_t stride) {
    for (int64_t r = 0; r < tiles_[T].rows; ++r)
      std::copy_n(tiles_[T].row(r), tiles_[T].row_bytes, static_cast<uint8_t*>(p) + r * stride);
  }
  template <bool Signed, int C, int A, int B>
  void multiply() {
    Tile &a = tiles_[A], &b = tiles_[B], &c = tiles_[C];
    CHECK_EQ(a.row_bytes, 4 * b.rows);
    CHECK_EQ(a.rows, c.rows);
    CHECK_EQ(b.row_bytes, c.row_bytes);
    for (int64_t m = 0; m < c.rows; ++m)
      for (int64_t n = 0; n < c.row_bytes / 4; ++n) {
        int32_t sum;
        std::memcpy(&sum, c.row(m) + 4 * n, 4);
        for (int64_t i = 0; i < a.row_bytes; ++i) {
          const uint8_t code = b.row(i / 4)[4 * n + i % 4];
          sum += static_cast<int8_t>(a.row(m)[i]) * (Signed ? static_cast<int8_t>(code) : code);
        }
        std::memcpy(c.row(m) + 4 * n, &sum, 4);
      }
  }

 private:
  struct Tile {
    int64_t rows, row_bytes;
    std::array<uint8_t, 16 * 64> bytes{};
    uint8_t* row(int64_t r) { return bytes.data() + 64 * r; }
  };
  Tile tiles_[8];
};

#if defined(PUNA_DOT)

KernelTable with_unit() {
  KernelTable table = resolve_isa("scalar");
  table.isa = "model of a matrix unit";
  const KernelTable::GemmQuantized gemms[] = {
#define PUNA_FORMAT(Traits, name) gemm_quantized_by<Traits, UnitModel>,
#include "quant/formats.inc"
#undef PUNA_FORMAT
  };
  std::copy_n(gemms, kQuantizedKernels, table.gemm_quantized);
  return table;
}

TEST(products_by_a_matrix_unit_have_the_bits_of_the_plain_form) {
  quantized_checks::check_products(with_unit(), 3);
}
TEST(rows_of_products_by_a_matrix_unit_are_independent) {
  quantized_checks::check_rows_are_independent(with_unit(), 3);
}

#endif

}  // namespace
