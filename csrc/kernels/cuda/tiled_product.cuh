// Products of many rows, which take as long as the tensor cores take: a block computes two panels
// of weights for a tile of rows of x. Both come through a ring of stages in shared memory, which
// are on their way while earlier ones are multiplied.
//
// A stage has kRowBytes of each row of x: a span of codes, or half of one of bfloat16.
#pragma once

#include "kernels/cuda/product.cuh"

namespace puna::cuda {

// Of a warp: halves of panels, and tiles of kTileTokens rows of x.
template <int kHalvesOfWarp, int kTilesOfWarp>
struct TileShape {
  static constexpr int kHalves = kHalvesOfWarp, kTokenTiles = kTilesOfWarp;
  static constexpr int kPanels = 2, kWarps = 8, kThreads = kWarps * kWarp;
  static constexpr int kAlignment = 16;  // of rows of x in shared memory
  static constexpr int kRowWarps = kPanels * (kPanel / kHalf) / kHalves;
  static constexpr int kTokens = kWarps / kRowWarps * kTokenTiles * kTileTokens;  // of a block
};
using SmallTile = TileShape<1, 2>;  // 32 tokens
using LargeTile = TileShape<2, 4>;  // 128 tokens

constexpr int rounded_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

constexpr int kStageSteps = 4;  // products of the tensor cores in a stage, of 32 bytes of a row
template <class Tile, int kShared = kMostShared>
constexpr int kStagesOf = kShared / Tile::kStageBytes < 4 ? kShared / Tile::kStageBytes : 4;

// copy(i) asks for stage i of `steps`, and commits; add(i) uses it, when all threads have called
// landed() after what they had asked for had landed. In the ring, kStages - 1 are on their way.
template <int kStages, class Copy, class Landed, class Add>
__device__ __forceinline__ void for_each_stage(int steps, const Copy& copy, const Landed& landed,
                                               const Add& add) {
  static_assert(kStages >= 2);
  for (int step = 0; step < kStages - 1; ++step) copy(step);
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    landed();
    __syncthreads();
    copy(step + kStages - 1);  // in the place of what all warps have used
    add(step);
  }
  wait_for_copies<0>();
}

// Tile is a thread's work on the stages:
//   kStageBytes, kStageColumns
//   copy(stage, column)   asks for a stage, from a column on
//   add(stage, column)    adds its products to `sums`, for the halves and tokens of its warp
template <class Tile>
__global__ void __launch_bounds__(Tile::Shape::kThreads, 1)
    tiled_product_kernel(const ProductCall call) {
  using Shape = typename Tile::Shape;
  constexpr int kStages = kStagesOf<Tile>;
  after_earlier_kernels();
  Share share;
  if (!find_share<Shape::kTokens>(call, static_cast<int>(blockIdx.x), &share)) return;

  const int warp = threadIdx.x / kWarp;
  const int64_t first_panel = static_cast<int64_t>(blockIdx.y) * Shape::kPanels;
  // What the warp has: halves from `half` on, tokens from `token` on.
  const int half = warp % Shape::kRowWarps * Shape::kHalves;
  const int token = warp / Shape::kRowWarps * Shape::kTokenTiles * kTileTokens;
  const bool busy = token < share.count && first_panel * kPanel + half * kHalf < call.rows;
  Tile tile(call, share, first_panel, half, token);
  const int steps = (tile.limit + Tile::kStageColumns - 1) / Tile::kStageColumns;
  const auto stage = [](int step) { return shared_memory() + step % kStages * Tile::kStageBytes; };
  const auto copy = [&](int step) {
    if (step < steps) tile.copy(stage(step), step * Tile::kStageColumns);
    commit_copies();
  };
  for_each_stage<kStages>(
      steps, copy, [] {},
      [&](int step) {
        if (busy) tile.add(stage(step), step * Tile::kStageColumns);
      });

  if (!busy) return;
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < Shape::kTokenTiles; ++n)
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const int at = token + n * kTileTokens + 2 * t + column;
      if (at >= share.count) continue;
      float* out = share.out.data + (share.first + at) * share.out.stride;
#pragma unroll
      for (int h = 0; h < Shape::kHalves; ++h)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t row = first_panel * kPanel + (half + h) * kHalf + 4 * g + i;
          if (row >= call.rows) continue;
          out[row] = finished(call, tile.sums[h][i / 2][n][i % 2 * 2 + column],
                              call.bias != nullptr ? call.bias[row] : 0.0f,
                              share.accumulate ? out[row] : 0.0f, share.accumulate);
        }
    }
}

// A block for each tile of some panels by some tokens, with a ring of as many stages as fit.
template <class Tile, int kShared = kMostShared>
int launch_tiles(void (*kernel)(ProductCall), const ProductCall& call, Stream stream) {
  using Shape = typename Tile::Shape;
  constexpr int kStages = kStagesOf<Tile, kShared>;
  constexpr int64_t kRows = Shape::kPanels * kPanel;
  const dim3 grid{most_tiles<Shape::kTokens>(call),
                  static_cast<unsigned>((call.rows + kRows - 1) / kRows), 1};
  return launch(kernel, grid, Shape::kThreads, kStages * Tile::kStageBytes, stream, call);
}

template <class Tile>
int launch_tiled_product(const ProductCall& call, Stream stream) {
  return launch_tiles<Tile>(tiled_product_kernel<Tile>, call, stream);
}

}  // namespace puna::cuda
