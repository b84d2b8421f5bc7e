// Matrix products, the dense feed-forward block, and the mixture of experts.
#include <algorithm>

#include "backend/checks.h"
#include "backend/cuda/implementation.h"
#include "kernels/kernel_table.h"

namespace puna {
namespace {

cuda::WeightKind kind_of(WeightFormat format) {
  switch (format) {
    case WeightFormat::kF32:
      return cuda::kWeightsF32;
    case WeightFormat::kBF16:
      return cuda::kWeightsBF16;
    case WeightFormat::kFP8:
      return cuda::kWeightsFP8;
    default:
      return cuda::kWeightsQuantized;
  }
}

bool packed_alike(const WeightRef& a, const WeightRef& b) {
  return a.format == b.format && a.rows == b.rows && a.cols == b.cols;
}

// Hands out arrays of a piece of device memory; from a null pointer it only adds up their size.
class Carver {
 public:
  explicit Carver(char* memory) : memory_(memory) {}
  template <class T>
  T* take(int64_t count) {
    constexpr int64_t kAlignment = 256;
    T* array = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return array;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

}  // namespace

cuda::Operand CudaBackend::prepare(const Source& source, WeightFormat format,
                                   CudaScratch& scratch) {
  cuda::Operand operand = {};
  operand.stride = padded_cols(format, source.cols);
  if (takes_fp32(format)) {
    operand.kind = cuda::kOperandF32;
    if (source.index == nullptr && source.score == nullptr && !source.gated) {
      operand.data = const_cast<float*>(source.x.data);
      operand.stride = source.x.stride;
      return operand;
    }
    operand.data = scratch.reserve<float>(*device_, source.rows * operand.stride);
  } else if (format == WeightFormat::kBF16) {
    operand.kind = cuda::kOperandBF16;
    operand.stride = (operand.stride + kActivationGroup - 1) / kActivationGroup * kActivationGroup;
    operand.data = scratch.reserve<uint16_t>(*device_, source.rows * operand.stride);
  } else {
    operand.kind = cuda::kOperandInt8;
    operand.group = static_cast<int32_t>(group_of(format));
    operand.groups = operand.stride / operand.group;
    operand.spans = (operand.stride + kActivationGroup - 1) / kActivationGroup;
    const auto carve = [&](Carver carver) {
      operand.data = carver.take<int8_t>(source.rows * operand.stride);
      operand.scales = carver.take<float>(source.rows * operand.spans);
      operand.sums = carver.take<int32_t>(source.rows * operand.groups);
      return carver.used();
    };
    carve(Carver(scratch.reserve<char>(*device_, carve(Carver(nullptr)))));
  }
  if (source.index == nullptr && source.score == nullptr && !source.gated) {
    // Straight from the norm, if that has just been noted.
    cuda::NormCall* const norm = device_->last(&cuda::DeviceTable::norm);
    if (norm != nullptr && norm->out.data == source.x.data && norm->out.stride == source.x.stride &&
        norm->rows == source.rows && norm->cols == source.cols && norm->operand.data == nullptr) {
      norm->operand = operand;
      return operand;
    }
  }
  // Of few rows by the routing that chose them, if that has just been noted: it is one block.
  constexpr int64_t kFewRows = 4;
  if (source.index != nullptr && source.rows <= kFewRows) {
    cuda::RoutingCall* const routing = device_->last(&cuda::DeviceTable::route);
    if (routing != nullptr && routing->row == source.index && routing->score == source.score &&
        routing->operand.data == nullptr) {
      routing->operand = operand;
      routing->x = device_rows(source.x);
      routing->cols = source.cols;
      return operand;
    }
  }
  device_->run("prepare", &cuda::DeviceTable::prepare_operand,
               cuda::OperandCall{operand, device_rows(source.x), source.rows, source.cols,
                                 source.index, source.score, source.gated});
  return operand;
}

cuda::ProductCall CudaBackend::product_call(Rows out, const cuda::Operand& x, int64_t rows,
                                            const WeightRef& weight) {
  cuda::ProductCall call = {};
  call.kind = kind_of(weight.format);
  if (is_quantized(weight.format)) call.format = quantized_index(weight.format);
  call.weights = weight.data.get();
  call.rows = weight.rows;
  call.cols = weight.cols;
  call.panel_bytes = static_cast<int64_t>(panel_bytes(weight.format, weight.cols));
  call.x = x;
  call.count = rows;
  call.out = device_rows(out);
  return call;
}

void CudaBackend::matmul(Rows out, ConstRows x, const WeightRef& weight,
                         const MatmulOptions& options) {
  check_matmul(out, x, weight, options);
  if (x.rows == 0) return;
  const cuda::Operand operand = prepare({x, x.rows, x.cols}, weight.format, operand_);
  cuda::ProductCall call = product_call(out, operand, x.rows, weight);
  if (options.bias != nullptr) call.bias = options.bias->get();
  call.gelu = options.gelu;
  call.accumulate = options.accumulate;
  multiply(call);
}

void CudaBackend::mlp(Rows residual, ConstRows x, const WeightRef& gate_up, const WeightRef& down) {
  check_mlp(residual, x, gate_up, down);
  if (x.rows == 0) return;
  const Rows hidden(hidden_.reserve<float>(*device_, x.rows * gate_up.rows), x.rows, gate_up.rows);
  multiply(product_call(hidden, prepare({x, x.rows, x.cols}, gate_up.format, operand_), x.rows,
                        gate_up));
  const Source activated{.x = hidden, .rows = x.rows, .cols = down.cols, .gated = true};
  cuda::ProductCall call =
      product_call(residual, prepare(activated, down.format, operand_), x.rows, down);
  call.accumulate = 1;
  multiply(call);
}

void CudaBackend::moe(Rows residual, ConstRows x, const MoeWeights& weights) {
  check_moe(residual, x, weights);
  if (x.rows == 0) return;
  const auto experts = static_cast<int64_t>(weights.gate_up.size());
  const int64_t slots = x.rows * weights.top_k, places = std::min(experts, slots);
  const WeightRef &gate_up = weights.gate_up[0], &down = weights.down[0];

  // Of few rows, the shared expert is part of the others' products: more weights are on their way
  // at a time. Its operand comes first, while the norm before may still make it.
  constexpr int64_t kFewRows = 16;
  const bool together = x.rows <= kFewRows && packed_alike(weights.shared_gate_up, gate_up) &&
                        packed_alike(weights.shared_down, down);
  cuda::SharedExpert shared_up = {}, shared_down = {};
  Rows shared_hidden(nullptr, x.rows, gate_up.rows);
  if (together) {
    shared_hidden.data = hidden_.reserve<float>(*device_, x.rows * gate_up.rows);
    shared_up = {weights.shared_gate_up.data.get(),
                 prepare({x, x.rows, x.cols}, gate_up.format, shared_operand_), x.rows,
                 device_rows(shared_hidden), 0};
  }

  // Who gets which rows.
  const Rows logits(logits_.reserve<float>(*device_, x.rows * experts), x.rows, experts);
  multiply(product_call(logits, prepare({x, x.rows, x.cols}, weights.router.format, operand_),
                        x.rows, weights.router));
  cuda::RoutingCall routing = {};
  routing.logits = logits.data;
  routing.rows = x.rows;
  routing.experts = static_cast<int32_t>(experts);
  routing.top_k = static_cast<int32_t>(weights.top_k);
  const auto carve = [&](Carver carver) {
    routing.row = carver.take<int32_t>(slots);
    routing.score = carver.take<float>(slots);
    routing.offsets = carver.take<int32_t>(experts + 1);
    routing.occupied = carver.take<int32_t>(places);
    routing.slot = carver.take<int32_t>(slots);
    return carver.used();
  };
  carve(Carver(routing_.reserve<char>(*device_, carve(Carver(nullptr)))));
  device_->run("route", &cuda::DeviceTable::route, routing);

  if (!together) mlp(residual, x, weights.shared_gate_up, weights.shared_down);

  // The routed experts, of inputs times their scores. Which have rows only the device knows.
  const auto pointers = [&](const std::vector<WeightRef>& matrices) {
    std::vector<const void*> data;
    for (const WeightRef& matrix : matrices) data.push_back(matrix.data.get());
    return expert_tables_.of(*device_, data);
  };
  cuda::ExpertRows rows{routing.offsets, routing.occupied, pointers(weights.gate_up),
                        static_cast<int32_t>(places)};
  const Rows hidden(routed_hidden_.reserve<float>(*device_, slots * gate_up.rows), slots,
                    gate_up.rows);
  const Source scaled{
      .x = x, .rows = slots, .cols = x.cols, .index = routing.row, .score = routing.score};
  cuda::ProductCall up =
      product_call(hidden, prepare(scaled, gate_up.format, operand_), slots, gate_up);
  up.experts = rows;
  up.shared = shared_up;
  multiply(up);
  const Rows out(routed_out_.reserve<float>(*device_, slots * x.cols), slots, x.cols);
  const Source activated{.x = hidden, .rows = slots, .cols = down.cols, .gated = true};
  cuda::ProductCall call =
      product_call(out, prepare(activated, down.format, operand_), slots, down);
  rows.matrices = pointers(weights.down);
  call.experts = rows;
  if (together)
    shared_down = {weights.shared_down.data.get(),
                   prepare({.x = shared_hidden, .rows = x.rows, .cols = down.cols, .gated = true},
                           down.format, shared_operand_),
                   x.rows, device_rows(residual), 1};
  call.shared = shared_down;
  multiply(call);
  device_->run("add_experts", &cuda::DeviceTable::add_experts,
               cuda::AddExpertsCall{device_rows(residual), device_rows(ConstRows(out)),
                                    routing.slot, x.rows, x.cols, routing.top_k});
}

}  // namespace puna
