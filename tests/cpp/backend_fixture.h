// For the backend tests: random data, the backends to compare, and comparisons that name the worst
// place.
#pragma once

#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/ref/ref_backend.h"
#include "base/half.h"
#include "check.h"

namespace fixture {

using namespace puna;

// Unit roundoffs.
constexpr double kEps = 1.0 / (1 << 24);     // fp32
constexpr double kEpsBF16 = 1.0 / (1 << 8);  // bfloat16

inline std::vector<float> randoms(std::mt19937& random, int64_t count, float sigma = 1) {
  std::normal_distribution<float> normal(0, sigma);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

inline const MatrixOptions kKeepF32{WeightFormat::kF32};

// A matrix as a checkpoint would hold it, and its exact values.
struct Matrix {
  int64_t rows = 0, cols = 0;
  DType dtype = DType::kF32;
  std::vector<float> values;   // [rows][cols]
  std::vector<uint16_t> bits;  // the same as bfloat16
  double at(int64_t r, int64_t c) const { return values[r * cols + c]; }
  MatrixSource source() const {
    const void* data = dtype == DType::kF32 ? static_cast<const void*>(values.data()) : bits.data();
    return {dtype, data, rows, cols, cols, 1};
  }
  WeightRef load(Backend& backend, bool keep_f32 = false) const {
    const MatrixSource part = source();
    return backend.load_matrix({&part, 1}, keep_f32 ? kKeepF32 : MatrixOptions{});
  }
  bool bf16() const { return dtype == DType::kBF16; }
};

inline Matrix random_matrix(std::mt19937& random, int64_t rows, int64_t cols, DType dtype) {
  Matrix matrix{rows, cols, dtype, {}, {}};
  matrix.values = randoms(random, rows * cols, 1 / std::sqrt(static_cast<float>(cols)));
  if (dtype == DType::kBF16)
    for (float& value : matrix.values) {
      matrix.bits.push_back(bf16_of_float(value));
      value = float_of_bf16(matrix.bits.back());
    }
  return matrix;
}

// A mixture of experts.
struct MoeData {
  Matrix router, shared_gate_up, shared_down;
  std::vector<Matrix> gate_up, down;
  int64_t top_k;

  MoeData(std::mt19937& random, int64_t hidden, int64_t width, int64_t experts, int64_t top_k,
          DType dtype)
      : router(random_matrix(random, experts, hidden, dtype)),
        shared_gate_up(random_matrix(random, 2 * width, hidden, dtype)),
        shared_down(random_matrix(random, hidden, width, dtype)),
        top_k(top_k) {
    for (int64_t e = 0; e < experts; ++e) {
      gate_up.push_back(random_matrix(random, 2 * width, hidden, dtype));
      down.push_back(random_matrix(random, hidden, width, dtype));
    }
  }

  // `on_host`: the routed experts are of the backend's host(). In `format`, but for the router;
  // none: as they are.
  MoeWeights load(Backend& backend, bool on_host = false,
                  std::optional<WeightFormat> format = std::nullopt) const {
    const auto pack = [&](Backend& place, const Matrix& matrix) {
      const MatrixSource part = matrix.source();
      return place.load_matrix({&part, 1}, {format});
    };
    MoeWeights weights;
    weights.router = router.load(backend, true);
    weights.shared_gate_up = pack(backend, shared_gate_up);
    weights.shared_down = pack(backend, shared_down);
    Backend& place = on_host ? backend.host() : backend;
    for (size_t e = 0; e < gate_up.size(); ++e) {
      weights.gate_up.push_back(pack(place, gate_up[e]));
      weights.down.push_back(pack(place, down[e]));
    }
    weights.top_k = top_k;
    weights.experts_on_host = weights.experts_are_sent = on_host;
    return weights;
  }
};

inline VectorRef load_vector(Backend& backend, const std::vector<float>& values) {
  TensorRef part;
  part.rank = 1;
  part.shape[0] = static_cast<int64_t>(values.size());
  part.data = values.data();
  return backend.load_vector({&part, 1});
}

struct Named {
  std::string name;
  std::unique_ptr<Backend> backend;
};

inline Backend& ref() {
  static const auto backend = make_ref_backend({});
  return *backend;
}

// The backends under test, in groups whose members must agree in every bit: at least three each.
std::vector<std::vector<Named>>& subjects();

// |got - expected| <= bound, element by element; the worst excess is reported.
inline void check_close(const std::string& what, const std::vector<float>& got,
                        const std::vector<float>& expected, const std::vector<double>& bound) {
  CHECK_EQ(got.size(), expected.size());
  CHECK_EQ(bound.size(), expected.size());
  double worst = 0;
  size_t place = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double ratio = std::abs(static_cast<double>(got[i]) - expected[i]) / bound[i];
    if (!(ratio <= worst)) {
      worst = ratio;
      place = i;
    }
  }
  std::ostringstream text;
  if (!(worst <= 1))
    text << what << ": element " << place << " is " << got[place] << ", expected "
         << expected[place] << " within " << bound[place];
  check::report(worst <= 1, __FILE__, __LINE__, text.str());
}

inline void check_same_bits(const std::string& what, const float* a, const float* b, size_t count) {
  const bool same = count == 0 || std::memcmp(a, b, count * sizeof(float)) == 0;
  std::string text;
  if (!same)
    for (size_t i = 0; i < count && text.empty(); ++i)
      if (std::memcmp(a + i, b + i, sizeof(float)) != 0)
        text = what + ": element " + std::to_string(i) + " is " + std::to_string(a[i]) + " and " +
               std::to_string(b[i]);
  check::report(same, __FILE__, __LINE__, text);
}

}  // namespace fixture

#ifndef PUNA_TEST_SUBJECTS
#include "cpu_subjects.h"
#endif
