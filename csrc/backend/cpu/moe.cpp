// The mixture of experts: shared expert and routed experts, computed for the rows that chose them.
#include <algorithm>

#include "backend/checks.h"
#include "backend/cpu/implementation.h"

namespace puna {
namespace {

int64_t panels_of(int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

}  // namespace

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

  const int64_t router_panels = panels_of(experts);
  const int64_t shared_panels = panels_of(weights.shared_gate_up.rows);
  const int64_t routed_panels = panels_of(weights.gate_up[0].rows);
  const int64_t down_panels = panels_of(hidden);
  const int64_t up_rows = rows_per_tile(x.rows, router_panels + shared_panels);
  const int64_t up_blocks = (x.rows + up_rows - 1) / up_rows;
  const int64_t down_rows = rows_per_tile(x.rows, down_panels);
  const int64_t down_blocks = (x.rows + down_rows - 1) / down_rows;
  auto* sums = lanes_.reserve<float>(pool_.lanes() * std::min(x.rows, down_rows) * kPanelRows);

  TileCounter up, shared_activation, inputs, routed_up, routed_activation, down;
  pool_.run([&](Lane& lane) {
    // The router's logits and the shared expert's first product.
    for_tiles(lane, up, (router_panels + shared_panels) * up_blocks, x.rows, [&](int64_t tile) {
      const int64_t panel = tile / up_blocks, first = tile % up_blocks * up_rows;
      const int64_t rows = std::min(up_rows, x.rows - first);
      if (panel < router_panels)
        multiply(logits + first * experts + panel * kPanelRows, experts, router_x, weights.router,
                 panel, first, rows);
      else
        multiply(shared.hidden + first * 2 * shared.width + (panel - router_panels) * kPanelRows,
                 2 * shared.width, shared.x, weights.shared_gate_up, panel - router_panels, first,
                 rows);
    });
    lane.barrier();
    if (lane.id() == 0) routing_.assign(logits, x.rows, experts, weights.top_k);
    activate(lane, shared_activation, shared, x.rows);
    lane.barrier();

    // The routed experts' inputs: the row times its score, as the weights want it.
    const int64_t pieces = (hidden + kPieceColumns - 1) / kPieceColumns;
    for_tiles(lane, inputs, slots * pieces, x.rows, [&](int64_t tile) {
      const int64_t slot = tile / pieces, column = tile % pieces * kPieceColumns;
      const int64_t count = std::min(kPieceColumns, hidden - column);
      float scaled[kPieceColumns];
      kernels_.scale(scaled, x.row(routing_.row[slot]) + column, routing_.score[slot], count);
      write_operand(routed_x, slot, column, scaled, count);
    });
    lane.barrier();
    const auto occupied = static_cast<int64_t>(routing_.occupied.size());
    for_tiles(lane, routed_up, occupied * routed_panels, x.rows, [&](int64_t tile) {
      const int64_t expert = routing_.occupied[tile / routed_panels], panel = tile % routed_panels;
      const int64_t first = routing_.offset[expert];
      multiply(routed.hidden + first * 2 * routed.width + panel * kPanelRows, 2 * routed.width,
               routed.x, weights.gate_up[expert], panel, first,
               routing_.offset[expert + 1] - first);
    });
    lane.barrier();
    activate(lane, routed_activation, routed, slots);
    lane.barrier();

    // One lane owns a tile of the residual and adds to it in a fixed order: shared expert, then
    // routed experts by index.
    float* lane_sums = sums + lane.id() * std::min(x.rows, down_rows) * kPanelRows;
    for_tiles(lane, down, down_panels * down_blocks, x.rows, [&](int64_t tile) {
      const int64_t panel = tile / down_blocks, column = panel * kPanelRows;
      const int64_t width = std::min(kPanelRows, hidden - column);
      const int64_t begin = tile % down_blocks * down_rows;
      const int64_t end = std::min(x.rows, begin + down_rows);
      multiply(lane_sums, kPanelRows, shared.activated, weights.shared_down, panel, begin,
               end - begin);
      for (int64_t r = begin; r < end; ++r)
        kernels_.add(residual.row(r) + column, lane_sums + (r - begin) * kPanelRows, width);
      for (const int64_t expert : routing_.occupied) {
        const int64_t* rows = routing_.row.data();
        const int64_t* last = rows + routing_.offset[expert + 1];
        const int64_t first = std::lower_bound(rows + routing_.offset[expert], last, begin) - rows;
        const int64_t count = std::lower_bound(rows + first, last, end) - rows - first;
        if (count == 0) continue;
        multiply(lane_sums, kPanelRows, routed.activated, weights.down[expert], panel, first,
                 count);
        for (int64_t i = 0; i < count; ++i)
          kernels_.add(residual.row(rows[first + i]) + column, lane_sums + i * kPanelRows, width);
      }
    });
  });
}

}  // namespace puna
