// The class behind make_cuda_backend(); shared by the files of backend/cuda and nobody else.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "backend/cuda/device.h"
#include "backend/cuda/expert_window.h"
#include "backend/cuda/page_window.h"
#include "backend/host_backend.h"
#include "base/env.h"

namespace puna {

class CudaBackend final : public Backend {
 public:
  CudaBackend(const cuda::DeviceTable& table, int ordinal, std::unique_ptr<HostBackend> host,
              size_t batch_kernels, std::shared_ptr<void> stream)
      : device_(std::make_shared<CudaDevice>(
            table, ordinal, batch_kernels > 0 ? batch_kernels : CudaDevice::kBatchKernels,
            std::move(stream))),
        ordinal_(ordinal),
        host_(std::move(host)),
        product_form_(environment_cuda_warpgroups() ? cuda::kProductOfWarpgroups
                                                    : cuda::kProductOfWarps),
        sent_rows_(environment_cuda_sent_rows()) {}

  ~CudaBackend() override { device_->retire(); }

  const char* name() const override { return "cuda"; }
  std::string description() const override;
  std::optional<int64_t> device_memory() const override { return device_->free_memory(); }

  // cuda_backend.cpp: memory, weights, rows
  Buffer allocate(size_t bytes) override;
  Buffer allocate_shared(size_t bytes) override;
  std::optional<int> gpu() const override { return ordinal_; }
  Buffer allocate_host(size_t bytes) override;
  void copy(void* to, const void* from, size_t bytes) override { device_->copy(to, from, bytes); }
  Backend& host() override { return *host_; }
  WeightRef load_matrix(std::span<const MatrixSource> parts, const MatrixOptions& options) override;
  WeightRef adopt_matrix(WeightFormat format, int64_t rows, int64_t cols,
                         std::shared_ptr<const void> data) override;
  VectorRef load_vector(std::span<const TensorRef> parts) override;
  void to_host(float* out, ConstRows x) override;
  void from_host(Rows out, const float* x) override;
  void embed(Rows out, const TensorRef& table, std::span<const int32_t> ids) override;
  void gather(Rows out, ConstRows x, std::span<const int32_t> index) override;
  void scatter(Rows out, ConstRows x, std::span<const int32_t> index) override;
  void rms_norm(Rows out, ConstRows x, const VectorRef& weight, float eps) override;
  void layer_norm(Rows out, ConstRows x, const VectorRef& weight, const VectorRef& bias,
                  float eps) override;
  void unfold(Rows out, const float* pixels, int64_t tiles, int64_t size, int64_t patch) override;
  void pixel_shuffle(Rows out, ConstRows x, int64_t tiles, int64_t grid, int64_t factor) override;

  // products.cpp
  void matmul(Rows out, ConstRows x, const WeightRef& weight,
              const MatmulOptions& options) override;
  void mlp(Rows residual, ConstRows x, const WeightRef& gate_up, const WeightRef& down) override;
  void moe(Rows residual, ConstRows x, const MoeWeights& weights) override;

  // choice.cpp
  void argmax(std::span<int32_t> out, ConstRows x) override;
  std::vector<Candidates> candidates(ConstRows x, std::span<const double> temperatures) override;

  // attention.cpp
  void attention(Rows out, const AttentionInput& input) override;
  void vision_attention(Rows out, Rows qkv, int64_t tiles, int64_t tokens, int64_t heads,
                        const float* cos, const float* sin, DType operands) override;

 private:
  // A matrix of the host, to the device.
  WeightRef uploaded(const WeightRef& weight);

  // products.cpp
  // How rows become an operand; `rows` of them with `cols` columns each.
  struct Source {
    ConstRows x;
    int64_t rows, cols;
    const int32_t* index = nullptr;  // device_table.h: OperandCall
    const float* score = nullptr;
    bool gated = false;
  };
  cuda::Operand prepare(const Source& source, WeightFormat format, CudaScratch& scratch);
  cuda::ProductCall product_call(Rows out, const cuda::Operand& x, int64_t rows,
                                 const WeightRef& weight);
  void multiply(const cuda::ProductCall& call) {
    device_->run("product", &cuda::DeviceTable::product, call);
  }

  // residual += down(silu(gate(x)) * up(x))
  void feed_forward(Rows residual, const cuda::Operand& x, const WeightRef& gate_up,
                    const WeightRef& down);
  cuda::RoutingCall route(ConstRows x, const MoeWeights& weights);
  // Whether the device computes this call's routed experts: with matrices that are sent, if they
  // lie in the host's memory.
  bool sends_experts(const MoeWeights& weights, int64_t rows) const;
  // The product of each expert's slots with its matrix.
  void multiply_experts(cuda::ProductCall call, const cuda::RoutingCall& routing,
                        std::span<const WeightRef> matrices, bool sent);
  // residual += what the routed experts made, by slot.
  void add_slots(Rows residual, ConstRows made, const cuda::RoutingCall& routing);

  // host_experts.cpp
  void moe_with_host(Rows residual, ConstRows x, const MoeWeights& weights);

  // choice.cpp
  const int32_t* find_largest(ConstRows x);

  // attention.cpp
  void append(const AttentionInput& input);
  void seal(const AttentionInput& input);
  void attend(Rows out, const AttentionInput& input);
  void attend_tiles(cuda::AttendCall call, std::span<const cuda::AttentionTile> tiles,
                    PageWindow& window);

  std::shared_ptr<CudaDevice> device_;
  int ordinal_;
  std::unique_ptr<HostBackend> host_;
  const cuda::ProductForm product_form_;
  const float* passing_ = nullptr;  // what the last matmul made, if only the next one reads it
  const std::optional<int64_t> sent_rows_;  // instead of rows_worth_sending()

  CudaConstants expert_tables_;
  CudaScratch operand_, shared_operand_, made_operand_, hidden_, pixels_;
  CudaScratch routing_, arrived_routers_, routed_hidden_, routed_out_;
  CudaScratch states_, arrived_;  // attention
  PageWindow::Memory window_;
  CudaScratch choice_parts_, arrived_choices_, largest_;
  CudaScratch candidates_, candidate_counts_, candidate_bins_;
  ExpertWindow expert_window_;
  // What goes to the host's experts and what they make.
  CudaPinnedScratch fetched_routes_, fetched_rows_, host_made_;
  Routing host_routing_;
};

inline cuda::FloatRows device_rows(Rows x) { return {x.data, x.stride}; }
inline cuda::ConstFloatRows device_rows(ConstRows x) { return {x.data, x.stride}; }

}  // namespace puna
