// Matrix products and the dense feed-forward block.
#include <algorithm>

#include "backend/checks.h"
#include "backend/cpu/implementation.h"
#include "backend/cpu/pack.h"

namespace puna {
namespace {

// Most rows of one tile. More would only make its sums leave the caches before they are added.
constexpr int64_t kMostTileRows = 512;

}  // namespace

CpuBackend::Operand CpuBackend::reserve_operand(WeightFormat format, int64_t rows, int64_t cols,
                                                Scratch& scratch) {
  Operand operand{format, nullptr, cols, padded_cols(format, cols)};
  if (takes_fp32(format)) {
    operand.data = scratch.reserve<float>(rows * operand.stride);
  } else if (format == WeightFormat::kBF16) {
    operand.data = scratch.reserve<uint16_t>(rows * operand.stride);
  } else {
    operand.groups = operand.stride / group_of(format);
    operand.spans = (operand.stride + kActivationGroup - 1) / kActivationGroup;
    const int64_t scales = rows * operand.spans, sums = rows * operand.groups;
    operand.scales = scratch.reserve<float>(scales + sums + (rows * operand.stride + 3) / 4);
    operand.sums = reinterpret_cast<int32_t*>(operand.scales + scales);
    operand.data = operand.sums + sums;
  }
  return operand;
}

void CpuBackend::write_operand(const Operand& operand, int64_t row, int64_t column,
                               const float* values, int64_t count) const {
  const int64_t place = row * operand.stride + column;
  // The last piece fills what the format's blocks need past the last column.
  const int64_t padded = column + count == operand.cols ? operand.stride - column : count;
  if (takes_fp32(operand.format)) {
    float* to = static_cast<float*>(operand.data) + place;
    if (to != values) std::copy_n(values, count, to);
  } else if (operand.format == WeightFormat::kBF16) {
    uint16_t* to = static_cast<uint16_t*>(operand.data) + place;
    kernels_.bf16_from_f32(to, values, count);
    std::fill(to + count, to + padded, uint16_t{0});
  } else {
    const int64_t group = group_of(operand.format);
    kernels_.quantize_row(static_cast<int8_t*>(operand.data) + place,
                          operand.scales + row * operand.spans + column / kActivationGroup,
                          operand.sums + row * operand.groups + column / group, values, count,
                          padded, group);
  }
}

CpuBackend::Operand CpuBackend::prepare(ConstRows x, const WeightRef& weight, Scratch& scratch) {
  if (takes_fp32(weight.format))
    return {weight.format, const_cast<float*>(x.data), x.cols, x.stride};
  const Operand operand = reserve_operand(weight.format, x.rows, x.cols, scratch);
  for_rows(x.rows, x.cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) write_operand(operand, r, 0, x.row(r), x.cols);
  });
  return operand;
}

void CpuBackend::multiply(float* out, int64_t out_stride, const Operand& x, const WeightRef& weight,
                          const Tile& tile, const float* bias) const {
  const size_t panel = panel_bytes(weight.format, weight.cols);
  const auto* packed = static_cast<const char*>(weight.data.get()) +
                       static_cast<size_t>(tile.column / kPanelRows) * panel;
  if (bias != nullptr) bias += tile.column;
  const int64_t place = tile.first * x.stride;
  if (weight.format == WeightFormat::kF32) {
    kernels_.gemm_f32(out, out_stride, static_cast<const float*>(x.data) + place, x.stride,
                      reinterpret_cast<const float*>(packed), bias, tile.rows, weight.cols,
                      tile.width);
    return;
  }
  if (weight.format == WeightFormat::kFP8) {
    for (int64_t column = 0; column < tile.width; column += kPanelRows, packed += panel)
      kernels_.gemm_fp8(out + column, out_stride, static_cast<const float*>(x.data) + place,
                        x.stride, packed, bias != nullptr ? bias + column : nullptr, tile.rows,
                        weight.cols, std::min(kPanelRows, tile.width - column));
    return;
  }
  if (weight.format == WeightFormat::kBF16) {
    kernels_.gemm_bf16(out, out_stride, static_cast<const uint16_t*>(x.data) + place, x.stride,
                       reinterpret_cast<const uint16_t*>(packed), bias, tile.rows, weight.cols,
                       tile.width);
    return;
  }
  const QuantizedRows rows{static_cast<const int8_t*>(x.data) + place,
                           x.scales + tile.first * x.spans,
                           x.sums + tile.first * x.groups,
                           x.stride,
                           x.spans,
                           x.groups};
  for (int64_t column = 0; column < tile.width; column += kPanelRows, packed += panel)
    kernels_.gemm_quantized[quantized_index(weight.format)](
        out + column, out_stride, rows, packed, bias != nullptr ? bias + column : nullptr,
        tile.rows, std::min(kPanelRows, tile.width - column));
}

CpuBackend::Tiling CpuBackend::tiling(int64_t rows, int64_t columns) const {
  constexpr int64_t kTilesPerLane = 4, kLeastRows = 16;
  const int64_t panels = (columns + kPanelRows - 1) / kPanelRows;
  const int64_t wanted = kTilesPerLane * pool_.lanes();
  const int64_t strip =
      rows <= kStreamedRows ? 1 : std::clamp<int64_t>(panels / wanted, 1, kStripPanels);
  const int64_t strips = (panels + strip - 1) / strip;
  // Blocks of one size: a small last one would be as much work per row as few rows are.
  const int64_t blocks =
      std::max((wanted + strips - 1) / strips, (rows + kMostTileRows - 1) / kMostTileRows);
  return {rows, columns, std::max((rows + blocks - 1) / blocks, kLeastRows), strip * kPanelRows};
}

void CpuBackend::matmul(Rows out, ConstRows x, const WeightRef& weight,
                        const MatmulOptions& options) {
  check_matmul(out, x, weight, options);
  if (x.rows == 0) return;
  const Operand operand = prepare(x, weight, rounded_);
  const Tiling tiles = tiling(x.rows, weight.rows);
  const float* bias = options.bias != nullptr ? options.bias->get() : nullptr;
  auto* sums = lanes_.reserve<float>(pool_.lanes() * tiles.tile_size());
  const bool alone = small(x.rows * weight.rows * weight.cols);
  for_tiles(tiles.count(), x.rows, alone, [&](int64_t index, const Lane& lane) {
    const Tile tile = tiles.at(index);
    const auto target_row = [&](int64_t r) { return out.row(tile.first + r) + tile.column; };
    float* target = options.accumulate ? sums + lane.id() * tiles.tile_size() : target_row(0);
    const int64_t stride = options.accumulate ? tile.width : out.stride;
    multiply(target, stride, operand, weight, tile, bias);
    for (int64_t r = 0; r < tile.rows; ++r) {
      float* row = target + r * stride;
      if (options.gelu) kernels_.gelu(row, row, tile.width);
      if (options.accumulate) kernels_.add(target_row(r), row, tile.width);
    }
  });
}

CpuBackend::FeedForward CpuBackend::plan_feed_forward(const Operand& x, int64_t rows,
                                                      const WeightRef& gate_up,
                                                      const WeightRef& down, Scratch& hidden,
                                                      Scratch& activated) {
  FeedForward plan;
  plan.x = x;
  plan.width = down.cols;
  plan.hidden = hidden.reserve<float>(rows * gate_up.rows);
  // An fp32 activation stays where the gate was.
  plan.activated = takes_fp32(down.format)
                       ? Operand{down.format, plan.hidden, down.cols, gate_up.rows}
                       : reserve_operand(down.format, rows, down.cols, activated);
  return plan;
}

// silu(gate) * up of a piece of a row, as down wants it.
void CpuBackend::activate(const FeedForward& plan, int64_t piece) const {
  const int64_t row = piece / plan.pieces(), column = piece % plan.pieces() * kPieceColumns;
  const int64_t count = std::min(kPieceColumns, plan.width - column);
  float* gate = plan.hidden + row * 2 * plan.width + column;
  kernels_.silu_mul(gate, gate, gate + plan.width, count);
  write_operand(plan.activated, row, column, gate, count);
}

void CpuBackend::mlp(Rows residual, ConstRows x, const WeightRef& gate_up, const WeightRef& down) {
  check_mlp(residual, x, gate_up, down);
  if (x.rows == 0) return;
  const FeedForward plan =
      plan_feed_forward(prepare(x, gate_up, rounded_), x.rows, gate_up, down, hidden_, activated_);
  const Tiling up = tiling(x.rows, gate_up.rows), out = tiling(x.rows, down.rows);
  auto* sums = lanes_.reserve<float>(pool_.lanes() * out.tile_size());
  const bool alone = small(x.rows * (gate_up.rows * gate_up.cols + down.rows * down.cols));
  for_tiles(up.count(), x.rows, alone, [&](int64_t index, const Lane&) {
    const Tile tile = up.at(index);
    multiply(plan.hidden + tile.first * gate_up.rows + tile.column, gate_up.rows, plan.x, gate_up,
             tile);
  });
  for_tiles(x.rows * plan.pieces(), x.rows, alone,
            [&](int64_t piece, const Lane&) { activate(plan, piece); });
  for_tiles(out.count(), x.rows, alone, [&](int64_t index, const Lane& lane) {
    float* lane_sums = sums + lane.id() * out.tile_size();
    const Tile tile = out.at(index);
    multiply(lane_sums, tile.width, plan.activated, down, tile);
    for (int64_t r = 0; r < tile.rows; ++r)
      kernels_.add(residual.row(tile.first + r) + tile.column, lane_sums + r * tile.width,
                   tile.width);
  });
}

}  // namespace puna
