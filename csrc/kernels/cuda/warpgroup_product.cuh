// The largest products on devices with products of warpgroups (ptx.h), which do what 8 warps' own
// products would at 1.6 times the rate: a block computes two panels of weights, one for each of two
// warpgroups, for 128 rows of x, through the same ring of stages as other tiles.
//
// Weights are the left operand as everywhere (product.cuh), so they go from a stage to the
// registers, where they are unpacked, and need no place in shared memory as what they become; rows
// of x lie in the stage as the right operand wants them. A warp has 16 rows of its warpgroup's
// panel: with w = warp % 4, rows 4 g + 2 j + i / 2 of half h, where h = w / 2 and j = w % 2. It has
// all 128 tokens, in two parts: while the products of one are carried out, the other's sums are
// scaled.
#pragma once

#include "kernels/cuda/tiled_product.cuh"

namespace puna::cuda {

struct WarpgroupShape {
  static constexpr int kPanels = 2, kThreads = kPanels * kWarpgroup;
  static constexpr int kParts = 2, kTokens = kParts * kWarpgroupColumns;
  static constexpr int kAlignment = kSharedAlignment;
};
// Of a block: 227 KB are what there is.
constexpr int kMostWarpgroupShared = 227 << 10;

using WarpgroupSums = float[WarpgroupShape::kParts][kWarpgroupSums];

// Where a thread is in its warpgroup's products.
struct WarpgroupPlace {
  int panel, row;  // the first of its two rows, of the panel
  int g, t;

  __device__ WarpgroupPlace() {
    const int warp = threadIdx.x % kWarpgroup / kWarp;
    g = threadIdx.x % kWarp / 4;
    t = threadIdx.x % 4;
    panel = threadIdx.x / kWarpgroup;
    row = warp / 2 * kHalf + 4 * g + warp % 2 * 2;
  }
};

// Tile is a thread's work on the stages, as for tiled_product_kernel:
//   add(stage, column)    adds its products to `sums`; by all threads of a warpgroup
template <class Tile>
__global__ void __launch_bounds__(WarpgroupShape::kThreads, 1)
    warpgroup_product_kernel(const ProductCall call) {
#if PUNA_WARPGROUPS
  using Shape = WarpgroupShape;
  constexpr int kStages = kStagesOf<Tile, kMostWarpgroupShared>;
  after_earlier_kernels();
  Share share;
  if (!find_share<Shape::kTokens>(call, static_cast<int>(blockIdx.x), &share)) return;

  const int64_t first_panel = static_cast<int64_t>(blockIdx.y) * Shape::kPanels;
  const WarpgroupPlace place;
  const int64_t first_row = (first_panel + place.panel) * kPanel;
  Tile tile(call, share, first_panel);
  const int steps = (tile.limit + Tile::kStageColumns - 1) / Tile::kStageColumns;
  const auto stage = [](int step) { return shared_memory() + step % kStages * Tile::kStageBytes; };
  for_each_stage<kStages>(
      steps,
      [&](int step) {
        if (step < steps) tile.copy(stage(step), step * Tile::kStageColumns);
        commit_copies();
      },
      [] { fence_shared_operands(); },
      [&](int step) {
        // Also of a panel that is not there: products must not depend on a thread's index.
        tile.add(place, stage(step), step * Tile::kStageColumns);
      });

#pragma unroll
  for (int part = 0; part < Shape::kParts; ++part)
#pragma unroll
    for (int i = 0; i < kWarpgroupSums; ++i) {
      const int at = part * kWarpgroupColumns + i / 4 * 8 + 2 * place.t + i % 2;
      const int64_t row = first_row + place.row + i % 4 / 2;
      if (at >= share.count || row >= call.rows) continue;
      float* out = share.out.data + (share.first + at) * share.out.stride + row;
      *out = finished(call, tile.sums[part][i], call.bias != nullptr ? call.bias[row] : 0.0f,
                      share.accumulate ? *out : 0.0f, share.accumulate);
    }
#endif
}

template <class Tile>
int launch_warpgroup_product(const ProductCall& call, Stream stream) {
  return launch_tiles<Tile, kMostWarpgroupShared>(warpgroup_product_kernel<Tile>, call, stream);
}

}  // namespace puna::cuda
