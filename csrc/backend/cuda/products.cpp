// Matrix products, the dense feed-forward block, and the mixture of experts.
#include <algorithm>
#include <numeric>
#include <vector>

#include "backend/carver.h"
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

// The rows of an operand from `first` on.
cuda::Operand rows_from(cuda::Operand operand, int64_t first) {
  const int64_t bytes = operand.kind == cuda::kOperandF32    ? 4
                        : operand.kind == cuda::kOperandBF16 ? 2
                                                             : 1;
  operand.data = static_cast<char*>(operand.data) + first * operand.stride * bytes;
  if (operand.kind != cuda::kOperandInt8) return operand;
  operand.scales += first * operand.spans;
  operand.sums += first * operand.groups;
  return operand;
}

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
    const auto carve = [&](char* memory) {
      Carver carver(memory, Carver::kDeviceAlignment);
      operand.data = carver.take<int8_t>(source.rows * operand.stride);
      operand.scales = carver.take<float>(source.rows * operand.spans);
      operand.sums = carver.take<int32_t>(source.rows * operand.groups);
      return carver.used();
    };
    carve(scratch.reserve<char>(*device_, carve(nullptr)));
  }
  if (source.index == nullptr && source.score == nullptr && !source.gated) {
    // Straight from the norm, if that has just been noted.
    cuda::NormCall* const norm = device_->last(&cuda::DeviceTable::norm);
    if (norm != nullptr && norm->out.data == source.x.data && norm->out.stride == source.x.stride &&
        norm->rows == source.rows && norm->cols == source.cols && norm->operand.data == nullptr) {
      norm->operand = operand;
      return operand;
    }
    // Or from attention, a span of columns for each head.
    cuda::AttendCall* const attend = device_->last(&cuda::DeviceTable::attend);
    if (attend != nullptr && attend->out.data == source.x.data &&
        attend->out.stride == source.x.stride && attend->rows == source.rows &&
        attend->heads.dim == kActivationGroup && operand.stride == source.cols &&
        attend->operand.data == nullptr) {
      attend->operand = operand;
      return operand;
    }
    // Or from what rounds to whole spans as well: attention among patches, and products by
    // warpgroups. These may read the operand of their own from the same memory.
    const bool is_whole = operand.kind == cuda::kOperandBF16 && operand.stride == source.cols;
    cuda::VisionAttentionCall* const vision = device_->last(&cuda::DeviceTable::vision_attention);
    if (is_whole && vision != nullptr && vision->out.data == source.x.data &&
        vision->out.stride == source.x.stride && vision->rounded != nullptr &&
        vision->tiles * vision->tokens == source.rows &&
        int64_t{vision->heads} * vision->dim == source.cols && vision->operand.data == nullptr) {
      vision->operand = operand;
      return operand;
    }
    cuda::ProductCall* const product = device_->last(&cuda::DeviceTable::product);
    if (is_whole && product != nullptr && product->kind == cuda::kWeightsBF16 &&
        product->form == cuda::kProductOfWarpgroups && product->out.data == source.x.data &&
        product->out.stride == source.x.stride && product->count == source.rows &&
        product->rows == source.cols && product->operand.data == nullptr) {
      if (product->x.data == operand.data)
        operand.data = made_operand_.reserve<uint16_t>(*device_, source.rows * operand.stride);
      product->operand = operand;
      product->passing = passing_ == product->out.data;
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
  // Bits of products with bfloat16 may depend on it: matmul() has it on demand.
  if (weight.format != WeightFormat::kBF16) call.form = product_form_;
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
  if (options.many_rows) call.form = product_form_;
  passing_ = options.passing ? out.data : nullptr;
  multiply(call);
}

void CudaBackend::mlp(Rows residual, ConstRows x, const WeightRef& gate_up, const WeightRef& down) {
  check_mlp(residual, x, gate_up, down);
  if (x.rows == 0) return;
  feed_forward(residual, prepare({x, x.rows, x.cols}, gate_up.format, operand_), gate_up, down);
}

void CudaBackend::feed_forward(Rows residual, const cuda::Operand& x, const WeightRef& gate_up,
                               const WeightRef& down) {
  const int64_t rows = residual.rows;
  const Rows hidden(hidden_.reserve<float>(*device_, rows * gate_up.rows), rows, gate_up.rows);
  multiply(product_call(hidden, x, rows, gate_up));
  const Source activated{.x = hidden, .rows = rows, .cols = down.cols, .gated = true};
  cuda::ProductCall call =
      product_call(residual, prepare(activated, down.format, operand_), rows, down);
  call.accumulate = 1;
  multiply(call);
}

// Who gets which rows: from the logits, or, of few rows, by the router itself.
cuda::RoutingCall CudaBackend::route(ConstRows x, const MoeWeights& weights) {
  const auto experts = static_cast<int64_t>(weights.gate_up.size());
  const int64_t slots = x.rows * weights.top_k;
  const int64_t spans = (x.cols + kActivationGroup - 1) / kActivationGroup;
  constexpr int64_t kFewRows = 4;
  const bool routes = x.rows <= kFewRows && weights.router.format == WeightFormat::kF32 &&
                      x.rows * spans * experts <= cuda::kMostRouterParts;
  cuda::RoutingCall call = {};
  call.rows = x.rows;
  call.experts = static_cast<int32_t>(experts);
  call.top_k = static_cast<int32_t>(weights.top_k);
  call.x = device_rows(x);
  call.cols = x.cols;
  const auto carve = [&](char* memory) {
    Carver carver(memory, Carver::kDeviceAlignment);
    call.row = carver.take<int32_t>(slots);
    call.score = carver.take<float>(slots);
    call.offsets = carver.take<int32_t>(experts + 1);
    call.occupied = carver.take<int32_t>(std::min(experts, slots));
    call.slot = carver.take<int32_t>(slots);
    call.logits = carver.take<float>(x.rows * experts);
    if (routes) call.router.parts = carver.take<float>(x.rows * spans * experts);
    return carver.used();
  };
  carve(routing_.reserve<char>(*device_, carve(nullptr)));
  if (routes) {
    call.router.weights = weights.router.data.get();
    call.router.panel_bytes =
        static_cast<int64_t>(panel_bytes(weights.router.format, weights.router.cols));
    call.router.arrived = arrived_routers_.reserve<int32_t>(*device_, 1);
    // The norm that makes x, if it has just been noted: blocks that multiply with a row normalise
    // it for themselves, which takes them no longer than one.
    const cuda::NormCall* const norm = device_->last(&cuda::DeviceTable::norm);
    if (norm != nullptr && norm->out.data == x.data && norm->out.stride == x.stride &&
        norm->rows == x.rows && norm->cols == x.cols && norm->added.rows == 0 &&
        norm->x.data != norm->out.data && x.cols <= cuda::kMostRouterParts) {
      call.norm = *norm;
      device_->drop_last();
    }
  } else {
    multiply(product_call({call.logits, x.rows, experts},
                          prepare({x, x.rows, x.cols}, weights.router.format, operand_), x.rows,
                          weights.router));
  }
  device_->run("route", &cuda::DeviceTable::route, call);
  return call;
}

void CudaBackend::moe(Rows residual, ConstRows x, const MoeWeights& weights) {
  check_moe(residual, x, weights);
  if (x.rows == 0) return;
  const bool sent = sends_experts(weights, x.rows);
  if (weights.experts_on_host && !sent) {
    moe_with_host(residual, x, weights);
    return;
  }
  const int64_t slots = x.rows * weights.top_k;
  const WeightRef &gate_up = weights.gate_up[0], &down = weights.down[0];

  // Of few rows, the shared expert is part of the others' products: more weights are on their way
  // at a time. Its operand comes first, while the norm before may still make it, and what it makes
  // of its rows lies behind what the others make of theirs.
  constexpr int64_t kFewRows = 16;
  const bool together = !sent && x.rows <= kFewRows &&
                        packed_alike(weights.shared_gate_up, gate_up) &&
                        packed_alike(weights.shared_down, down);
  const int64_t rows = slots + (together ? x.rows : 0);
  const Rows hidden(routed_hidden_.reserve<float>(*device_, rows * gate_up.rows), rows,
                    gate_up.rows);
  cuda::SharedExpert shared = {};
  if (together)
    shared = {weights.shared_gate_up.data.get(),
              prepare({x, x.rows, x.cols}, gate_up.format, shared_operand_), x.rows,
              device_rows(hidden.slice(slots, x.rows)), 0};

  const cuda::RoutingCall routing = route(x, weights);
  const Source scaled{
      .x = x, .rows = slots, .cols = x.cols, .index = routing.row, .score = routing.score};
  if (!together) mlp(residual, x, weights.shared_gate_up, weights.shared_down);
  cuda::Operand operand = prepare(scaled, gate_up.format, operand_);

  // The routed experts, of inputs times their scores. Which have rows only the device knows.
  cuda::ProductCall call = product_call(hidden, operand, slots, gate_up);
  call.shared = shared;
  multiply_experts(call, routing, weights.gate_up, sent);
  const Rows out(routed_out_.reserve<float>(*device_, slots * x.cols), slots, x.cols);
  operand =
      prepare({.x = hidden, .rows = rows, .cols = down.cols, .gated = true}, down.format, operand_);
  call = product_call(out, operand, slots, down);
  if (together)
    call.shared = {weights.shared_down.data.get(), rows_from(operand, slots), x.rows,
                   device_rows(residual), 1};
  multiply_experts(call, routing, weights.down, sent);
  add_slots(residual, out, routing);
}

bool CudaBackend::sends_experts(const MoeWeights& weights, int64_t rows) const {
  if (!weights.experts_are_sent) return false;
  // Otherwise a row's bits would tell what other rows are in its call.
  const WeightRef &gate_up = weights.gate_up[0], &down = weights.down[0];
  if (!is_quantized(gate_up.format) || !is_quantized(down.format) || !host_->has_bits_of_devices())
    return false;
  if (sent_rows_) return *sent_rows_ > 0 && rows >= *sent_rows_;
  double bytes = 0;
  for (size_t e = 0; e < weights.gate_up.size(); ++e)
    bytes += static_cast<double>(weights.gate_up[e].bytes + weights.down[e].bytes);
  const int64_t multiply_adds =
      weights.top_k * (gate_up.rows * gate_up.cols + down.rows * down.cols);
  return rows >=
         rows_worth_sending({}, bytes, static_cast<double>(multiply_adds), host_->threads());
}

void CudaBackend::multiply_experts(cuda::ProductCall call, const cuda::RoutingCall& routing,
                                   std::span<const WeightRef> matrices, bool sent) {
  const auto experts = static_cast<int64_t>(matrices.size());
  if (!sent) {
    std::vector<const void*> data;
    for (const WeightRef& matrix : matrices) data.push_back(matrix.data.get());
    call.experts = {routing.offsets, routing.occupied, expert_tables_.of(*device_, data),
                    static_cast<int32_t>(std::min(experts, call.count))};
    multiply(call);
    return;
  }
  // One after the other, with rows or without.
  std::vector<int32_t> numbers(matrices.size());
  std::iota(numbers.begin(), numbers.end(), 0);
  const int32_t* const number = device_->table(std::span<const int32_t>(numbers));
  expert_window_.each(*device_, *host_, matrices, [&](size_t e, const void* place) {
    call.weights = place;
    call.experts = {routing.offsets, number + e,
                    expert_tables_.of(*device_, std::vector(matrices.size(), place)), 1};
    multiply(call);
  });
}

void CudaBackend::add_slots(Rows residual, ConstRows made, const cuda::RoutingCall& routing) {
  device_->run("add_experts", &cuda::DeviceTable::add_experts,
               cuda::AddExpertsCall{device_rows(residual), device_rows(made), routing.slot,
                                    residual.rows, residual.cols, routing.top_k});
}

}  // namespace puna
