// A backend that passes everything on to another: the base of those that watch or change a part.
#pragma once

#include <memory>
#include <utility>

#include "backend/backend.h"

namespace puna {

class ForwardingBackend : public Backend {
 public:
  explicit ForwardingBackend(Backend& backend) : backend_(backend) {}

  const char* name() const override { return backend_.name(); }
  std::string description() const override { return backend_.description(); }
  Buffer allocate(size_t bytes) override { return backend_.allocate(bytes); }
  std::optional<int64_t> device_memory() const override { return backend_.device_memory(); }
  Buffer allocate_host(size_t bytes) override { return backend_.allocate_host(bytes); }
  void copy(void* to, const void* from, size_t bytes) override { backend_.copy(to, from, bytes); }
  Backend& host() override { return backend_.host(); }
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
    backend_.moe(residual, x, weights);
  }
  void attention(Rows out, const AttentionInput& input) override { backend_.attention(out, input); }
  void vision_attention(Rows out, Rows qkv, int64_t tiles, int64_t tokens, int64_t heads,
                        const float* cos, const float* sin, DType operands) override {
    backend_.vision_attention(out, qkv, tiles, tokens, heads, cos, sin, operands);
  }
  void argmax(std::span<int32_t> out, ConstRows x) override { backend_.argmax(out, x); }
  std::vector<Candidates> candidates(ConstRows x, std::span<const double> temperatures) override {
    return backend_.candidates(x, temperatures);
  }
  void unfold(Rows out, const float* pixels, int64_t tiles, int64_t size, int64_t patch) override {
    backend_.unfold(out, pixels, tiles, size, patch);
  }
  void pixel_shuffle(Rows out, ConstRows x, int64_t tiles, int64_t grid, int64_t factor) override {
    backend_.pixel_shuffle(out, x, tiles, grid, factor);
  }

 protected:
  Backend& backend_;
};

}  // namespace puna
