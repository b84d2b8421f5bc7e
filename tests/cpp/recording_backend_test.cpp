// The backend that watches its inputs: results of the backend that it stands before, and the sums
// of squares of exactly the rows that each matrix multiplied.
#include "backend/recording_backend.h"

#include <algorithm>

#include "backend_fixture.h"

namespace {

using namespace fixture;

constexpr int64_t kRows = 23, kHidden = 40, kWidth = 24, kExperts = 5, kTopK = 2;

// Sums of a few hundred products of about 1 in fp32, joined in another order.
void check_near(const std::string& what, const std::vector<float>& got,
                const std::vector<float>& expected) {
  check_close(what, got, expected, std::vector<double>(got.size(), 1e-4));
}

void check_squares(const std::string& what, const InputRecord& record,
                   const std::vector<std::vector<double>>& rows) {
  CHECK_EQ(record.rows, static_cast<int64_t>(rows.size()));
  std::vector<double> squares(record.squares.size());
  for (const auto& row : rows)
    for (size_t c = 0; c < row.size(); ++c) squares[c] += row[c] * row[c];
  for (size_t c = 0; c < squares.size(); ++c) {
    const bool same = std::abs(record.squares[c] - squares[c]) <= 1e-4 * (squares[c] + 1);
    check::report(same, __FILE__, __LINE__, what + ": column " + std::to_string(c));
  }
}

std::vector<double> times(const Matrix& matrix, const std::vector<double>& x) {
  std::vector<double> out(static_cast<size_t>(matrix.rows));
  for (int64_t r = 0; r < matrix.rows; ++r)
    for (int64_t c = 0; c < matrix.cols; ++c) out[r] += matrix.at(r, c) * x[c];
  return out;
}

// silu(gate) * up, what the down matrix sees.
std::vector<double> activated(const Matrix& gate_up, const std::vector<double>& x) {
  const std::vector<double> both = times(gate_up, x);
  std::vector<double> out;
  for (int64_t i = 0; i < kWidth; ++i)
    out.push_back(both[i] / (1 + std::exp(-both[i])) * both[kWidth + i]);
  return out;
}

}  // namespace

TEST(what_goes_into_each_matrix_is_recorded) {
  std::mt19937 random(5);
  const Matrix plain = random_matrix(random, 7, kHidden, DType::kF32);
  const Matrix router = random_matrix(random, kExperts, kHidden, DType::kF32);
  std::vector<Matrix> gate_up, down;  // the shared expert's last
  for (int64_t e = 0; e <= kExperts; ++e) {
    gate_up.push_back(random_matrix(random, 2 * kWidth, kHidden, DType::kF32));
    down.push_back(random_matrix(random, kHidden, kWidth, DType::kF32));
  }
  std::vector<float> x = randoms(random, kRows * kHidden);
  const ConstRows in(x.data(), kRows, kHidden);
  std::vector<std::vector<double>> inputs;
  for (int64_t r = 0; r < kRows; ++r) inputs.emplace_back(in.row(r), in.row(r) + kHidden);

  for (Backend* backend : {&ref(), subjects()[0][0].backend.get()}) {
    RecordingBackend recorder(*backend);
    const WeightRef matrix = plain.load(recorder);
    std::vector<float> got(kRows * 7), expected(kRows * 7);
    recorder.matmul({got.data(), kRows, 7}, in, matrix, {});
    backend->matmul({expected.data(), kRows, 7}, in, matrix, {});
    check_same_bits("matmul", got.data(), expected.data(), got.size());
    recorder.matmul({got.data(), 4, 7}, in.slice(0, 4), matrix, {});
    std::vector<std::vector<double>> twice = inputs;
    twice.insert(twice.end(), inputs.begin(), inputs.begin() + 4);
    check_squares("matmul", recorder.records().at(matrix.data.get()), twice);

    MoeWeights weights;
    weights.router = router.load(recorder, true);
    weights.top_k = kTopK;
    for (int64_t e = 0; e < kExperts; ++e) {
      weights.gate_up.push_back(gate_up[e].load(recorder));
      weights.down.push_back(down[e].load(recorder));
    }
    weights.shared_gate_up = gate_up[kExperts].load(recorder);
    weights.shared_down = down[kExperts].load(recorder);
    got = expected = x;
    recorder.moe({got.data(), kRows, kHidden}, in, weights);
    backend->moe({expected.data(), kRows, kHidden}, in, weights);
    check_near("moe", got, expected);

    const auto check_expert = [&](const WeightRef& first, const WeightRef& second, int64_t e,
                                  const std::vector<std::vector<double>>& rows) {
      std::vector<std::vector<double>> inner;
      for (const auto& row : rows) inner.push_back(activated(gate_up[e], row));
      check_squares("gate_up", recorder.records().at(first.data.get()), rows);
      check_squares("down", recorder.records().at(second.data.get()), inner);
    };
    check_expert(weights.shared_gate_up, weights.shared_down, kExperts, inputs);
    for (int64_t e = 0; e < kExperts; ++e) {
      std::vector<std::vector<double>> sent;
      for (const auto& row : inputs) {
        const std::vector<double> logits = times(router, row);
        const auto better = std::count_if(logits.begin(), logits.end(),
                                          [&](double logit) { return logit > logits[e]; });
        if (better >= kTopK) continue;
        sent.push_back(row);
        for (double& value : sent.back()) value /= 1 + std::exp(-logits[e]);
      }
      CHECK(!sent.empty());
      check_expert(weights.gate_up[e], weights.down[e], e, sent);
    }

    got = expected = x;
    recorder.mlp({got.data(), kRows, kHidden}, in, weights.gate_up[0], weights.down[0]);
    backend->mlp({expected.data(), kRows, kHidden}, in, weights.gate_up[0], weights.down[0]);
    check_near("mlp", got, expected);
  }
}
