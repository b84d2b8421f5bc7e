// Matrix products and the dense feed-forward block.
#include <algorithm>

#include "backend/checks.h"
#include "backend/cpu/implementation.h"
#include "backend/cpu/pack.h"

namespace puna {
namespace {

int64_t panels_of(const WeightRef& weight) { return (weight.rows + kPanelRows - 1) / kPanelRows; }
int64_t even(int64_t n) { return n + n % 2; }

// Rows of one tile: its sums, 128 KiB of fp32, stay in L2 until they are added.
constexpr int64_t kTileRows = 512;
// Columns handled at once by elementwise steps, so that one row still occupies several lanes.
constexpr int64_t kActivationColumns = 1024;

}  // namespace

CpuBackend::Operand CpuBackend::prepare(ConstRows x, const WeightRef& weight, Scratch& scratch) {
  if (weight.format == WeightFormat::kF32) return {x.data, x.stride};
  const int64_t stride = even(x.cols);
  auto* rounded = scratch.reserve<uint16_t>(x.rows * stride);
  for_rows(x.rows, x.cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      kernels_.bf16_from_f32(rounded + r * stride, x.row(r), x.cols);
      if (stride > x.cols) rounded[r * stride + x.cols] = 0;
    }
  });
  return {rounded, stride};
}

void CpuBackend::multiply(float* out, int64_t out_stride, const Operand& x, const WeightRef& weight,
                          int64_t panel, int64_t first, int64_t rows, const float* bias) const {
  const int64_t width = std::min(kPanelRows, weight.rows - panel * kPanelRows);
  const auto* packed = static_cast<const char*>(weight.data.get()) +
                       static_cast<size_t>(panel) * panel_bytes(weight.format, weight.cols);
  if (bias != nullptr) bias += panel * kPanelRows;
  if (weight.format == WeightFormat::kF32)
    kernels_.gemm_f32(out, out_stride, static_cast<const float*>(x.data) + first * x.stride,
                      x.stride, reinterpret_cast<const float*>(packed), bias, rows, weight.cols,
                      width);
  else
    kernels_.gemm_bf16(out, out_stride, static_cast<const uint16_t*>(x.data) + first * x.stride,
                       x.stride, reinterpret_cast<const uint16_t*>(packed), bias, rows, weight.cols,
                       width);
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
  plan.bf16 = down.format == WeightFormat::kBF16;
  plan.activated =
      plan.bf16 ? Operand{activated.reserve<uint16_t>(rows * even(down.cols)), even(down.cols)}
                : Operand{plan.hidden, gate_up.rows};
  return plan;
}

// silu(gate) * up of `rows` rows, in the type that down wants.
void CpuBackend::activate(Lane& lane, TileCounter& counter, const FeedForward& plan,
                          int64_t rows) const {
  const int64_t pieces = (plan.width + kActivationColumns - 1) / kActivationColumns;
  for_tiles(lane, counter, rows * pieces, rows, [&](int64_t tile) {
    const int64_t row = tile / pieces, column = tile % pieces * kActivationColumns;
    const int64_t count = std::min(kActivationColumns, plan.width - column);
    float* gate = plan.hidden + row * 2 * plan.width + column;
    kernels_.silu_mul(gate, gate, gate + plan.width, count);
    if (!plan.bf16) return;
    auto* to = static_cast<uint16_t*>(const_cast<void*>(plan.activated.data)) +
               row * plan.activated.stride;
    kernels_.bf16_from_f32(to + column, gate, count);
    if (column + count == plan.width && plan.activated.stride > plan.width) to[plan.width] = 0;
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
