// The mixture of experts: shared expert and routed experts, computed for the rows that chose them.
#include <algorithm>

#include "backend/checks.h"
#include "backend/cpu/implementation.h"

namespace puna {

void CpuBackend::moe(Rows residual, ConstRows x, const MoeWeights& weights) {
  check_moe(residual, x, weights);
  if (x.rows == 0) return;
  const auto experts = static_cast<int64_t>(weights.gate_up.size());
  const int64_t hidden = x.cols, slots = x.rows * weights.top_k;

  const FeedForward shared =
      plan_feed_forward(prepare(x, weights.shared_gate_up, rounded_), x.rows,
                        weights.shared_gate_up, weights.shared_down, hidden_, activated_);
  const Operand routed_x = reserve_operand(weights.gate_up[0].format, slots, hidden, routed_rows_);
  const FeedForward routed = plan_feed_forward(routed_x, slots, weights.gate_up[0], weights.down[0],
                                               routed_hidden_, routed_activated_);
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
  const int64_t pieces = (hidden + kPieceColumns - 1) / kPieceColumns;
  for_tiles(activations + slots * pieces, x.rows, alone, [&](int64_t tile, const Lane&) {
    if (tile < activations) return activate(shared, tile);
    tile -= activations;
    const int64_t slot = tile / pieces, column = tile % pieces * kPieceColumns;
    const int64_t count = std::min(kPieceColumns, hidden - column);
    float scaled[kPieceColumns];
    kernels_.scale(scaled, x.row(routing_.row[slot]) + column, routing_.score[slot], count);
    write_operand(routed_x, slot, column, scaled, count);
  });

  const auto occupied = static_cast<int64_t>(routing_.occupied.size());
  const int64_t strip = tiling(slots, occupied * 2 * routed.width).strip_columns;
  const int64_t strips = (2 * routed.width + strip - 1) / strip;
  for_tiles(occupied * strips, x.rows, alone, [&](int64_t index, const Lane&) {
    const int64_t expert = routing_.occupied[index / strips], column = index % strips * strip;
    const Tile tile{column, std::min(strip, 2 * routed.width - column), routing_.offset[expert],
                    routing_.offset[expert + 1] - routing_.offset[expert]};
    multiply(routed.hidden + tile.first * 2 * routed.width + column, 2 * routed.width, routed.x,
             weights.gate_up[expert], tile);
  });
  for_tiles(slots * routed.pieces(), x.rows, alone,
            [&](int64_t tile, const Lane&) { activate(routed, tile); });

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

}  // namespace puna
