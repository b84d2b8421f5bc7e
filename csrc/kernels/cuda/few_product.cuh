// Products of a few rows, which take as long as the weights take to arrive: a block computes one
// half of a panel (or less of it) for up to kTileTokens rows of x.
//
// Warps take spans in turn and leave each one's sums in shared memory; when all are there, or as
// many as it has room for, threads add them up in the order of the spans. A warp's spans come
// through a ring of stages of its own in shared memory, so that much is always on its way, and
// the weights of the first ones are asked for before earlier kernels have ended.
#pragma once

#include "kernels/cuda/product.cuh"

namespace puna::cuda {

// Of a kind of weights, whose Lane is a lane's share of the work on a warp's stages:
//   kRows, kWarps             of a block
//   kResident                 blocks of a multiprocessor, at least
//   kStages                   of a warp
//   kScaled                   sums are multiplied by the activations' scales
//   stage_bytes(tokens)       with so many rows of x
//   Lane(call, share, row)    rows of weights from `row` on
//   copy_weights, copy_activations (stage, span)
//   multiply(stage, span, part)   part += the products of a span
//   store(to, part)           as [token][kRows]
//   scale(stage)              that of row `lane` of x
template <class Weights>
struct FewShape {
  static constexpr int kThreads = Weights::kWarps * kWarp;
  // Elements of a thread.
  static constexpr int kEach = (kTileTokens * Weights::kRows + kThreads - 1) / kThreads;

  static __host__ __device__ int spans(const ProductCall& call) {
    return static_cast<int>((call.cols + kSpan - 1) / kSpan);
  }
  static __host__ __device__ int most_tokens(const ProductCall& call) {
    const int64_t most = call.count > call.shared.count ? call.count : call.shared.count;
    return static_cast<int>(most < kTileTokens ? most : kTileTokens);
  }
  static __host__ __device__ int ring_bytes(int tokens) {
    return Weights::kWarps * Weights::kStages * Weights::stage_bytes(tokens);
  }
  // A span's sums, and its scales.
  static __host__ __device__ int part_floats(int tokens) {
    return tokens * (Weights::kRows + (Weights::kScaled ? 1 : 0));
  }
  // Spans whose sums are in shared memory at a time: some of each warp.
  static __host__ __device__ int chunk(int tokens, int spans) {
    const int turns =
        (kMostShared - ring_bytes(tokens)) / (part_floats(tokens) * 4) / Weights::kWarps;
    const int needed = (spans + Weights::kWarps - 1) / Weights::kWarps;
    return (turns < needed ? turns : needed) * Weights::kWarps;
  }
  static size_t shared_bytes(const ProductCall& call) {
    const int tokens = most_tokens(call);
    return ring_bytes(tokens) + chunk(tokens, spans(call)) * part_floats(tokens) * sizeof(float);
  }
};

// Leaves the sums of a half's tiles as [token][kHalf].
__device__ __forceinline__ void store_half(float* to, const float (&part)[kTilesEach][4], int g,
                                           int t, int tokens) {
#pragma unroll
  for (int column = 0; column < 2; ++column)
    if (2 * t + column < tokens)
#pragma unroll
      for (int j = 0; j < kTilesEach; ++j)
#pragma unroll
        for (int row = 0; row < 2; ++row)
          to[(2 * t + column) * kHalf + 4 * g + 2 * j + row] = part[j][2 * row + column];
}

template <class Weights>
__global__ void __launch_bounds__(FewShape<Weights>::kThreads, Weights::kResident)
    few_product_kernel(const ProductCall call) {
  using Shape = FewShape<Weights>;
  constexpr int kWarps = Weights::kWarps, kStages = Weights::kStages, kRows = Weights::kRows;
  const int tile = static_cast<int>(blockIdx.x);
  const bool known = matrix_is_known<kTileTokens>(call, tile);
  if (!known) after_earlier_kernels();
  Share share;
  if (!find_share<kTileTokens>(call, tile, &share)) return;

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.y) * kRows;
  const int spans = Shape::spans(call), tokens = Shape::most_tokens(call);
  const int stage_bytes = Weights::stage_bytes(tokens);
  unsigned char* const ring = shared_memory() + warp * kStages * stage_bytes;
  const typename Weights::Lane weights(call, share, row, tokens);
#pragma unroll
  for (int i = 0; i < kStages; ++i)
    if (warp + i * kWarps < spans) weights.copy_weights(ring + i * stage_bytes, warp + i * kWarps);
  if (known) after_earlier_kernels();
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    if (warp + i * kWarps < spans)
      weights.copy_activations(ring + i * stage_bytes, warp + i * kWarps);
    commit_copies();
  }

  // The thread's elements, and what they are added to.
  float sums[Shape::kEach] = {}, before[Shape::kEach] = {}, bias[Shape::kEach] = {};
  const auto token_of = [&](int i) { return (i * Shape::kThreads + threadIdx.x) / kRows; };
  const auto row_of = [&](int i) { return (i * Shape::kThreads + threadIdx.x) % kRows; };
  const auto is_mine = [&](int i) {
    return static_cast<int>(token_of(i)) < share.count && row + row_of(i) < call.rows;
  };
  const auto out = [&](int i) {
    return share.out.data + (share.first + token_of(i)) * share.out.stride + row + row_of(i);
  };
#pragma unroll
  for (int i = 0; i < Shape::kEach; ++i) {
    if (is_mine(i) && share.accumulate) before[i] = *out(i);
    if (is_mine(i) && call.bias != nullptr) bias[i] = call.bias[row + row_of(i)];
  }

  const int chunk = Shape::chunk(tokens, spans);
  float* const parts = reinterpret_cast<float*>(shared_memory() + Shape::ring_bytes(tokens));
  float* const scales = parts + chunk * tokens * kRows;
  unsigned char* stage = ring;
  for (int begin = 0; begin < spans; begin += chunk) {
    const int end = begin + chunk < spans ? begin + chunk : spans;
    for (int span = begin + warp; span < end; span += kWarps) {
      wait_for_copies<kStages - 1>();
      __syncwarp();  // what the other lanes have copied
      typename Weights::Part part = {};
      weights.multiply(stage, span, part);
      weights.store(parts + (span - begin) * tokens * kRows, part);
      if constexpr (Weights::kScaled)
        if (lane < share.count) scales[(span - begin) * tokens + lane] = weights.scale(stage);
      __syncwarp();  // the stage has been read
      const int next = span + kStages * kWarps;
      if (next < spans) {
        weights.copy_weights(stage, next);
        weights.copy_activations(stage, next);
      }
      commit_copies();
      stage = stage == ring + (kStages - 1) * stage_bytes ? ring : stage + stage_bytes;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Shape::kEach; ++i) {
      if (!is_mine(i)) continue;
#pragma unroll 8
      for (int span = 0; span < end - begin; ++span) {
        const int at = span * tokens + token_of(i);
        const float part = parts[at * kRows + row_of(i)];
        sums[i] = Weights::kScaled ? fmaf(part, scales[at], sums[i]) : sums[i] + part;
      }
    }
    if (end < spans) __syncthreads();  // before the parts are others
  }
  wait_for_copies<0>();
#pragma unroll
  for (int i = 0; i < Shape::kEach; ++i)
    if (is_mine(i)) *out(i) = finished(call, sums[i], bias[i], before[i], share.accumulate);
}

template <class Weights>
int launch_few_product(const ProductCall& call, Stream stream) {
  using Shape = FewShape<Weights>;
  const dim3 grid{most_tiles<kTileTokens>(call),
                  static_cast<unsigned>((call.rows + Weights::kRows - 1) / Weights::kRows), 1};
  return launch(few_product_kernel<Weights>, grid, Shape::kThreads, Shape::shared_bytes(call),
                stream, call);
}

}  // namespace puna::cuda
