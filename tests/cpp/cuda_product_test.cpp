// Products of the CUDA backend with quantised weights, on the emulator: in every format the bits
// are those of the CPU's, for any number of rows and under every schedule.
#include <algorithm>

#define PUNA_TEST_PRODUCTS
#include "cuda_subjects.h"
#include "quant/encode.h"

using namespace fixture;

namespace {

Backend& cpu() {
  static const auto backend = make_cpu_backend({"", 1});
  return *backend;
}

// Packed weights of any format: random bytes, with scales and offsets of sensible size.
struct Packed {
  Packed(std::mt19937& random, WeightFormat format, int64_t rows, int64_t cols)
      : format(format), rows(rows), cols(cols), bytes(packed_bytes(format, rows, cols) + kAlign) {
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    with_traits(format, [&](auto traits) {
      using Format = decltype(traits);
      const size_t blocks = packed_bytes(format, rows, cols) / PanelLayout<Format>::kBytes;
      for (size_t block = 0; block < blocks; ++block) {
        uint8_t* at = data() + block * PanelLayout<Format>::kBytes;
        // Scales, and offsets behind them.
        const int64_t halves = kPanelRows * (Format::kOffset ? 2 : 1);
        for (int64_t i = 0; i < halves; ++i) {
          const uint16_t half = f16_of_float(randoms(random, 1, 0.01f)[0]);
          std::memcpy(at + 2 * i, &half, 2);
        }
      }
    });
  }
  uint8_t* data() {
    auto place = reinterpret_cast<uintptr_t>(bytes.data());
    return reinterpret_cast<uint8_t*>((place + kAlign - 1) / kAlign * kAlign);
  }
  WeightRef adopt(Backend& backend) {
    return backend.adopt_matrix(format, rows, cols, {std::shared_ptr<const void>(), data()});
  }

  static constexpr size_t kAlign = 64;
  WeightFormat format;
  int64_t rows, cols;
  std::vector<uint8_t> bytes;
};

void check_products(WeightFormat format) {
  std::mt19937 random(1);
  // One row: the last of its columns are a part of a unit, of a span of it, or whole spans; more
  // units than a warp has stages.
  for (const auto& [rows, cols, count] : {std::array<int64_t, 3>{70, 300, 1},
                                          {40, 33, 1},
                                          {33, 470, 1},
                                          {130, 5216, 1},
                                          {64, 5200, 8},
                                          {130, 520, 21},
                                          {70, 700, 66}}) {  // the last: more spans than stages
    Packed packed(random, format, rows, cols);
    const std::vector<float> x = randoms(random, count * cols), bias = randoms(random, rows);
    const auto run = [&](Backend& backend) {
      std::vector<float> out(count * rows);
      const VectorRef added = load_vector(backend, bias);
      backend.matmul({out.data(), count, rows}, {x.data(), count, cols}, packed.adopt(backend),
                     {.bias = &added});
      return out;
    };
    const std::vector<float> expected = run(cpu());
    for (Named& subject : subjects()[0])
      check_same_bits(std::string(name_of(format)) + " on " + subject.name,
                      run(*subject.backend).data(), expected.data(), expected.size());
  }
}

}  // namespace

#define PUNA_FORMAT(Traits, name) \
  TEST(products_of_##Traits##_have_the_bits_of_the_cpu) { check_products(WeightFormat::k##Traits); }
#include "quant/formats.inc"
#undef PUNA_FORMAT

// Codes of 8 bits as floats: what the reference makes of the same codes, but for the roundings of
// sums in fp32.
TEST(products_of_float8_are_near_the_reference) {
  std::mt19937 random(4);
  for (const auto& [rows, cols, count] :
       {std::array<int64_t, 3>{70, 300, 1}, {64, 1150, 3}, {130, 33, 21}}) {
    Matrix matrix = random_matrix(random, rows, cols, DType::kF32);
    for (int64_t c = 0; c < cols;
         c += 3)  // of every exponent, those below the normal ones included
      for (int64_t r = 0; r < rows; ++r)
        matrix.values[r * cols + c] *= std::ldexp(1.0f, -static_cast<int>(random() % 20));
    const std::vector<float> x = randoms(random, count * cols);
    const auto run = [&](Backend& backend, const std::vector<float>& in) {
      const MatrixSource part = matrix.source();
      std::vector<float> out(count * rows);
      backend.matmul({out.data(), count, rows}, {in.data(), count, cols},
                     backend.load_matrix({&part, 1}, {WeightFormat::kFP8}), {});
      return out;
    };
    std::vector<double> bound;
    for (int64_t t = 0; t < count; ++t)
      for (int64_t r = 0; r < rows; ++r) {
        double size = 1e-30;
        for (int64_t c = 0; c < cols; ++c)  // a code is at most 1/16 from its weight
          size += 1.07 * std::abs(matrix.at(r, c) * x[t * cols + c]);
        bound.push_back(static_cast<double>(cols + 4) * kEps * size);
      }
    const std::vector<float> expected = run(ref(), x);
    for (Named& subject : subjects()[0])
      check_close("float8 on " + subject.name, run(*subject.backend, x), expected, bound);
  }
}

// What rounds to nothing, what overflows, and what is no number.
TEST(odd_activations_have_the_bits_of_the_cpu) {
  std::mt19937 random(2);
  const int64_t rows = 64, cols = 256, count = 6;
  Packed packed(random, WeightFormat::kInt4G32, rows, cols);
  std::vector<float> x = randoms(random, count * cols);
  std::fill_n(x.begin(), cols, 0.0f);
  for (int64_t c = 0; c < cols; ++c) {
    x[cols + c] *= 1e-35f;
    x[2 * cols + c] *= 1e30f;
  }
  x[3 * cols + 200] = INFINITY;
  x[4 * cols + 5] = NAN;
  const auto run = [&](Backend& backend) {
    std::vector<float> out(count * rows);
    backend.matmul({out.data(), count, rows}, {x.data(), count, cols}, packed.adopt(backend), {});
    for (float& value : out)
      if (std::isnan(value)) value = NAN;  // any of them
    return out;
  };
  const std::vector<float> expected = run(cpu());
  CHECK(std::isnan(expected[3 * rows]) && std::isnan(expected[4 * rows]));
  for (Named& subject : subjects()[0])
    check_same_bits("odd on " + subject.name, run(*subject.backend).data(), expected.data(),
                    expected.size());
}

namespace {

// A layer's experts in int8, the last of them the shared one.
struct QuantizedExperts {
  QuantizedExperts(std::mt19937& random, int64_t hidden, int64_t width, int64_t experts)
      : hidden(hidden), router(random_matrix(random, experts, hidden, DType::kF32)) {
    for (int64_t e = 0; e <= experts; ++e) {
      ups.push_back(random_matrix(random, 2 * width, hidden, DType::kF32));
      downs.push_back(random_matrix(random, hidden, width, DType::kF32));
    }
  }
  // What they add to ones, from the first rows of x.
  std::vector<float> run(Backend& backend, const std::vector<float>& x, int64_t rows,
                         int64_t top_k) const {
    const auto load = [&](const Matrix& matrix) {
      const MatrixSource part = matrix.source();
      return backend.load_matrix({&part, 1}, {WeightFormat::kInt8G32});
    };
    MoeWeights weights;
    weights.router = router.load(backend, true);
    weights.shared_gate_up = load(ups.back());
    weights.shared_down = load(downs.back());
    for (size_t e = 0; e + 1 < ups.size(); ++e) {
      weights.gate_up.push_back(load(ups[e]));
      weights.down.push_back(load(downs[e]));
    }
    weights.top_k = top_k;
    std::vector<float> out(rows * hidden, 1.0f);
    backend.moe({out.data(), rows, hidden}, {x.data(), rows, hidden}, weights);
    return out;
  }
  // On every subject near the CPU's, but for the roundings of silu, and the same bits.
  void check(const std::vector<float>& x, int64_t rows, int64_t top_k) const {
    const std::vector<float> expected = run(cpu(), x, rows, top_k);
    // An activation may round to the other of two codes: 1/127 of the largest, times a weight.
    const std::vector<double> bound(expected.size(), 0.01 * static_cast<double>(top_k + 1));
    std::vector<float> first;
    for (Named& subject : subjects()[0]) {
      const std::vector<float> got = run(*subject.backend, x, rows, top_k);
      check_close("experts on " + subject.name, got, expected, bound);
      if (first.empty()) first = got;
      check_same_bits("experts on " + subject.name, got.data(), first.data(), got.size());
    }
  }

  int64_t hidden;
  Matrix router;
  std::vector<Matrix> ups, downs;
};

}  // namespace

// One row, few, with which the shared expert is part of the others' products, more, and large
// tiles.
TEST(quantized_experts_are_near_the_cpu) {
  std::mt19937 random(3);
  const QuantizedExperts experts(random, 96, 80, 5);
  const std::vector<float> x = randoms(random, 340 * experts.hidden);
  for (const auto& [rows, top_k] :
       {std::pair<int64_t, int64_t>{1, 1}, {3, 1}, {9, 3}, {20, 1}, {20, 3}, {340, 1}})
    experts.check(x, rows, top_k);
}

// Of so many columns that several warps fetch parts of the row for all of them.
TEST(experts_of_one_row_are_near_the_cpu) {
  std::mt19937 random(5);
  const QuantizedExperts experts(random, 1120, 1056, 2);
  experts.check(randoms(random, experts.hidden), 1, 1);
}

// Of few rows the router normalises its rows itself: several rows to a block, several blocks to a
// row, more experts than a warp has; columns that end anywhere, in a span that operands go beyond,
// and beyond those that registers hold.
TEST(rows_normalised_by_the_router_have_the_bits_of_rows_normalised_before) {
  std::mt19937 random(6);
  struct Case {
    int64_t rows, hidden, experts, top_k;
    WeightFormat format;
  };
  for (const Case& of :
       {Case{4, 70, 3, 2, WeightFormat::kInt4G32}, Case{1, 380, 43, 1, WeightFormat::kInt4K},
        Case{1, 6300, 2, 1, WeightFormat::kInt8G32}}) {
    constexpr int64_t kWidth = 32;
    const Matrix router = random_matrix(random, of.experts, of.hidden, DType::kF32);
    std::vector<Packed> gate_up, down;  // the last ones are the shared expert's
    for (int64_t e = 0; e <= of.experts; ++e) {
      gate_up.emplace_back(random, of.format, 2 * kWidth, of.hidden);
      down.emplace_back(random, of.format, of.hidden, kWidth);
    }
    constexpr int64_t kMost = 4;
    const std::vector<float> x = randoms(random, kMost * of.hidden),
                             weight = randoms(random, of.hidden);
    const auto results = [&](int ordinal, size_t batch_kernels) {
      const auto backend = make_cuda_backend(emulator::device_table(), ordinal,
                                             make_cpu_backend({"", 1}), batch_kernels);
      MoeWeights moe;
      moe.router = router.load(*backend);
      moe.top_k = of.top_k;
      moe.shared_gate_up = gate_up.back().adopt(*backend);
      moe.shared_down = down.back().adopt(*backend);
      for (int64_t e = 0; e < of.experts; ++e) {
        moe.gate_up.push_back(gate_up[e].adopt(*backend));
        moe.down.push_back(down[e].adopt(*backend));
      }
      const VectorRef norm = load_vector(*backend, weight);
      const size_t bytes = x.size() * sizeof(float);
      const Buffer memory[] = {backend->allocate(bytes), backend->allocate(bytes)};
      const Rows residual(memory[0].floats(), kMost, of.hidden);
      const Rows normed(memory[1].floats(), kMost, of.hidden);
      backend->from_host(residual, x.data());
      const auto layer = [&](const Rows& from, int64_t rows) {
        backend->rms_norm(normed.slice(0, rows), from.slice(0, rows), norm, 1e-5f);
        backend->moe(residual.slice(0, rows), normed.slice(0, rows), moe);
      };
      layer(residual, kMost);  // so that memory is not zeros any more
      layer(residual, of.rows);
      // What adds up experts before, and what is in place, comes before the router.
      layer(residual, of.rows);
      layer(normed, of.rows);
      std::vector<std::vector<float>> all;
      for (const Rows& each : {residual, normed}) {
        all.emplace_back(x.size());
        backend->to_host(all.back().data(), each);
      }
      return all;
    };
    const auto apart = results(0, 1);
    for (const std::vector<float>& values : apart)
      CHECK(std::ranges::all_of(values, [](float value) { return std::isfinite(value); }));
    for (const int ordinal : ordinals()) CHECK(results(ordinal, 0) == apart);
  }
}
