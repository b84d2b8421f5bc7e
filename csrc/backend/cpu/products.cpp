// Matrix products and the dense feed-forward block.
#include <algorithm>

#include "backend/checks.h"
#include "backend/cpu/implementation.h"
#include "backend/cpu/pack.h"

namespace puna {
namespace {

int64_t panels_of(const WeightRef& weight) { return (weight.rows + kPanelRows - 1) / kPanelRows; }
// Rows of one tile: its sums, 128 KiB of fp32, stay in L2 until they are added.
constexpr int64_t kTileRows = 512;

}  // namespace

CpuBackend::Operand CpuBackend::reserve_operand(WeightFormat format, int64_t rows, int64_t cols,
                                                Scratch& scratch) {
  Operand operand{format, nullptr, cols, padded_cols(format, cols)};
  if (format == WeightFormat::kF32) {
    operand.data = scratch.reserve<float>(rows * operand.stride);
  } else if (format == WeightFormat::kBF16) {
    operand.data = scratch.reserve<uint16_t>(rows * operand.stride);
  } else {
    operand.groups = operand.stride / group_of(format);
    const int64_t tables = rows * operand.groups;
    auto* scales = scratch.reserve<float>(2 * tables + (rows * operand.stride + 3) / 4);
    operand.scales = scales;
    operand.sums = reinterpret_cast<int32_t*>(scales + tables);
    operand.data = scales + 2 * tables;
  }
  return operand;
}

void CpuBackend::write_operand(const Operand& operand, int64_t row, int64_t column,
                               const float* values, int64_t count) const {
  const int64_t place = row * operand.stride + column;
  // The last piece fills what the format's blocks need past the last column.
  const int64_t padded = column + count == operand.cols ? operand.stride - column : count;
  if (operand.format == WeightFormat::kF32) {
    float* to = static_cast<float*>(operand.data) + place;
    if (to != values) std::copy_n(values, count, to);
  } else if (operand.format == WeightFormat::kBF16) {
    uint16_t* to = static_cast<uint16_t*>(operand.data) + place;
    kernels_.bf16_from_f32(to, values, count);
    std::fill(to + count, to + padded, uint16_t{0});
  } else {
    const int64_t group = group_of(operand.format);
    const int64_t table = row * operand.groups + column / group;
    kernels_.quantize_row(static_cast<int8_t*>(operand.data) + place, operand.scales + table,
                          operand.sums + table, values, count, padded, group);
  }
}

CpuBackend::Operand CpuBackend::prepare(ConstRows x, const WeightRef& weight, Scratch& scratch) {
  if (weight.format == WeightFormat::kF32)
    return {weight.format, const_cast<float*>(x.data), x.cols, x.stride};
  const Operand operand = reserve_operand(weight.format, x.rows, x.cols, scratch);
  for_rows(x.rows, x.cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) write_operand(operand, r, 0, x.row(r), x.cols);
  });
  return operand;
}

void CpuBackend::multiply(float* out, int64_t out_stride, const Operand& x, const WeightRef& weight,
                          int64_t panel, int64_t first, int64_t rows, const float* bias) const {
  const int64_t width = std::min(kPanelRows, weight.rows - panel * kPanelRows);
  const auto* packed = static_cast<const char*>(weight.data.get()) +
                       static_cast<size_t>(panel) * panel_bytes(weight.format, weight.cols);
  if (bias != nullptr) bias += panel * kPanelRows;
  const int64_t place = first * x.stride;
  if (weight.format == WeightFormat::kF32)
    kernels_.gemm_f32(out, out_stride, static_cast<const float*>(x.data) + place, x.stride,
                      reinterpret_cast<const float*>(packed), bias, rows, weight.cols, width);
  else if (weight.format == WeightFormat::kBF16)
    kernels_.gemm_bf16(out, out_stride, static_cast<const uint16_t*>(x.data) + place, x.stride,
                       reinterpret_cast<const uint16_t*>(packed), bias, rows, weight.cols, width);
  else
    kernels_.gemm_quantized[quantized_index(weight.format)](
        out, out_stride,
        {static_cast<const int8_t*>(x.data) + place, x.scales + first * x.groups,
         x.sums + first * x.groups, x.stride, x.groups},
        packed, bias, rows, width);
}

// Whole panels by many rows, unless there are too few panels to occupy the lanes.
int64_t CpuBackend::rows_per_tile(int64_t rows, int64_t panels) const {
  constexpr int64_t kTilesPerLane = 4, kLeastRows = 16;
  const int64_t blocks = (kTilesPerLane * pool_.lanes() + panels - 1) / panels;
  return std::clamp((rows + blocks - 1) / blocks, kLeastRows, kTileRows);
}

void CpuBackend::matmul(Rows out, ConstRows x, const WeightRef& weight,
                        const MatmulOptions& options) {
  check_matmul(out, x, weight, options);
  if (x.rows == 0) return;
  const Operand operand = prepare(x, weight, rounded_);
  const int64_t panels = panels_of(weight), tile_rows = rows_per_tile(x.rows, panels);
  const int64_t blocks = (x.rows + tile_rows - 1) / tile_rows;
  const float* bias = options.bias != nullptr ? options.bias->get() : nullptr;
  auto* sums = lanes_.reserve<float>(pool_.lanes() * std::min(x.rows, tile_rows) * kPanelRows);
  TileCounter counter;
  pool_.run([&](Lane& lane) {
    float* lane_sums = sums + lane.id() * std::min(x.rows, tile_rows) * kPanelRows;
    // A panel's blocks of rows are neighbours, so that it is read from memory once.
    for_tiles(lane, counter, panels * blocks, x.rows, [&](int64_t tile) {
      const int64_t panel = tile / blocks, column = panel * kPanelRows;
      const int64_t first = tile % blocks * tile_rows, rows = std::min(tile_rows, x.rows - first);
      const int64_t width = std::min(kPanelRows, weight.rows - column);
      float* target = options.accumulate ? lane_sums : out.row(first) + column;
      const int64_t stride = options.accumulate ? kPanelRows : out.stride;
      multiply(target, stride, operand, weight, panel, first, rows, bias);
      for (int64_t r = 0; r < rows; ++r) {
        if (options.gelu) kernels_.gelu(target + r * stride, target + r * stride, width);
        if (options.accumulate)
          kernels_.add(out.row(first + r) + column, target + r * stride, width);
      }
    });
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
  plan.activated = down.format == WeightFormat::kF32
                       ? Operand{down.format, plan.hidden, down.cols, gate_up.rows}
                       : reserve_operand(down.format, rows, down.cols, activated);
  return plan;
}

// silu(gate) * up of `rows` rows, as down wants it.
void CpuBackend::activate(Lane& lane, TileCounter& counter, const FeedForward& plan,
                          int64_t rows) const {
  const int64_t pieces = (plan.width + kPieceColumns - 1) / kPieceColumns;
  for_tiles(lane, counter, rows * pieces, rows, [&](int64_t tile) {
    const int64_t row = tile / pieces, column = tile % pieces * kPieceColumns;
    const int64_t count = std::min(kPieceColumns, plan.width - column);
    float* gate = plan.hidden + row * 2 * plan.width + column;
    kernels_.silu_mul(gate, gate, gate + plan.width, count);
    write_operand(plan.activated, row, column, gate, count);
  });
}

void CpuBackend::mlp(Rows residual, ConstRows x, const WeightRef& gate_up, const WeightRef& down) {
  check_mlp(residual, x, gate_up, down);
  if (x.rows == 0) return;
  const FeedForward plan =
      plan_feed_forward(prepare(x, gate_up, rounded_), x.rows, gate_up, down, hidden_, activated_);
  const int64_t up_panels = panels_of(gate_up), down_panels = panels_of(down);
  const int64_t up_rows = rows_per_tile(x.rows, up_panels);
  const int64_t down_rows = rows_per_tile(x.rows, down_panels);
  const int64_t up_blocks = (x.rows + up_rows - 1) / up_rows;
  const int64_t down_blocks = (x.rows + down_rows - 1) / down_rows;
  auto* sums = lanes_.reserve<float>(pool_.lanes() * std::min(x.rows, down_rows) * kPanelRows);
  TileCounter up_counter, activation_counter, down_counter;
  pool_.run([&](Lane& lane) {
    for_tiles(lane, up_counter, up_panels * up_blocks, x.rows, [&](int64_t tile) {
      const int64_t panel = tile / up_blocks, first = tile % up_blocks * up_rows;
      multiply(plan.hidden + first * gate_up.rows + panel * kPanelRows, gate_up.rows, plan.x,
               gate_up, panel, first, std::min(up_rows, x.rows - first));
    });
    lane.barrier();
    activate(lane, activation_counter, plan, x.rows);
    lane.barrier();
    float* lane_sums = sums + lane.id() * std::min(x.rows, down_rows) * kPanelRows;
    for_tiles(lane, down_counter, down_panels * down_blocks, x.rows, [&](int64_t tile) {
      const int64_t panel = tile / down_blocks, first = tile % down_blocks * down_rows;
      const int64_t rows = std::min(down_rows, x.rows - first), column = panel * kPanelRows;
      multiply(lane_sums, kPanelRows, plan.activated, down, panel, first, rows);
      for (int64_t r = 0; r < rows; ++r)
        kernels_.add(residual.row(first + r) + column, lane_sums + r * kPanelRows,
                     std::min(kPanelRows, down.rows - column));
    });
  });
}

}  // namespace puna
