#include "backend/recording_backend.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "backend/checks.h"

namespace puna {

void RecordingBackend::record(const WeightRef& weight, ConstRows x) {
  InputRecord& seen = records_[weight.data.get()];
  seen.squares.resize(static_cast<size_t>(x.cols));
  seen.rows += x.rows;
  for (int64_t r = 0; r < x.rows; ++r) {
    const float* row = x.row(r);
    for (int64_t c = 0; c < x.cols; ++c) seen.squares[c] += static_cast<double>(row[c]) * row[c];
  }
}

void RecordingBackend::matmul(Rows out, ConstRows x, const WeightRef& weight,
                              const MatmulOptions& options) {
  record(weight, x);
  backend_.matmul(out, x, weight, options);
}

void RecordingBackend::mlp(Rows residual, ConstRows x, const WeightRef& gate_up,
                           const WeightRef& down) {
  check_mlp(residual, x, gate_up, down);
  const int64_t width = down.cols;
  const Buffer both_buffer = allocate(static_cast<size_t>(x.rows * 2 * width) * sizeof(float));
  const Rows both(both_buffer.floats(), x.rows, 2 * width);
  matmul(both, x, gate_up, {});
  // silu(gate) * up takes the place of the gate.
  for (int64_t r = 0; r < x.rows; ++r) {
    float* gate = both.row(r);
    const float* up = gate + width;
    for (int64_t i = 0; i < width; ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
  }
  matmul(residual, ConstRows(both.data, x.rows, width, both.stride), down, {.accumulate = true});
}

void RecordingBackend::moe(Rows residual, ConstRows x, const MoeWeights& weights) {
  check_moe(residual, x, weights);
  const auto experts = static_cast<int64_t>(weights.gate_up.size());
  mlp(residual, x, weights.shared_gate_up, weights.shared_down);
  const auto floats = [&](int64_t rows, int64_t cols) {
    return allocate(static_cast<size_t>(rows * cols) * sizeof(float));
  };
  const Buffer logits = floats(x.rows, experts);
  backend_.matmul({logits.floats(), x.rows, experts}, x, weights.router, {});
  routing_.reserve(x.rows, experts, weights.top_k);
  routing_.assign(logits.floats(), x.rows, experts, weights.top_k);
  for (const int64_t e : routing_.occupied) {
    const int64_t first = routing_.offset[e], rows = routing_.offset[e + 1] - first;
    const Buffer in_buffer = floats(rows, x.cols), out_buffer = floats(rows, x.cols);
    const Rows in(in_buffer.floats(), rows, x.cols), out(out_buffer.floats(), rows, x.cols);
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = x.row(routing_.row[first + r]);
      const float score = routing_.score[first + r];
      std::transform(row, row + x.cols, in.row(r), [&](float value) { return score * value; });
    }
    mlp(out, in, weights.gate_up[e], weights.down[e]);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = residual.row(routing_.row[first + r]);
      std::transform(row, row + x.cols, out.row(r), row, std::plus<>());
    }
  }
}

}  // namespace puna
