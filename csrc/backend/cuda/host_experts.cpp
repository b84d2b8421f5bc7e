// Experts in the host's memory: what the device cannot hold is computed where it lies, while the
// device computes the shared expert.
#include <cstddef>

#include "backend/cuda/implementation.h"

namespace puna {

// Each slot's row comes back by itself, and is added as those of the device's experts are: so a
// layer gives the same bits wherever its experts lie, if their products do (kernel_table.h).
void CudaBackend::moe_with_host(Rows residual, ConstRows x, const MoeWeights& weights) {
  const auto slots = static_cast<size_t>(x.rows * weights.top_k);
  // The shared expert's operand comes first, while the norm before may still make it.
  const cuda::Operand operand =
      prepare({x, x.rows, x.cols}, weights.shared_gate_up.format, shared_operand_);
  const cuda::RoutingCall routing = route(x, weights);

  // Rows, scores and offsets lie in this order in one piece of memory (route()).
  const auto* const first = reinterpret_cast<const std::byte*>(routing.row);
  const int32_t* const end = routing.offsets + routing.experts + 1;
  const auto route_bytes = static_cast<size_t>(reinterpret_cast<const std::byte*>(end) - first);
  auto* const routes =
      fetched_routes_.reserve<std::byte>(*device_, static_cast<int64_t>(route_bytes));
  auto* const rows = fetched_rows_.reserve<float>(*device_, x.rows * x.cols);
  device_->fetch(routes, first, route_bytes, route_bytes, 1);
  device_->fetch(rows, x.data, static_cast<size_t>(x.cols) * sizeof(float),
                 static_cast<size_t>(x.stride) * sizeof(float), x.rows);

  feed_forward(residual, operand, weights.shared_gate_up, weights.shared_down);
  device_->start();
  device_->await_fetched();
  const auto fetched = [&]<class T>(const T* array, size_t count) {
    const auto at = reinterpret_cast<const std::byte*>(array) - first;
    return std::span<const T>(reinterpret_cast<const T*>(routes + at), count);
  };
  host_routing_.adopt(fetched(routing.row, slots), fetched(routing.score, slots),
                      fetched(routing.offsets, weights.gate_up.size() + 1));

  // What was made before has gone up: the rows fetched since had to wait for it.
  const auto made_rows = static_cast<int64_t>(slots);
  const Rows made(host_made_.reserve<float>(*device_, made_rows * x.cols), made_rows, x.cols);
  host_->experts(made, {rows, x.rows, x.cols}, host_routing_, weights.gate_up, weights.down);
  auto* const sent = routed_out_.reserve<float>(*device_, made_rows * x.cols);
  device_->upload(sent, made.data, slots * static_cast<size_t>(x.cols) * sizeof(float));
  add_slots(residual, {sent, made_rows, x.cols}, routing);
}

}  // namespace puna
