// Matrix products of every instruction set this machine can run: against double, and bit for bit
// whatever rows are computed together.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/half.h"
#include "check.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/kernel_table.h"

namespace {

using puna::KernelTable;
using puna::kPanelRows;

std::vector<KernelTable> runnable_isas() {
  std::vector<KernelTable> tables;
  for (const KernelTable* isa : puna::compiled_isas()) {
    if (isa->supported()) tables.push_back(puna::resolve_isa(isa->isa));
  }
  return tables;
}

// How one element type is stored, packed and multiplied.
struct Float32 {
  using Element = float;
  static constexpr int64_t kDepth = 1;  // columns that lie side by side in a panel
  static Element narrow(float value) { return value; }
  static double wide(Element value) { return value; }
  static auto gemm(const KernelTable& table) { return table.gemm_f32; }
};
struct BFloat16 {
  using Element = uint16_t;
  static constexpr int64_t kDepth = 2;
  static Element narrow(float value) { return puna::bf16_of_float(value); }
  static double wide(Element value) { return puna::float_of_bf16(value); }
  static auto gemm(const KernelTable& table) { return table.gemm_bf16; }
};

template <class Type>
struct Product {
  using Element = typename Type::Element;
  int64_t rows, cols, width, x_stride;
  std::vector<Element> x;      // [rows][x_stride]; NaN between the rows
  std::vector<Element> panel;  // as kernel_table.h says
  std::vector<float> bias;     // [width] or empty

  // `next` draws one value.
  template <class Next>
  Product(int64_t rows, int64_t cols, int64_t width, bool with_bias, Next next)
      : rows(rows), cols(cols), width(width) {
    const int64_t steps = (cols + Type::kDepth - 1) / Type::kDepth;
    x_stride = steps * Type::kDepth + 3;
    x.assign(rows * x_stride, Type::narrow(std::numeric_limits<float>::quiet_NaN()));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t k = 0; k < steps * Type::kDepth; ++k) {
        x[r * x_stride + k] = Type::narrow(k < cols ? next() : 0.0f);
      }
    }
    panel.assign(steps * kPanelRows * Type::kDepth, Type::narrow(0.0f));
    for (int64_t n = 0; n < width; ++n) {
      for (int64_t k = 0; k < cols; ++k) panel[panel_index(n, k)] = Type::narrow(next());
    }
    if (with_bias) {
      for (int64_t n = 0; n < width; ++n) bias.push_back(next());
    }
  }

  int64_t panel_index(int64_t n, int64_t k) const {
    return (k / Type::kDepth * kPanelRows + n) * Type::kDepth + k % Type::kDepth;
  }

  // Rows [first, first + count), with `out_stride` floats between the rows of the result.
  std::vector<float> run(const KernelTable& table, int64_t first, int64_t count,
                         int64_t out_stride) const {
    std::vector<float> out(count * out_stride, kUntouched);
    Type::gemm(table)(out.data(), out_stride, x.data() + first * x_stride, x_stride, panel.data(),
                      bias.empty() ? nullptr : bias.data(), count, cols, width);
    return out;
  }

  static constexpr float kUntouched = 12345.0f;
};

bool same_bits(float a, float b) { return puna::bits_of_float(a) == puna::bits_of_float(b); }

// Compares with sums in double. `tolerance` is the allowed error in units of 2^-24 * sum |x| |w|.
template <class Type>
void check_against_double(const KernelTable& table, const Product<Type>& product,
                          double tolerance) {
  const int64_t out_stride = product.width + 5;
  const std::vector<float> out = product.run(table, 0, product.rows, out_stride);
  double worst = 0;
  std::string where;
  bool outside_untouched = true;
  for (int64_t r = 0; r < product.rows; ++r) {
    for (int64_t n = 0; n < out_stride; ++n) {
      const float value = out[r * out_stride + n];
      if (n >= product.width) {
        outside_untouched &= value == Product<Type>::kUntouched;
        continue;
      }
      double sum = product.bias.empty() ? 0.0 : product.bias[n], magnitude = std::fabs(sum);
      for (int64_t k = 0; k < product.cols; ++k) {
        const double term = Type::wide(product.x[r * product.x_stride + k]) *
                            Type::wide(product.panel[product.panel_index(n, k)]);
        sum += term;
        magnitude += std::fabs(term);
      }
      const double allowed = tolerance * 0x1p-24 * magnitude;
      const double excess = std::fabs(value - sum) - allowed;
      if (!(excess <= worst)) {
        worst = std::isnan(excess) ? std::numeric_limits<double>::infinity() : excess;
        where = std::string(table.isa) + " row " + std::to_string(r) + " column " +
                std::to_string(n) + " of " + std::to_string(product.rows) + "x" +
                std::to_string(product.width) + "x" + std::to_string(product.cols) + ": " +
                std::to_string(value) + " against " + std::to_string(sum);
      }
    }
  }
  check::report(worst == 0, __FILE__, __LINE__, where);
  CHECK(outside_untouched);
}

// Shapes with every remainder of the register tiles, and two of the length of real layers.
template <class Body>
void for_each_shape(std::mt19937_64& random, Body body) {
  const auto draw = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  for (int i = 0; i < 40; ++i) body(draw(1, 40), draw(1, 300), draw(1, kPanelRows));
  for (int64_t rows = 1; rows <= 8; ++rows) body(rows, 63 + rows, kPanelRows);
  body(7, 5120, kPanelRows);
  body(1, 5119, 3);
  body(201, 1030, 17);  // several blocks of rows and of columns
}

template <class Type>
void check_integers() {
  // Small integers: every partial sum is exact in fp32, so there is no tolerance at all.
  std::mt19937_64 random(1);
  std::uniform_int_distribution<int> small(-9, 9);
  for (const KernelTable& table : runnable_isas()) {
    for_each_shape(random, [&](int64_t rows, int64_t cols, int64_t width) {
      const Product<Type> product(rows, cols, width, cols % 2 == 0,
                                  [&] { return static_cast<float>(small(random)); });
      check_against_double(table, product, 0.0);
    });
  }
}
TEST(gemm_f32_is_exact_on_small_integers) { check_integers<Float32>(); }
TEST(gemm_bf16_is_exact_on_small_integers) { check_integers<BFloat16>(); }

template <class Type>
void check_reals() {
  std::mt19937_64 random(2);
  std::normal_distribution<float> normal;
  for (const KernelTable& table : runnable_isas()) {
    for_each_shape(random, [&](int64_t rows, int64_t cols, int64_t width) {
      const Product<Type> product(rows, cols, width, cols % 2 == 0, [&] { return normal(random); });
      // Each of K steps rounds a partial sum, at most twice (product and sum); the errors walk at
      // random, so they grow as sqrt(K). Four standard deviations, and a constant for short sums.
      check_against_double(table, product, 8.0 + 4.0 * std::sqrt(static_cast<double>(cols)));
    });
  }
}
TEST(gemm_f32_agrees_with_double) { check_reals<Float32>(); }
TEST(gemm_bf16_agrees_with_double) { check_reals<BFloat16>(); }

template <class Type>
void check_rows_are_independent() {
  std::mt19937_64 random(3);
  std::normal_distribution<float> normal;
  const auto draw = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  for (const KernelTable& table : runnable_isas()) {
    for (int64_t cols : {1, 2, 17, 128, 777, 2050}) {
      const Product<Type> product(110, cols, kPanelRows, true, [&] { return normal(random); });
      const std::vector<float> all = product.run(table, 0, product.rows, kPanelRows);
      for (int trial = 0; trial < 20; ++trial) {
        const int64_t first = draw(0, product.rows - 1);
        const int64_t count = trial < 8 ? 1 : draw(1, product.rows - first);
        const std::vector<float> some = product.run(table, first, count, kPanelRows);
        bool same = true;
        for (int64_t i = 0; i < count * kPanelRows; ++i) {
          same &= same_bits(some[i], all[first * kPanelRows + i]);
        }
        check::report(same, __FILE__, __LINE__,
                      std::string(table.isa) + ": rows " + std::to_string(first) + " + " +
                          std::to_string(count) + " of " + std::to_string(cols) +
                          " columns have other bits alone");
      }
    }
  }
}
TEST(gemm_f32_rows_are_independent) { check_rows_are_independent<Float32>(); }
TEST(gemm_bf16_rows_are_independent) { check_rows_are_independent<BFloat16>(); }

TEST(gemm_width_does_not_change_bits) {
  std::mt19937_64 random(4);
  std::normal_distribution<float> normal;
  for (const KernelTable& table : runnable_isas()) {
    Product<BFloat16> product(9, 333, kPanelRows, false, [&] { return normal(random); });
    const std::vector<float> all = product.run(table, 0, product.rows, kPanelRows);
    for (int64_t width : {1, 15, 16, 33, 63}) {
      product.width = width;
      const std::vector<float> narrow = product.run(table, 0, product.rows, width);
      bool same = true;
      for (int64_t r = 0; r < product.rows; ++r) {
        for (int64_t n = 0; n < width; ++n) {
          same &= same_bits(narrow[r * width + n], all[r * kPanelRows + n]);
        }
      }
      CHECK(same);
    }
  }
}

// One call over several panels gives the bits of a call for each, and leaves the columns past
// `width` alone.
template <class Type>
void check_several_panels() {
  using Element = typename Type::Element;
  std::mt19937_64 random(5);
  std::normal_distribution<float> normal;
  const auto draw = [&](int64_t count) {
    std::vector<Element> values(count);
    for (Element& value : values) value = Type::narrow(normal(random));
    return values;
  };
  constexpr int64_t kPanels = 2 * puna::kStripPanels + 1, kCols = 514;  // two blocks of columns
  constexpr int64_t kStride = kPanels * kPanelRows;
  const std::vector<Element> weights = draw(kPanels * kPanelRows * kCols);
  for (const KernelTable& table : runnable_isas()) {
    for (int64_t rows : {1, 7, 9, 30, 100}) {
      const std::vector<Element> x = draw(rows * kCols);
      for (int64_t width : {int64_t{65}, int64_t{128}, puna::kStripPanels * kPanelRows,
                            puna::kStripPanels * kPanelRows + 3, kStride - 1}) {
        std::vector<float> bias(width);
        for (float& value : bias) value = normal(random);
        std::vector<float> all(rows * kStride, 7.0f), each(rows * kStride, 7.0f);
        const auto run = [&](std::vector<float>& out, int64_t column, int64_t count) {
          Type::gemm(table)(out.data() + column, kStride, x.data(), kCols,
                            weights.data() + column * kCols, bias.data() + column, rows, kCols,
                            count);
        };
        run(all, 0, width);
        for (int64_t column = 0; column < width; column += kPanelRows) {
          run(each, column, std::min(kPanelRows, width - column));
        }
        bool same = true;
        for (size_t i = 0; i < all.size(); ++i) same &= same_bits(all[i], each[i]);
        check::report(same, __FILE__, __LINE__,
                      std::string(table.isa) + ": " + std::to_string(rows) + " rows by " +
                          std::to_string(width) + " columns differ from panel by panel");
      }
    }
  }
}
TEST(gemm_f32_takes_several_panels) { check_several_panels<Float32>(); }
TEST(gemm_bf16_takes_several_panels) { check_several_panels<BFloat16>(); }

TEST(ceilings_do_their_work) {
  std::vector<uint64_t> data(4 * puna::kPanelRows, 7);
  const int64_t bytes = static_cast<int64_t>(data.size() * sizeof(uint64_t));
  for (const KernelTable& table : runnable_isas()) {
    const uint64_t before = table.read_bytes(data.data(), bytes);
    for (size_t i = 0; i < data.size(); i += 5) {
      data[i] += 1;
      CHECK(table.read_bytes(data.data(), bytes) != before);
      data[i] -= 1;
    }
    for (auto peak : {table.peak_f32, table.peak_bf16, table.peak_int8}) {
      int64_t few = 0, many = 0;
      CHECK(std::isfinite(peak(1, &few)));
      CHECK(std::isfinite(peak(1000, &many)));
      CHECK(few > 0);
      CHECK_EQ(many, 1000 * few);
    }
  }
}

}  // namespace
