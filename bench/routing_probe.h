// A backend that passes everything on and, when asked, notes which experts the rows choose.
#pragma once

#include <algorithm>
#include <set>
#include <utility>
#include <vector>

#include "backend/backend.h"

namespace puna::bench {

class RoutingProbe final : public Backend {
 public:
  explicit RoutingProbe(Backend& backend) : backend_(backend) {}

  // From now on, or no longer. Noting costs a second product with the router.
  void watch(bool on) { watching_ = on; }
  // (MoE layer in the order of first use, expert) pairs seen.
  int64_t experts_seen() const { return static_cast<int64_t>(seen_.size()); }

  const char* name() const override { return backend_.name(); }
  std::string description() const override { return backend_.description(); }
  Buffer allocate(size_t bytes) override { return backend_.allocate(bytes); }
  WeightRef load_matrix(std::span<const MatrixSource> parts,
                        const MatrixOptions& options) override {
    return backend_.load_matrix(parts, options);
  }
  WeightRef adopt_matrix(WeightFormat format, int64_t rows, int64_t cols,
                         std::shared_ptr<const void> data) override {
    return backend_.adopt_matrix(format, rows, cols, std::move(data));
  }
  VectorRef load_vector(std::span<const TensorRef> parts) override {
    return backend_.load_vector(parts);
  }
  void to_host(float* out, ConstRows x) override { backend_.to_host(out, x); }
  void from_host(Rows out, const float* x) override { backend_.from_host(out, x); }
  void embed(Rows out, const TensorRef& table, std::span<const int32_t> ids) override {
    backend_.embed(out, table, ids);
  }
  void gather(Rows out, ConstRows x, std::span<const int32_t> index) override {
    backend_.gather(out, x, index);
  }
  void scatter(Rows out, ConstRows x, std::span<const int32_t> index) override {
    backend_.scatter(out, x, index);
  }
  void rms_norm(Rows out, ConstRows x, const VectorRef& weight, float eps) override {
    backend_.rms_norm(out, x, weight, eps);
  }
  void layer_norm(Rows out, ConstRows x, const VectorRef& weight, const VectorRef& bias,
                  float eps) override {
    backend_.layer_norm(out, x, weight, bias, eps);
  }
  void matmul(Rows out, ConstRows x, const WeightRef& weight,
              const MatmulOptions& options) override {
    backend_.matmul(out, x, weight, options);
  }
  void mlp(Rows residual, ConstRows x, const WeightRef& gate_up, const WeightRef& down) override {
    backend_.mlp(residual, x, gate_up, down);
  }
  void moe(Rows residual, ConstRows x, const MoeWeights& weights) override {
    if (watching_) note(x, weights);
    backend_.moe(residual, x, weights);
  }
  void attention(Rows out, const AttentionInput& input) override { backend_.attention(out, input); }
  void vision_attention(Rows out, Rows qkv, int64_t tiles, int64_t tokens, int64_t heads,
                        const float* cos, const float* sin) override {
    backend_.vision_attention(out, qkv, tiles, tokens, heads, cos, sin);
  }
  void unfold(Rows out, const float* pixels, int64_t tiles, int64_t size, int64_t patch) override {
    backend_.unfold(out, pixels, tiles, size, patch);
  }
  void pixel_shuffle(Rows out, ConstRows x, int64_t tiles, int64_t grid, int64_t factor) override {
    backend_.pixel_shuffle(out, x, tiles, grid, factor);
  }

 private:
  void note(ConstRows x, const MoeWeights& weights) {
    const int64_t experts = weights.router.rows;
    const Buffer buffer = backend_.allocate(static_cast<size_t>(x.rows * experts) * sizeof(float));
    const Rows logits(buffer.floats(), x.rows, experts);
    backend_.matmul(logits, x, weights.router, {});
    std::vector<float> host(static_cast<size_t>(x.rows * experts));
    backend_.to_host(host.data(), logits);
    for (int64_t r = 0; r < x.rows; ++r) {
      const float* row = host.data() + r * experts;
      std::vector<int64_t> order(static_cast<size_t>(experts));
      for (int64_t e = 0; e < experts; ++e) order[e] = e;
      std::partial_sort(order.begin(), order.begin() + weights.top_k, order.end(),
                        [&](int64_t a, int64_t b) { return row[a] > row[b]; });
      for (int64_t i = 0; i < weights.top_k; ++i) seen_.insert({&weights, order[i]});
    }
  }

  Backend& backend_;
  bool watching_ = false;
  std::set<std::pair<const MoeWeights*, int64_t>> seen_;
};

}  // namespace puna::bench
