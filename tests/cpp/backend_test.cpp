// Every row-wise operation of the CPU backend against the reference, on each instruction set; equal
// bits on 1, 2 and 3 threads, and for a row alone or among others. Attention has its own file.
#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>

#include "backend_fixture.h"

using namespace fixture;

namespace {

// One operation on fixed data. run(backend, first, count, out) computes its rows [first, first +
// count) into out[count][cols].
struct Case {
  std::string name;
  int64_t rows, cols;
  std::function<void(Backend&, int64_t first, int64_t count, float* out)> run;
  std::vector<double> bound;  // [rows][cols]: how far from the reference
};

Rows rows_of(float* data, int64_t rows, int64_t cols) { return {data, rows, cols}; }

void check_case(const Case& test) {
  const auto run = [&](Backend& backend, int64_t first, int64_t count) {
    std::vector<float> out(static_cast<size_t>(count * test.cols));
    test.run(backend, first, count, out.data());
    return out;
  };
  const std::vector<float> expected = run(ref(), 0, test.rows);
  for (std::vector<Named>& same_isa : subjects()) {
    const std::vector<float> all = run(*same_isa[0].backend, 0, test.rows);
    check_close(test.name + " on " + same_isa[0].name, all, expected, test.bound);
    for (Named& other : same_isa) {
      const std::string what = test.name + " on " + other.name;
      check_same_bits(what, run(*other.backend, 0, test.rows).data(), all.data(), all.size());
      for (int64_t row = 0; row < test.rows; row += 1 + row / 2) {
        const auto alone = run(*other.backend, row, 1);
        check_same_bits(what + ", row " + std::to_string(row) + " alone", alone.data(),
                        all.data() + row * test.cols, alone.size());
      }
      const int64_t first = test.rows / 3, count = test.rows - first;
      const auto tail = run(*other.backend, first, count);
      check_same_bits(what + ", the last rows", tail.data(), all.data() + first * test.cols,
                      tail.size());
    }
  }
}

// A value with a bound on the error that fp32 arithmetic may have made.
struct Bounded {
  double value = 0, error = 0;
};
using BoundedRow = std::vector<Bounded>;

BoundedRow exact(const float* x, int64_t n) {
  BoundedRow row;
  for (int64_t i = 0; i < n; ++i) row.push_back({x[i], 0});
  return row;
}

// W x with x rounded to the weights' type, and the sum of k terms in fp32: each of the k products
// passes through at most k + 2 roundings.
BoundedRow product(const Matrix& weight, const BoundedRow& x) {
  BoundedRow out;
  for (int64_t r = 0; r < weight.rows; ++r) {
    Bounded sum;
    for (int64_t c = 0; c < weight.cols; ++c) {
      const double w = weight.at(r, c), size = std::abs(w) * (std::abs(x[c].value) + x[c].error);
      sum.value += w * x[c].value;
      sum.error += std::abs(w) * x[c].error;
      sum.error +=
          size * (static_cast<double>(weight.cols + 2) * kEps + (weight.bf16() ? kEpsBF16 : 0));
    }
    out.push_back(sum);
  }
  return out;
}

double silu(double x) { return x / (1 + std::exp(-x)); }

BoundedRow feed_forward(const Matrix& gate_up, const Matrix& down, const BoundedRow& x) {
  const BoundedRow both = product(gate_up, x);
  BoundedRow activated;
  for (int64_t i = 0; i < down.cols; ++i) {
    const Bounded gate = both[i], up = both[down.cols + i];
    const double s = silu(gate.value);
    const double s_error = 1.1 * gate.error + 8 * kEps * std::abs(s);  // |silu'| < 1.1
    activated.push_back({s * up.value, s_error * (std::abs(up.value) + up.error) +
                                           std::abs(s) * up.error +
                                           2 * kEps * std::abs(s * up.value)});
  }
  return product(down, activated);
}

void add(BoundedRow& sum, const BoundedRow& x) {
  for (size_t i = 0; i < sum.size(); ++i) {
    sum[i].value += x[i].value;
    sum[i].error += x[i].error + kEps * (std::abs(sum[i].value) + sum[i].error);
  }
}

void append_bounds(std::vector<double>& bound, const BoundedRow& row) {
  for (const Bounded& b : row) bound.push_back(b.error + 2 * kEps * std::abs(b.value) + 1e-30);
}

const DType kTypes[] = {DType::kF32, DType::kBF16};

}  // namespace

TEST(matmul) {
  std::mt19937 random(1);
  const int64_t shapes[][3] = {{1, 72, 50},  {3, 5, 1},     {7, 73, 64},    {40, 300, 200},
                               {17, 1, 65},  {2, 511, 129}, {130, 133, 70}, {1, 600, 700},
                               {64, 96, 16}, {9, 257, 300}};
  for (const DType dtype : kTypes)
    for (const auto& [rows, k, n] : shapes)
      for (const int epilogue : {0, 1, 2, 3}) {
        const bool with_bias = epilogue & 1, with_gelu = epilogue == 3, accumulate = epilogue >= 2;
        const Matrix weight = random_matrix(random, n, k, dtype);
        const std::vector<float> x = randoms(random, rows * k), bias = randoms(random, n);
        const std::vector<float> start = randoms(random, rows * n);
        Case test{"matmul " + std::to_string(rows) + "x" + std::to_string(k) + "x" +
                      std::to_string(n) + " " + name_of(dtype) + " epilogue " +
                      std::to_string(epilogue),
                  rows,
                  n,
                  [&](Backend& backend, int64_t first, int64_t count, float* out) {
                    std::copy_n(start.data() + first * n, count * n, out);
                    const WeightRef packed = weight.load(backend);
                    const VectorRef bias_ref = load_vector(backend, bias);
                    const ConstRows input(x.data() + first * k, count, k);
                    backend.matmul(rows_of(out, count, n), input, packed,
                                   {with_bias ? &bias_ref : nullptr, with_gelu, accumulate});
                  },
                  {}};
        for (int64_t r = 0; r < rows; ++r) {
          BoundedRow row = product(weight, exact(x.data() + r * k, k));
          for (int64_t c = 0; c < n; ++c) {
            if (with_bias) {
              row[c].value += bias[c];
              row[c].error += kEps * (std::abs(row[c].value) + row[c].error);
            }
            if (with_gelu) {  // |gelu'| < 1.13; erf near -1 loses digits of the sum 1 + erf
              const double v = row[c].value;
              row[c].error = 1.13 * row[c].error + 8 * kEps * std::abs(v);
              row[c].value = 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
            }
          }
          if (accumulate) add(row, exact(start.data() + r * n, n));
          append_bounds(test.bound, row);
        }
        check_case(test);
      }
}

TEST(mlp) {
  std::mt19937 random(2);
  for (const DType dtype : kTypes)
    for (const auto& [rows, hidden, width] :
         {std::array<int64_t, 3>{1, 72, 50}, {5, 64, 128}, {40, 73, 33}, {13, 300, 1100}}) {
      const Matrix gate_up = random_matrix(random, 2 * width, hidden, dtype);
      const Matrix down = random_matrix(random, hidden, width, dtype);
      const std::vector<float> x = randoms(random, rows * hidden);
      const std::vector<float> start = randoms(random, rows * hidden);
      const int64_t n = hidden;
      Case test{"mlp " + std::to_string(rows) + " " + name_of(dtype),
                rows,
                hidden,
                [&](Backend& backend, int64_t first, int64_t count, float* out) {
                  std::copy_n(start.data() + first * n, count * n, out);
                  backend.mlp(rows_of(out, count, n), {x.data() + first * n, count, n},
                              gate_up.load(backend), down.load(backend));
                },
                {}};
      for (int64_t r = 0; r < rows; ++r) {
        BoundedRow row = exact(start.data() + r * n, n);
        add(row, feed_forward(gate_up, down, exact(x.data() + r * n, n)));
        append_bounds(test.bound, row);
      }
      check_case(test);
    }
}

namespace {

// `on_host`: with the routed experts of the backend's host().
void check_moe(bool on_host) {
  std::mt19937 random(3);
  for (const DType dtype : kTypes)
    for (const auto& [rows, hidden, width, experts, top_k] :
         {std::array<int64_t, 5>{1, 72, 50, 5, 1},
          {40, 72, 50, 5, 2},
          {23, 65, 64, 5, 3},
          {3, 130, 33, 76, 1},
          {9, 64, 1030, 2, 2}}) {
      const MoeData data(random, hidden, width, experts, top_k, dtype);
      const int64_t n = hidden;
      const std::vector<float> start = randoms(random, rows * n);
      std::vector<float> x;
      std::vector<double> bound;
      // Rows whose choice of experts hangs on a rounding are no use here: another is drawn.
      for (int64_t r = 0; r < rows;) {
        const std::vector<float> candidate = randoms(random, n);
        Matrix router = data.router;
        router.dtype = DType::kF32;
        const BoundedRow logits = product(router, exact(candidate.data(), n));
        std::vector<int64_t> order(experts);
        std::iota(order.begin(), order.end(), int64_t{0});
        std::sort(order.begin(), order.end(),
                  [&](int64_t a, int64_t b) { return logits[a].value > logits[b].value; });
        if (top_k < experts) {
          const Bounded in = logits[order[top_k - 1]], out = logits[order[top_k]];
          if (in.value - in.error <= out.value + out.error) continue;
        }
        BoundedRow sum = exact(start.data() + r * n, n);
        add(sum, feed_forward(data.shared_gate_up, data.shared_down, exact(candidate.data(), n)));
        for (int64_t i = 0; i < top_k; ++i) {
          const Bounded logit = logits[order[i]];
          const double score = 1 / (1 + std::exp(-logit.value));
          BoundedRow scaled;
          for (int64_t c = 0; c < n; ++c)  // |sigmoid'| <= 1/4
            scaled.push_back(
                {score * candidate[c], std::abs(candidate[c]) * (0.25 * logit.error + 2 * kEps)});
          add(sum, feed_forward(data.gate_up[order[i]], data.down[order[i]], scaled));
        }
        append_bounds(bound, sum);
        x.insert(x.end(), candidate.begin(), candidate.end());
        ++r;
      }
      check_case(
          {"moe " + std::to_string(rows) + " top " + std::to_string(top_k) + " " + name_of(dtype),
           rows, hidden,
           [&](Backend& backend, int64_t first, int64_t count, float* out) {
             std::copy_n(start.data() + first * n, count * n, out);
             backend.moe(rows_of(out, count, n), {x.data() + first * n, count, n},
                         data.load(backend, on_host));
           },
           bound});
    }
}

}  // namespace

TEST(moe) { check_moe(false); }

TEST(moe_ties_go_to_the_lower_expert_and_nan_harms_its_row_only) {
  std::mt19937 random(4);
  const int64_t n = 64;
  MoeData data(random, n, 32, 6, 2, DType::kF32);
  for (int64_t e = 1; e < 6; ++e)  // all logits are equal
    std::copy_n(data.router.values.begin(), n, data.router.values.begin() + e * n);
  MoeData first_two = data;
  first_two.gate_up.resize(2);
  first_two.down.resize(2);
  first_two.router.rows = 2;
  const std::vector<float> x = randoms(random, 3 * n);
  for (std::vector<Named>& same_isa : subjects())
    for (Named& cpu : same_isa) {
      std::vector<float> a(3 * n), b(3 * n);
      cpu.backend->moe({a.data(), 3, n}, {x.data(), 3, n}, data.load(*cpu.backend));
      cpu.backend->moe({b.data(), 3, n}, {x.data(), 3, n}, first_two.load(*cpu.backend));
      check_same_bits("ties on " + cpu.name, a.data(), b.data(), a.size());

      std::vector<float> poisoned = x;
      poisoned[n + 3] = NAN;
      std::vector<float> c(3 * n);
      cpu.backend->moe({c.data(), 3, n}, {poisoned.data(), 3, n}, data.load(*cpu.backend));
      CHECK(std::isnan(c[n]) && std::isnan(c[2 * n - 1]));
      check_same_bits("row 0 beside NaN", a.data(), c.data(), n);
      check_same_bits("row 2 beside NaN", a.data() + 2 * n, c.data() + 2 * n, n);

      // A logit that is no number loses against every other, wherever it stands.
      for (const int64_t spoilt : {0, 3, 5}) {
        MoeData broken = data, whole = data;
        broken.router.values[spoilt * n + 7] = NAN;
        // The same with a logit that is small instead.
        std::fill_n(whole.router.values.begin() + spoilt * n, n, 0.0f);
        const std::vector<float> positive(n, 1.0f);
        for (int64_t e = 0; e < 6; ++e)
          if (e != spoilt)
            for (int64_t c = 0; c < n; ++c)
              broken.router.values[e * n + c] = whole.router.values[e * n + c] =
                  0.01f * static_cast<float>(e + 1);
        std::vector<float> got(n), expected(n);
        cpu.backend->moe({got.data(), 1, n}, {positive.data(), 1, n}, broken.load(*cpu.backend));
        cpu.backend->moe({expected.data(), 1, n}, {positive.data(), 1, n},
                         whole.load(*cpu.backend));
        check_same_bits("a logit that is no number on " + cpu.name, got.data(), expected.data(), n);
      }
    }
}

TEST(norms) {
  std::mt19937 random(5);
  for (const auto& [rows, n] :
       {std::array<int64_t, 2>{1, 72}, {40, 73}, {3, 1}, {33, 1100}, {2, 1700}}) {
    const std::vector<float> x = randoms(random, rows * n), weight = randoms(random, n),
                             bias = randoms(random, n);
    const float eps = 1e-5f;
    std::vector<double> rms_bound, layer_bound;
    for (int64_t r = 0; r < rows; ++r) {
      double squares = 0, sum = 0, largest = 0;
      for (int64_t c = 0; c < n; ++c) {
        const double v = x[r * n + c];
        squares += v * v;
        sum += v;
        largest = std::max(largest, std::abs(v));
      }
      const double mean = sum / static_cast<double>(n), count = static_cast<double>(n);
      const double rms = std::sqrt(squares / count + eps);
      const double deviation = std::sqrt(std::max(squares / count - mean * mean, 0.0) + eps);
      for (int64_t c = 0; c < n; ++c) {
        // The mean of squares has a relative error of (n + 4) eps, its root half of that.
        const double v = x[r * n + c], w = std::abs(weight[c]);
        rms_bound.push_back((count / 2 + 8) * kEps * std::abs(v) * w / rms + 1e-30);
        // Likewise; the mean is off by n eps times the mean size at most.
        layer_bound.push_back((2 * count + 16) * kEps * 2 * largest * w / deviation +
                              2 * kEps * std::abs(bias[c]) + 1e-30);
      }
    }
    const std::string size = std::to_string(rows) + "x" + std::to_string(n);
    check_case({"rms_norm " + size, rows, n,
                [&](Backend& backend, int64_t first, int64_t count, float* out) {
                  backend.rms_norm(rows_of(out, count, n), {x.data() + first * n, count, n},
                                   load_vector(backend, weight), eps);
                },
                rms_bound});
    check_case({"layer_norm " + size, rows, n,
                [&](Backend& backend, int64_t first, int64_t count, float* out) {
                  backend.layer_norm(rows_of(out, count, n), {x.data() + first * n, count, n},
                                     load_vector(backend, weight), load_vector(backend, bias), eps);
                },
                layer_bound});
  }
}

// Operations that only move numbers: exact.
TEST(moves) {
  std::mt19937 random(6);
  const int64_t vocab = 37, n = 73, rows = 40;
  const std::vector<float> values = randoms(random, vocab * n);
  std::vector<uint16_t> bf16, f16;
  for (const float value : values) {
    bf16.push_back(bf16_of_float(value));
    f16.push_back(static_cast<uint16_t>(random() % 0x7c00));  // any finite pattern
  }
  std::vector<int32_t> ids;
  for (int64_t r = 0; r < rows; ++r) ids.push_back(static_cast<int32_t>(random() % vocab));
  const std::vector<double> none(static_cast<size_t>(rows * n), 1e-300);
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    TensorRef table;
    table.dtype = dtype;
    table.rank = 2;
    table.shape = {vocab, n};
    table.data = dtype == DType::kF32    ? static_cast<const void*>(values.data())
                 : dtype == DType::kBF16 ? bf16.data()
                                         : f16.data();
    check_case({std::string("embed ") + name_of(dtype), rows, n,
                [&](Backend& backend, int64_t first, int64_t count, float* out) {
                  backend.embed(rows_of(out, count, n), table,
                                std::span(ids).subspan(first, count));
                },
                none});
  }
  check_case({"gather", rows, n,
              [&](Backend& backend, int64_t first, int64_t count, float* out) {
                backend.gather(rows_of(out, count, n), {values.data(), vocab, n},
                               std::span(ids).subspan(first, count));
              },
              none});
  std::vector<int32_t> order(rows);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  for (std::vector<Named>& same_isa : subjects())
    for (Named& cpu : same_isa) {
      std::vector<float> there(rows * n), back(rows * n), host(rows * n), padded(rows * (n + 3));
      const ConstRows x(values.data(), vocab, n);
      cpu.backend->gather({there.data(), rows, n}, x, ids);
      cpu.backend->scatter({back.data(), rows, n}, {there.data(), rows, n}, order);
      for (int64_t r = 0; r < rows; ++r)
        CHECK(std::equal(back.begin() + order[r] * n, back.begin() + (order[r] + 1) * n,
                         there.begin() + r * n));
      const Rows strided(padded.data(), rows, n, n + 3);
      cpu.backend->from_host(strided, there.data());
      cpu.backend->to_host(host.data(), strided);
      CHECK(host == there);
    }
}

// Every row against a plain search, over widths around those of blocks, warps and lanes.
TEST(argmax) {
  std::mt19937 random(15);
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  std::vector<Backend*> all = {&ref()};
  for (std::vector<Named>& same_isa : subjects())
    for (Named& subject : same_isa) all.push_back(subject.backend.get());
  for (const int64_t cols : {1, 2, 31, 33, 255, 257, 2047, 2048, 2049, 4100, 9001}) {
    constexpr int64_t kRows = 9;
    const int64_t stride = cols + 3;  // what lies between rows is larger than they are
    std::vector<float> x(kRows * stride, 100.0f);
    std::vector<int32_t> expected;
    for (int64_t r = 0; r < kRows; ++r) {
      float* const row = x.data() + r * stride;
      std::generate_n(row, cols, [&] { return static_cast<float>(random() % 1000) - 1e6f; });
      const auto at = [&] { return static_cast<int64_t>(random()) % cols; };
      if (r == 1) row[cols - 1] = row[at()] = row[at()] = 5;  // ties
      if (r == 2) std::fill_n(row, cols, -3.0f);              // nothing but ties
      if (r == 3) row[at()] = inf, row[at()] = inf, row[at()] = nan;
      if (r == 4) std::fill_n(row, cols, -inf);
      if (r == 5) std::fill_n(row, cols, nan);
      if (r == 6) std::fill_n(row, cols, nan), row[at()] = -inf, row[at()] = -7;
      if (r == 7) row[0] = nan, row[at()] = 2;
      if (r == 8) {
        std::fill_n(row, cols, -1.0f);
        row[at()] = -0.0f, row[at()] = 0.0f, row[at()] = -0.0f;
      }
      int64_t best = -1;
      for (int64_t c = 0; c < cols; ++c)
        if (!std::isnan(row[c]) && (best < 0 || row[c] > row[best])) best = c;
      expected.push_back(static_cast<int32_t>(std::max<int64_t>(best, 0)));
    }
    for (Backend* backend : all)
      for (int repeat = 0; repeat < 2; ++repeat) {
        std::vector<int32_t> got(kRows, -1);
        backend->argmax(got, {x.data(), kRows, cols, stride});
        CHECK(got == expected);
        backend->argmax(std::span(got).first(1), {x.data() + 8 * stride, 1, cols, stride});
        CHECK_EQ(got[0], expected[8]);
      }
  }
}

TEST(vision_layout) {
  std::mt19937 random(7);
  const int64_t tiles = 3, size = 24, patch = 4, grid = size / patch, dim = 10, factor = 2;
  const std::vector<float> pixels = randoms(random, tiles * 3 * size * size);
  const std::vector<float> x = randoms(random, tiles * grid * grid * dim);
  const int64_t unfolded = grid * grid * 3 * patch * patch, shuffled = grid * grid * dim;
  // A tile is what stands alone here.
  check_case({"unfold", tiles, unfolded,
              [&](Backend& backend, int64_t first, int64_t count, float* out) {
                backend.unfold(rows_of(out, count * grid * grid, 3 * patch * patch),
                               pixels.data() + first * 3 * size * size, count, size, patch);
              },
              std::vector<double>(tiles * unfolded, 1e-300)});
  check_case({"pixel_shuffle", tiles, shuffled,
              [&](Backend& backend, int64_t first, int64_t count, float* out) {
                backend.pixel_shuffle(rows_of(out, count * grid * grid / 4, factor * factor * dim),
                                      {x.data() + first * shuffled, count * grid * grid, dim},
                                      count, grid, factor);
              },
              std::vector<double>(tiles * shuffled, 1e-300)});
}

// Stacked, transposed and sliced sources give the product of the plain matrix.
TEST(load_matrix_reads_any_strides) {
  std::mt19937 random(8);
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16})
    for (const bool keep_f32 : {false, true}) {
      const int64_t cols = 45, rows[] = {70, 1, 1300, 29}, pitch = 1500;
      int64_t total = 0;
      std::vector<std::vector<float>> floats;
      std::vector<std::vector<uint16_t>> halves;
      std::vector<MatrixSource> parts;
      std::vector<float> plain;
      for (const int64_t part_rows : rows) {
        const bool transposed = parts.size() % 2 == 0;
        floats.push_back(randoms(random, pitch * pitch / 4));
        halves.emplace_back();
        for (float& value : floats.back()) {
          halves.back().push_back(dtype == DType::kBF16 ? bf16_of_float(value)
                                                        : static_cast<uint16_t>(random() % 0x7000));
          if (dtype == DType::kBF16) value = float_of_bf16(halves.back().back());
          if (dtype == DType::kF16) value = float_of_f16(halves.back().back());
        }
        MatrixSource part{dtype, nullptr, part_rows, cols, 0, 0};
        part.data = dtype == DType::kF32 ? static_cast<const void*>(floats.back().data())
                                         : halves.back().data();
        part.row_stride = transposed ? 1 : cols + 3;
        part.col_stride = transposed ? pitch : 1;
        for (int64_t r = 0; r < part_rows; ++r)
          for (int64_t c = 0; c < cols; ++c)
            plain.push_back(floats.back()[r * part.row_stride + c * part.col_stride]);
        parts.push_back(part);
        total += part_rows;
      }
      // Row c of the unit matrix picks column c.
      std::vector<float> unit(cols * cols);
      for (int64_t c = 0; c < cols; ++c) unit[c * cols + c] = 1;
      const auto columns = [&](Backend& backend) {
        const WeightRef weight = backend.load_matrix(parts, keep_f32 ? kKeepF32 : MatrixOptions{});
        CHECK(weight.format ==
              (dtype == DType::kBF16 && !keep_f32 ? WeightFormat::kBF16 : WeightFormat::kF32));
        std::vector<float> out(cols * total);
        backend.matmul({out.data(), cols, total}, {unit.data(), cols, cols}, weight, {});
        return out;
      };
      std::vector<float> expected(cols * total);
      for (int64_t r = 0; r < total; ++r)
        for (int64_t c = 0; c < cols; ++c) expected[c * total + r] = plain[r * cols + c];
      CHECK(columns(ref()) == expected);
      for (std::vector<Named>& same_isa : subjects())
        for (Named& cpu : same_isa) CHECK(columns(*cpu.backend) == expected);
    }
}

TEST(wrong_shapes_are_refused_before_work) {
  std::vector<Backend*> all = {&ref()};
  for (std::vector<Named>& same_isa : subjects()) all.push_back(same_isa.back().backend.get());
  std::mt19937 random(9);
  const Matrix weight = random_matrix(random, 8, 6, DType::kF32);
  std::vector<float> x(100), y(100);
  for (Backend* backend : all) {
    const WeightRef packed = weight.load(*backend);
    CHECK_THROWS(ErrorCode::kInternal,
                 backend->matmul({y.data(), 2, 8}, {x.data(), 2, 5}, packed, {}));
    CHECK_THROWS(ErrorCode::kInternal,
                 backend->matmul({y.data(), 2, 7}, {x.data(), 2, 6}, packed, {}));
    CHECK_THROWS(ErrorCode::kInternal,
                 backend->mlp({y.data(), 2, 6}, {x.data(), 2, 6}, packed, packed));
    TensorRef table;
    table.rank = 2;
    table.shape = {10, 5};
    table.data = x.data();
    const int32_t bad[] = {3, 10}, negative[] = {-1, 0};
    CHECK_THROWS(ErrorCode::kInvalidRequest, backend->embed({y.data(), 2, 5}, table, bad));
    CHECK_THROWS(ErrorCode::kInvalidRequest, backend->embed({y.data(), 2, 5}, table, negative));
    CHECK_THROWS(ErrorCode::kInternal, backend->gather({y.data(), 2, 5}, {x.data(), 10, 5}, bad));
    std::vector<int32_t> columns(3);
    CHECK_THROWS(ErrorCode::kInternal, backend->argmax(columns, {x.data(), 2, 5}));
    const double temperatures[] = {1.0, 1.0, 1.0};
    CHECK_THROWS(ErrorCode::kInternal, backend->candidates({x.data(), 2, 5}, temperatures));
    MatrixSource part = weight.source();
    part.dtype = DType::kI8;
    CHECK_THROWS(ErrorCode::kUnsupported, backend->load_matrix({&part, 1}));
    CHECK_THROWS(ErrorCode::kInternal, backend->load_matrix({}));
    const Buffer buffer = backend->allocate(1000);
    CHECK(std::all_of(buffer.floats(), buffer.floats() + 250, [](float v) { return v == 0; }));
  }
  CHECK_THROWS(ErrorCode::kInvalidRequest, make_cpu_backend({"no such isa", 1}));
}
