// Element-wise kernels of every instruction set that runs here, against double.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "base/half.h"
#include "check.h"
#include "kernels/cpu/dispatch.h"

using puna::KernelTable;
using std::vector;

namespace {

constexpr double kEps = 0x1p-24;  // half a unit in the last place of fp32, relative
const vector<int64_t> kSizes = {0,  1,  2,  3,  4,  5,  7,  8,  9,  15,  16,  17,   18,  31,
                                32, 33, 34, 63, 64, 65, 70, 88, 96, 128, 200, 1408, 5120};

vector<float> random_floats(int64_t n, uint64_t seed, double sigma = 1) {
  std::mt19937_64 engine(seed);
  std::normal_distribution<double> normal(0, sigma);
  vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = static_cast<float>(normal(engine));
  return values;
}

template <class Body>
void for_isas(const Body& body) {
  for (const KernelTable* isa : puna::compiled_isas()) {
    if (isa->supported()) body(puna::resolve_isa(isa->isa));
  }
}

void check_near(const char* isa, const char* what, int64_t n, double got, double expected,
                double tolerance) {
  if (std::abs(got - expected) <= tolerance) {
    check::report(true, "", 0, "");
    return;
  }
  std::ostringstream text;
  text.precision(10);
  text << isa << " " << what << " n=" << n << ": " << got << " against " << expected
       << ", tolerance " << tolerance;
  check::report(false, __FILE__, __LINE__, text.str());
}

}  // namespace

TEST(rms_norm) {
  for_isas([](const KernelTable& k) {
    for (const int64_t n : kSizes) {
      if (n == 0) continue;
      const vector<float> x = random_floats(n, n), w = random_floats(n, n + 1);
      vector<float> y(x), bare(x);
      k.rms_norm(y.data(), y.data(), w.data(), n, 1e-5f);  // in place
      k.rms_norm(bare.data(), x.data(), nullptr, n, 1e-5f);
      double squares = 0;
      for (const float v : x) squares += static_cast<double>(v) * v;
      const double scale =
          1 / std::sqrt(squares / static_cast<double>(n) + static_cast<double>(1e-5f));
      // Each of about n / 4 sequential sums adds a rounding; half of that after the root; 5 more
      // after.
      const double relative = kEps * (static_cast<double>(n) / 8 + 8);
      for (int64_t i = 0; i < n; ++i) {
        check_near(k.isa, "rms_norm", n, y[i], x[i] * scale * w[i],
                   relative * std::abs(x[i] * scale * w[i]));
        check_near(k.isa, "rms_norm without weight", n, bare[i], x[i] * scale,
                   relative * std::abs(x[i] * scale));
      }
    }
  });
}

TEST(layer_norm) {
  for_isas([](const KernelTable& k) {
    for (const int64_t n : kSizes) {
      if (n < 2) continue;
      const vector<float> x = random_floats(n, n), w = random_floats(n, n + 1),
                          b = random_floats(n, n + 2);
      vector<float> y(static_cast<size_t>(n));
      k.layer_norm(y.data(), x.data(), w.data(), b.data(), n, 1e-5f);
      double mean = 0, squares = 0;
      for (const float v : x) mean += v;
      mean /= static_cast<double>(n);
      for (const float v : x) squares += (v - mean) * (v - mean);
      const double scale =
          1 / std::sqrt(squares / static_cast<double>(n) + static_cast<double>(1e-5f));
      const double relative = kEps * (static_cast<double>(n) / 4 + 8);
      for (int64_t i = 0; i < n; ++i) {
        const double expected = (x[i] - mean) * scale * w[i] + b[i];
        const double magnitude =
            (std::abs(x[i]) + std::abs(mean) + 1) * scale * std::abs(w[i]) + std::abs(b[i]);
        check_near(k.isa, "layer_norm", n, y[i], expected, relative * magnitude);
      }
    }
  });
}

TEST(silu_mul) {
  for_isas([](const KernelTable& k) {
    for (const int64_t n : kSizes) {
      vector<float> gate = random_floats(n, n, 8), up = random_floats(n, n + 1);
      if (n > 4) gate[0] = -200, gate[1] = 200, gate[2] = 0, gate[3] = -88;
      vector<float> y(static_cast<size_t>(n));
      k.silu_mul(y.data(), gate.data(), up.data(), n);
      for (int64_t i = 0; i < n; ++i) {
        const double g = gate[i], expected = g / (1 + std::exp(-g)) * up[i];
        // exp has 2e-7; the sum, the quotient and the product round once each. Where exp(-g) leaves
        // its range, the result is as good as 0.
        check_near(k.isa, "silu_mul", n, y[i], expected,
                   (2e-7 + 4 * kEps) * std::abs(expected) + 1e-30);
      }
    }
  });
}

TEST(exp_row) {
  for_isas([](const KernelTable& k) {
    for (const int64_t n : kSizes) {
      if (n == 0) continue;  // a row has a largest element
      vector<float> x = random_floats(n, n, 8);
      if (n > 4) x[1] = -200, x[3] = x[0];
      vector<float> y(x);
      const float sum = k.exp_row(y.data(), n);
      const float top = *std::max_element(x.begin(), x.end());
      double total = 0;
      for (int64_t i = 0; i < n; ++i) {
        const double below = double{x[i]} - top, expected = std::exp(below);
        total += expected;
        // exp has 2e-7; the difference rounds once, which counts as often as it is large.
        check_near(k.isa, "exp_row", n, y[i], expected,
                   (2e-7 + kEps * (1 - below)) * expected + 1e-30);
      }
      check_near(k.isa, "the sum of exp_row", n, sum, total,
                 (2e-7 + kEps * (static_cast<double>(n) / 4 + 16)) * total);
    }
  });
}

TEST(gelu_over_its_range) {
  for_isas([](const KernelTable& k) {
    vector<float> x;
    for (double v = -12; v <= 12; v += 1.0 / 4096) x.push_back(static_cast<float>(v));
    for (const float v : {1e-40f, 1e-20f, 50.0f, 1e4f, 1e30f, 3e38f})
      x.push_back(v), x.push_back(-v);
    vector<float> y(x);
    k.gelu(y.data(), y.data(), static_cast<int64_t>(x.size()));
    for (size_t i = 0; i < x.size(); ++i) {
      const double v = x[i], expected = 0.5 * v * std::erfc(-v / std::sqrt(2.0));
      // Relative for both signs. The argument of exp(-z^2) carries z^2 eps of absolute error six
      // times: twice for 1 / sqrt 2 and for z, once for the square and for its subtraction.
      const double z2 = v * v / 2;
      check_near(k.isa, "gelu", static_cast<int64_t>(i), y[i], expected,
                 std::abs(expected) * (6e-7 + 6 * kEps * z2) + 1e-37);
    }
  });
}

TEST(add_and_scale_are_exact_roundings) {
  for_isas([](const KernelTable& k) {
    for (const int64_t n : kSizes) {
      const vector<float> x = random_floats(n, n), start = random_floats(n, n + 1);
      vector<float> y(start), z(static_cast<size_t>(n));
      k.add(y.data(), x.data(), n);
      k.scale(z.data(), x.data(), 0.3f, n);
      for (int64_t i = 0; i < n; ++i) {
        CHECK_EQ(y[i], start[i] + x[i]);
        CHECK_EQ(z[i], x[i] * 0.3f);
      }
    }
  });
}

TEST(rope_turns_interleaved_pairs) {
  for_isas([](const KernelTable& k) {
    for (const int64_t n : {2, 4, 6, 8, 16, 18, 24, 64, 88, 128}) {
      const vector<float> x = random_floats(n, n), angle = random_floats(n / 2, n + 1, 3);
      vector<float> c, s, y(x);
      for (const float a : angle) c.push_back(std::cos(a)), s.push_back(std::sin(a));
      k.rope(y.data(), c.data(), s.data(), n);
      for (int64_t i = 0; i < n; i += 2) {
        const double a = x[i], b = x[i + 1], co = c[i / 2], si = s[i / 2];
        const double tolerance = 3 * kEps * (std::abs(a) + std::abs(b));
        check_near(k.isa, "rope, first of pair", n, y[i], a * co - b * si, tolerance);
        check_near(k.isa, "rope, second of pair", n, y[i + 1], a * si + b * co, tolerance);
      }
    }
  });
}

TEST(bfloat16_round_trip) {
  for_isas([](const KernelTable& k) {
    // Every pattern widens exactly and comes back; NaNs stay NaNs.
    vector<uint16_t> all(65536), back(65536);
    for (int i = 0; i < 65536; ++i) all[i] = static_cast<uint16_t>(i);
    vector<float> wide(65536);
    k.f32_from_bf16(wide.data(), all.data(), 65536);
    k.bf16_from_f32(back.data(), wide.data(), 65536);
    for (int i = 0; i < 65536; ++i) {
      CHECK_EQ(puna::bits_of_float(wide[i]), static_cast<uint32_t>(i) << 16);
      const bool nan = (i & 0x7fff) > 0x7f80;
      CHECK(nan ? (back[i] & 0x7fff) > 0x7f80 : back[i] == all[i]);
    }
    for (const int64_t n : kSizes) {
      vector<float> x = random_floats(n, n);
      if (n > 3)
        x[0] = puna::float_of_bits(0x3f808000), x[1] = puna::float_of_bits(0x3f818000),
        x[2] = 3.4e38f;
      vector<uint16_t> y(static_cast<size_t>(n));
      k.bf16_from_f32(y.data(), x.data(), n);
      for (int64_t i = 0; i < n; ++i) CHECK_EQ(y[i], puna::bf16_of_float(x[i]));
    }
  });
}

// Every kernel, on operands that lie `shift` floats past an aligned address; all results in a row,
// with a guard after each that no kernel may touch.
vector<float> all_results(const KernelTable& k, int64_t n, size_t shift) {
  constexpr float kGuard = 12345.0f;
  const auto operand = [&](uint64_t seed) {
    vector<float> values(shift, 0.0f);
    const vector<float> random = random_floats(n, seed);
    values.insert(values.end(), random.begin(), random.end());
    return values;
  };
  const vector<float> a = operand(n), b = operand(n + 1), c = operand(n + 2);
  const float *x = a.data() + shift, *w = b.data() + shift, *u = c.data() + shift;
  vector<float> results;
  const auto collect = [&](const auto& body) {
    vector<float> y(shift + static_cast<size_t>(n) + 1, 0.0f);
    y.back() = kGuard;
    body(y.data() + shift);
    CHECK_EQ(y.back(), kGuard);
    results.insert(results.end(), y.begin() + static_cast<int64_t>(shift), y.end());
  };
  const auto copy = [&](float* y) { std::copy_n(x, n, y); };
  collect([&](float* y) { k.rms_norm(y, x, w, n, 1e-5f); });
  collect([&](float* y) { k.layer_norm(y, x, w, u, n, 1e-5f); });
  collect([&](float* y) { k.silu_mul(y, x, w, n); });
  collect([&](float* y) { k.gelu(y, x, n); });
  collect([&](float* y) { k.scale(y, x, 0.7f, n); });
  collect([&](float* y) { copy(y), k.add(y, w, n); });
  if (n > 0) collect([&](float* y) { copy(y), k.exp_row(y, n); });
  collect([&](float* y) { copy(y), k.rope(y, w, u, n / 2 * 2); });
  vector<uint16_t> narrow(shift + static_cast<size_t>(n) + 1, 0xabcd);
  k.bf16_from_f32(narrow.data() + shift, x, n);
  CHECK_EQ(narrow.back(), 0xabcd);
  collect([&](float* y) { k.f32_from_bf16(y, narrow.data() + shift, n); });
  return results;
}

bool same_bits(const vector<float>& a, const vector<float>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

TEST(results_do_not_depend_on_addresses_and_end_where_they_should) {
  for_isas([](const KernelTable& k) {
    for (const int64_t n : kSizes) {
      const vector<float> aligned = all_results(k, n, 0);
      for (const size_t shift : {1, 3, 8}) CHECK(same_bits(all_results(k, n, shift), aligned));
    }
  });
}

TEST(kernels_work_in_place) {
  for_isas([](const KernelTable& k) {
    for (const int64_t n : kSizes) {
      const vector<float> x = random_floats(n, n), w = random_floats(n, n + 1);
      const auto check = [&](const auto& kernel) {
        vector<float> apart(x.size()), in_place(x);
        kernel(apart.data(), x.data());
        kernel(in_place.data(), in_place.data());
        CHECK(same_bits(apart, in_place));
      };
      check([&](float* y, const float* from) { k.rms_norm(y, from, w.data(), n, 1e-5f); });
      check([&](float* y, const float* from) {
        k.layer_norm(y, from, w.data(), w.data(), n, 1e-5f);
      });
      check([&](float* y, const float* from) { k.silu_mul(y, from, w.data(), n); });
      check([&](float* y, const float* from) { k.silu_mul(y, w.data(), from, n); });
      check([&](float* y, const float* from) { k.gelu(y, from, n); });
      check([&](float* y, const float* from) { k.scale(y, from, -3.0f, n); });
    }
  });
}

TEST(rows_of_any_length) {
  // Random sizes and magnitudes; norms of a scaled row are the norms of the row.
  std::mt19937_64 engine(7);
  for_isas([&](const KernelTable& k) {
    for (int round = 0; round < 200; ++round) {
      const int64_t n = 1 + static_cast<int64_t>(engine() % 700);
      const double sigma = std::exp2(static_cast<double>(engine() % 20) - 10);
      const vector<float> x = random_floats(n, engine(), sigma);
      vector<float> y(x.size());
      k.rms_norm(y.data(), x.data(), nullptr, n, 1e-30f);
      double squares = 0;
      for (const float v : y) squares += static_cast<double>(v) * v;
      // The mean of the squares is 1 but for the roundings of the sum, the root and each element.
      check_near(k.isa, "mean square", n, squares / static_cast<double>(n), 1,
                 2 * kEps * (static_cast<double>(n) / 8 + 8));
    }
  });
}

TEST(nan_and_infinity_are_not_hidden) {
  for_isas([](const KernelTable& k) {
    constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    for (const int64_t n : {1, 5, 16, 33}) {
      const vector<float> ones(static_cast<size_t>(n), 1.0f);
      for (int64_t at = 0; at < n; at += 4) {
        vector<float> x(ones), y(ones);
        x[at] = kNan;
        k.silu_mul(y.data(), x.data(), ones.data(), n);
        CHECK(std::isnan(y[at]));
        k.gelu(y.data(), x.data(), n);
        CHECK(std::isnan(y[at]));
        k.rms_norm(y.data(), x.data(), ones.data(), n, 1e-5f);
        for (const float v : y) CHECK(std::isnan(v));
        x[at] = kInfinity;
        k.silu_mul(y.data(), x.data(), ones.data(), n);
        CHECK_EQ(y[at], kInfinity);
        k.gelu(y.data(), x.data(), n);
        CHECK_EQ(y[at], kInfinity);
      }
    }
  });
}

TEST(dispatch_refuses_unknown_names) {
  CHECK_THROWS(puna::ErrorCode::kInvalidRequest, puna::resolve_isa("sse9"));
  CHECK(puna::compiled_isas().back()->supported());
  CHECK_EQ(std::string(puna::compiled_isas().back()->isa), std::string("scalar"));
}
