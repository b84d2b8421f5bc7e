// float8 e4m3: the numbers, quantising to them, and products of every instruction set this machine
// can run, bit for bit as kernel_table.h defines them and close to double.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "backend_fixture.h"
#include "base/float8.h"
#include "kernels/cpu/dispatch.h"
#include "quant/blocks.h"
#include "quant/fp8.h"

namespace {

using namespace puna;
using namespace fixture;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// By the definition: sign, 4 bits of exponent with a bias of 7, 3 bits of mantissa.
double value_by_definition(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return code & 0x80 ? -magnitude : magnitude;
}

TEST(every_code_has_its_value) {
  CHECK(float_of_e4m3(0x7e) == 448.0f);  // known points
  CHECK(float_of_e4m3(0x38) == 1.0f);
  CHECK(float_of_e4m3(0x01) == 0x1p-9f);
  CHECK(float_of_e4m3(0xbc) == -1.5f);
  for (int code = 0; code < 256; ++code) {
    const float value = float_of_e4m3(static_cast<uint8_t>(code));
    const bool nan = (code & 0x7f) == 0x7f;
    CHECK(std::isnan(value) == nan && is_nan_e4m3(static_cast<uint8_t>(code)) == nan);
    if (nan) continue;
    CHECK(value == value_by_definition(code));
    CHECK(std::signbit(value) == (code >= 0x80));
    CHECK(e4m3_of_float(value) == code);
  }
  CHECK(is_nan_e4m3(e4m3_of_float(kNaN)) && is_nan_e4m3(e4m3_of_float(-kNaN)));
}

TEST(rounding_is_to_nearest_even_and_saturates) {
  for (int code = 0; code < 0x7e; ++code) {
    const float low = float_of_e4m3(static_cast<uint8_t>(code));
    const float high = float_of_e4m3(static_cast<uint8_t>(code + 1));
    const float middle = (low + high) / 2;
    const int even = code % 2 ? code + 1 : code;
    for (const int sign : {0, 0x80}) {
      const float s = sign ? -1.0f : 1.0f;
      CHECK(e4m3_of_float(s * middle) == (sign | even));
      CHECK(e4m3_of_float(s * std::nextafterf(middle, 0.0f)) == (sign | code));
      CHECK(e4m3_of_float(s * std::nextafterf(middle, 1e9f)) == (sign | (code + 1)));
    }
  }
  for (const float large : {448.0f, 449.0f, 464.0f, 480.0f, 1e9f, kInfinity}) {
    CHECK(e4m3_of_float(large) == 0x7e);
    CHECK(e4m3_of_float(-large) == 0xfe);
  }
  for (const float small : {0.0f, 0x1p-149f, 0x1p-11f, 0x1p-10f}) {
    CHECK(e4m3_of_float(small) == 0);
    CHECK(e4m3_of_float(-small) == 0x80);
  }
}

// Panels of random codes. Rows past `width` are zero, as packing leaves them.
struct Panel {
  std::vector<float> memory;
  int64_t cols;
  Panel(std::mt19937& random, int64_t cols, int64_t width)
      : memory(panel_bytes(WeightFormat::kFP8, cols) / sizeof(float)), cols(cols) {
    for (int64_t n = 0; n < width; ++n) {
      memory[n] = std::exp2f(static_cast<float>(random() % 40) - 20.0f) * 1.37f;
      for (int64_t c = 0; c < cols; ++c) {
        auto code = static_cast<uint8_t>(random());
        if (is_nan_e4m3(code)) code = static_cast<uint8_t>(random() % 8);  // subnormal
        codes()[c * kPanelRows + n] = code;
      }
    }
  }
  uint8_t* codes() { return reinterpret_cast<uint8_t*>(memory.data() + kPanelRows); }
  float scale(int64_t n) const { return memory[n]; }
  float value(int64_t n, int64_t c) { return float_of_e4m3(codes()[c * kPanelRows + n]); }
};

TEST(products_are_those_of_the_definition) {
  std::mt19937 random(5);
  for (int round = 0; round < 60; ++round) {
    const auto draw = [&](int64_t most) { return static_cast<int64_t>(random() % most) + 1; };
    // Some past the kernels' blocks of 96 rows and chunks of 256 columns.
    const int64_t rows = round % 4 ? draw(13) : draw(220), cols = round % 3 ? draw(70) : draw(600);
    const int64_t width = round % 2 ? kPanelRows : draw(kPanelRows), stride = cols + 3;
    Panel panel(random, cols, width);
    std::vector<float> x = randoms(random, rows * stride), bias = randoms(random, width);
    std::vector<float> expected(rows * width);
    std::vector<double> exact(rows * width), bound(rows * width);
    const bool with_bias = round % 5 != 0;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t n = 0; n < width; ++n) {
        float sum = 0;
        double total = 0, size = 0;
        for (int64_t c = 0; c < cols; ++c) {
          sum = std::fmaf(panel.value(n, c) / 256, x[r * stride + c], sum);
          const double term = static_cast<double>(panel.value(n, c)) * x[r * stride + c];
          total += term;
          size += std::abs(term);
        }
        const int64_t i = r * width + n;
        const float scaled = sum * (panel.scale(n) * 256);
        expected[i] = with_bias ? scaled + bias[n] : scaled;
        exact[i] = total * panel.scale(n) + (with_bias ? bias[n] : 0.0f);
        // One rounding a term, one of the scale, one of the bias.
        bound[i] =
            (size * panel.scale(n) * static_cast<double>(cols + 1) + std::abs(exact[i])) * 0x1p-24;
      }
    }
    for (const KernelTable* isa : compiled_isas()) {
      if (!isa->supported()) continue;
      const KernelTable table = resolve_isa(isa->isa);
      const int64_t out_stride = width + 2;
      std::vector<float> got(rows * out_stride, 777.0f), tight(rows * width);
      table.gemm_fp8(got.data(), out_stride, x.data(), stride, panel.memory.data(),
                     with_bias ? bias.data() : nullptr, rows, cols, width);
      for (int64_t r = 0; r < rows; ++r) {
        std::copy_n(got.data() + r * out_stride, width, tight.data() + r * width);
        CHECK(got[r * out_stride + width] == 777.0f && got[r * out_stride + width + 1] == 777.0f);
      }
      check_same_bits(table.isa, tight.data(), expected.data(), tight.size());
      for (size_t i = 0; i < tight.size(); ++i) CHECK(std::abs(tight[i] - exact[i]) <= bound[i]);
    }
  }
}

// A float8 source of a checkpoint: codes in either order, scales of any float type, shared or not.
struct Source {
  std::vector<uint8_t> codes;  // [rows][cols], or transposed
  std::vector<uint16_t> half;  // scales, bfloat16
  std::vector<float> scales;   // the same widened
  MatrixSource part;
  std::vector<float> values;  // [rows][cols]
};
Source random_source(std::mt19937& random, int64_t rows, int64_t cols, int64_t rows_each,
                     bool transposed, DType scale_type) {
  Source source;
  for (int64_t i = 0; i < rows * cols; ++i) {
    auto code = static_cast<uint8_t>(random());
    source.codes.push_back(is_nan_e4m3(code) ? uint8_t{3} : code);
  }
  for (int64_t i = 0; i < (rows + rows_each - 1) / rows_each; ++i) {
    source.half.push_back(bf16_of_float(std::exp2f(static_cast<float>(random() % 9)) * 1e-3f));
    source.scales.push_back(float_of_bf16(source.half.back()));
  }
  source.part = {DType::kF8E4M3, source.codes.data(),   rows,
                 cols,           transposed ? 1 : cols, transposed ? rows : 1};
  source.part.scales = {scale_type,
                        scale_type == DType::kF32 ? static_cast<const void*>(source.scales.data())
                                                  : source.half.data(),
                        rows_each};
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c)
      source.values.push_back(
          float_of_e4m3(source.codes[transposed ? c * rows + r : r * cols + c]) *
          source.scales[r / rows_each]);
  return source;
}

TEST(float8_sources_keep_their_bits) {
  std::mt19937 random(6);
  const int64_t cols = 301;
  for (const bool transposed : {false, true}) {
    // More rows than a lane takes at once; one scale a row, one for all, one a half.
    const Source first = random_source(random, 700, cols, 1, transposed, DType::kF32);
    const Source second = random_source(random, 90, cols, 90, transposed, DType::kBF16);
    const Source third = random_source(random, 46, cols, 23, transposed, DType::kBF16);
    const MatrixSource parts[] = {first.part, second.part, third.part};
    std::vector<float> values = first.values;
    values.insert(values.end(), second.values.begin(), second.values.end());
    values.insert(values.end(), third.values.begin(), third.values.end());
    const int64_t rows = 836;
    const WeightRef truth = ref().load_matrix(parts);
    check_same_bits("ref", static_cast<const float*>(truth.data.get()), values.data(),
                    values.size());
    for (std::vector<Named>& same_isa : subjects()) {
      for (Named& cpu : same_isa) {
        const WeightRef weight = cpu.backend->load_matrix(parts);
        CHECK(weight.format == WeightFormat::kFP8);
        CHECK_EQ(weight.bytes, static_cast<size_t>(14 * (64 * 4 + 64 * cols)));
        std::vector<float> row(cols);
        for (int64_t r = 0; r < rows; ++r) {
          unpack_row(weight.format, weight.data.get(), r, cols, row.data());
          check_same_bits(cpu.name, row.data(), values.data() + r * cols, row.size());
        }
      }
    }
    // To another format: as its values are, whatever they were stored in.
    Backend& backend = *subjects()[0][1].backend;
    const MatrixSource plain{DType::kF32, values.data(), rows, cols, cols, 1};
    for (const WeightFormat format : {WeightFormat::kInt8G32, WeightFormat::kInt4G32}) {
      const WeightRef one = backend.load_matrix(parts, {format});
      const WeightRef two = backend.load_matrix({&plain, 1}, {format});
      CHECK(std::memcmp(one.data.get(), two.data.get(), one.bytes) == 0);
    }
  }
}

TEST(a_row_with_not_a_number_is_not_a_number) {
  std::mt19937 random(7);
  for (const bool transposed : {false, true}) {
    Source source = random_source(random, 130, 70, 1, transposed, DType::kF32);
    for (const uint8_t code : {0x7f, 0xff}) {
      const int64_t row = code == 0x7f ? 5 : 127, col = 66;
      source.codes[transposed ? col * 130 + row : row * 70 + col] = code;
    }
    const std::vector<float> x = randoms(random, 8 * 70);
    for (std::vector<Named>& same_isa : subjects()) {
      Backend& backend = *same_isa[1].backend;
      const WeightRef weight = backend.load_matrix({&source.part, 1});
      std::vector<float> out(8 * 130);
      backend.matmul({out.data(), 8, 130}, {x.data(), 8, 70}, weight, {});
      for (int64_t i = 0; i < 8 * 130; ++i)
        CHECK(std::isnan(out[i]) == (i % 130 == 5 || i % 130 == 127));
    }
  }
}

TEST(quantised_rows_lose_half_a_step_at_most) {
  std::mt19937 random(8);
  std::vector<float> x = randoms(random, 6 * 500);
  for (int64_t c = 0; c < 500; ++c) x[1 * 500 + c] = 0.0f;
  x[2 * 500 + 7] = 1e30f;  // an outlier: the rest vanishes
  for (int64_t c = 0; c < 500; ++c) x[3 * 500 + c] *= 1e-35f;
  x[4 * 500 + 3] = kNaN;       // counts as 0
  x[5 * 500 + 3] = kInfinity;  // as the largest float
  const MatrixSource part{DType::kF32, x.data(), 6, 500, 500, 1};
  const WeightRef weight = subjects()[0][0].backend->load_matrix({&part, 1}, {WeightFormat::kFP8});
  std::vector<float> row(500);
  for (int64_t r = 0; r < 6; ++r) {
    unpack_row(weight.format, weight.data.get(), r, 500, row.data());
    float most = 0;
    for (int64_t c = 0; c < 500; ++c) {
      x[r * 500 + c] = fp8_finite(x[r * 500 + c]);
      most = std::max(most, std::abs(x[r * 500 + c]));
    }
    for (int64_t c = 0; c < 500; ++c) {
      const double wanted = x[r * 500 + c];
      // Half of the last of 3 bits, or of the smallest step, and the rounding of the scale.
      const double allowed = std::max(std::abs(wanted) / 16, most / 448.0 * 0x1p-10) * (1 + 1e-6);
      if (r != 3) CHECK(std::abs(row[c] - wanted) <= allowed);
      if (r == 3) CHECK(row[c] == 0.0f);  // below 2^-100
    }
    if (r == 0) CHECK(std::abs(*std::max_element(row.begin(), row.end())) > 1);
  }
}

TEST(float8_without_scales_is_refused) {
  std::mt19937 random(9);
  Source source = random_source(random, 8, 64, 1, false, DType::kF32);
  for (Backend* backend : {&ref(), subjects()[0][0].backend.get()}) {
    CHECK_THROWS(ErrorCode::kUnsupported,
                 backend->load_matrix({&source.part, 1}, {WeightFormat::kF32}));
    CHECK_THROWS(ErrorCode::kUnsupported,
                 backend->load_matrix({&source.part, 1}, {WeightFormat::kBF16}));
    MatrixSource bare = source.part;
    bare.scales = {};
    CHECK_THROWS(ErrorCode::kInternal, backend->load_matrix({&bare, 1}));
  }
}

}  // namespace
