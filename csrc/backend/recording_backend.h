// A backend that watches what goes into matrices: which input channels are large, over all rows.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "backend/routing.h"

namespace puna {

// What one matrix has seen.
struct InputRecord {
  std::vector<double> squares;  // [cols], summed over rows
  int64_t rows = 0;
};

// Passes everything on to a backend whose memory is the host's, and takes feed-forwards and
// mixtures of experts apart to see what reaches their inner matrices. Results are those of the
// backend but for the order in which experts are added.
class RecordingBackend : public Backend {
 public:
  explicit RecordingBackend(Backend& backend) : backend_(backend) {}

  // By the matrix's data. An expert's matrices see the rows that were sent to it.
  const std::map<const void*, InputRecord>& records() const { return records_; }

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

  void matmul(Rows out, ConstRows x, const WeightRef& weight,
              const MatmulOptions& options) override;
  void mlp(Rows residual, ConstRows x, const WeightRef& gate_up, const WeightRef& down) override;
  void moe(Rows residual, ConstRows x, const MoeWeights& weights) override;

 private:
  void record(const WeightRef& weight, ConstRows x);

  Backend& backend_;
  Routing routing_;
  std::map<const void*, InputRecord> records_;
};

}  // namespace puna
