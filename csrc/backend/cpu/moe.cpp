// The mixture of experts: shared expert and routed experts, computed for the rows that chose them.
#include <algorithm>

#include "backend/checks.h"
#include "backend/cpu/implementation.h"

namespace puna {

CpuBackend::FeedForward CpuBackend::plan_slots(int64_t slots, const WeightRef& gate_up,
                                               const WeightRef& down) {
  return plan_feed_forward(reserve_operand(gate_up.format, slots, gate_up.cols, routed_rows_),
                           slots, gate_up, down, routed_hidden_, routed_activated_);
}

void CpuBackend::scale_input(const FeedForward& routed, const Routing& routing, ConstRows x,
                             int64_t piece) const {
  const int64_t slot = piece / pieces_of(x.cols);
  const int64_t column = piece % pieces_of(x.cols) * kPieceColumns;
  const int64_t count = std::min(kPieceColumns, x.cols - column);
  float scaled[kPieceColumns];
  kernels_.scale(scaled, x.row(routing.row[slot]) + column, routing.score[slot], count);
  write_operand(routed.x, slot, column, scaled, count);
}

template <class Body>
void CpuBackend::for_expert_tiles(const Routing& routing, int64_t columns, int64_t rows, bool alone,
                                  const Body& body) {
  const int64_t slots = std::ssize(routing.row), occupied = std::ssize(routing.occupied);
  const int64_t strip = tiling(slots, occupied * columns).strip_columns;
  const int64_t strips = (columns + strip - 1) / strip;
  for_tiles(occupied * strips, rows, alone, [&](int64_t index, const Lane&) {
    const int64_t expert = routing.occupied[index / strips], column = index % strips * strip;
    const int64_t first = routing.offset[expert];
    body(expert, Tile{column, std::min(strip, columns - column), first,
                      routing.offset[expert + 1] - first});
  });
}

void CpuBackend::activate_experts(const FeedForward& routed, const Routing& routing,
                                  std::span<const WeightRef> gate_up, int64_t rows, bool alone) {
  const int64_t columns = 2 * routed.width;
  for_expert_tiles(routing, columns, rows, alone, [&](int64_t expert, const Tile& tile) {
    multiply(routed.hidden + tile.first * columns + tile.column, columns, routed.x, gate_up[expert],
             tile);
  });
  for_tiles(std::ssize(routing.row) * routed.pieces(), rows, alone,
            [&](int64_t piece, const Lane&) { activate(routed, piece); });
}

void CpuBackend::moe(Rows residual, ConstRows x, const MoeWeights& weights) {
  check_moe(residual, x, weights);
  if (x.rows == 0) return;
  const auto experts = static_cast<int64_t>(weights.gate_up.size());
  const int64_t hidden = x.cols, slots = x.rows * weights.top_k;

  const FeedForward shared =
      plan_feed_forward(prepare(x, weights.shared_gate_up, rounded_), x.rows,
                        weights.shared_gate_up, weights.shared_down, hidden_, activated_);
  const FeedForward routed = plan_slots(slots, weights.gate_up[0], weights.down[0]);
  routing_.reserve(x.rows, experts, weights.top_k);
  auto* logits = logits_.reserve<float>(x.rows * experts);
  const Operand router_x = prepare(x, weights.router, router_rows_);

  const Tiling router_tiles = tiling(x.rows, experts);
  const Tiling shared_tiles = tiling(x.rows, 2 * shared.width);
  const Tiling down_tiles = tiling(x.rows, hidden);
  auto* sums = lanes_.reserve<float>(pool_.lanes() * down_tiles.tile_size());

  const bool alone =
      small(x.rows * hidden * (experts + 3 * (shared.width + weights.top_k * routed.width)));

  // The router's logits and the shared expert's first product.
  const int64_t router_count = router_tiles.count();
  for_tiles(router_count + shared_tiles.count(), x.rows, alone, [&](int64_t index, const Lane&) {
    if (index < router_count) {
      const Tile tile = router_tiles.at(index);
      multiply(logits + tile.first * experts + tile.column, experts, router_x, weights.router,
               tile);
    } else {
      const Tile tile = shared_tiles.at(index - router_count);
      multiply(shared.hidden + tile.first * 2 * shared.width + tile.column, 2 * shared.width,
               shared.x, weights.shared_gate_up, tile);
    }
  });
  routing_.assign(logits, x.rows, experts, weights.top_k);

  // What the shared expert's second product takes, and the routed experts' inputs: the row times
  // its score, as the weights want it.
  const int64_t activations = x.rows * shared.pieces();
  for_tiles(activations + slots * pieces_of(x.cols), x.rows, alone,
            [&](int64_t piece, const Lane&) {
              if (piece < activations)
                activate(shared, piece);
              else
                scale_input(routed, routing_, x, piece - activations);
            });
  activate_experts(routed, routing_, weights.gate_up, x.rows, alone);

  // One lane owns a tile of the residual and adds to it in a fixed order: shared expert, then
  // routed experts by index.
  for_tiles(down_tiles.count(), x.rows, alone, [&](int64_t index, const Lane& lane) {
    float* lane_sums = sums + lane.id() * down_tiles.tile_size();
    const Tile tile = down_tiles.at(index);
    const auto add = [&](int64_t row, int64_t i) {
      kernels_.add(residual.row(row) + tile.column, lane_sums + i * tile.width, tile.width);
    };
    multiply(lane_sums, tile.width, shared.activated, weights.shared_down, tile);
    for (int64_t i = 0; i < tile.rows; ++i) add(tile.first + i, i);
    for (const int64_t expert : routing_.occupied) {
      const int64_t* rows = routing_.row.data();
      const int64_t* last = rows + routing_.offset[expert + 1];
      const int64_t* begin = std::lower_bound(rows + routing_.offset[expert], last, tile.first);
      const int64_t* end = std::lower_bound(begin, last, tile.first + tile.rows);
      if (begin == end) continue;
      multiply(lane_sums, tile.width, routed.activated, weights.down[expert],
               {tile.column, tile.width, begin - rows, end - begin});
      for (int64_t i = 0; i < end - begin; ++i) add(begin[i], i);
    }
  });
}

void CpuBackend::experts(Rows out, ConstRows x, const Routing& routing,
                         std::span<const WeightRef> gate_up, std::span<const WeightRef> down) {
  check_experts(out, x, routing, gate_up, down);
  if (out.rows == 0) return;
  const FeedForward routed = plan_slots(out.rows, gate_up[0], down[0]);
  const bool alone = small(out.rows * 3 * x.cols * routed.width);
  for_tiles(out.rows * pieces_of(x.cols), x.rows, alone,
            [&](int64_t piece, const Lane&) { scale_input(routed, routing, x, piece); });
  activate_experts(routed, routing, gate_up, x.rows, alone);
  for_expert_tiles(routing, out.cols, x.rows, alone, [&](int64_t expert, const Tile& tile) {
    multiply(out.row(tile.first) + tile.column, out.stride, routed.activated, down[expert], tile);
  });
}

}  // namespace puna
