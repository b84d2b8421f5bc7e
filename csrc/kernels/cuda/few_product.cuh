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
  // The thread's elements (null: none), and what they are added to.
  float* out[Shape::kEach];
  float sums[Shape::kEach] = {}, before[Shape::kEach] = {};
#pragma unroll
  for (int i = 0; i < Shape::kEach; ++i) {
    const int element = i * Shape::kThreads + threadIdx.x, token = element / kRows;
    const int64_t column = row + element % kRows;
    out[i] = token < share.count && column < call.rows
                 ? share.out.data + (share.first + token) * share.out.stride + column
                 : nullptr;
  }

  // A warp's turns, one span each. Weights of the first kStages turns are asked for, then rows of x
  // for these, then a turn's products are followed by the copies of a later one: one loop, since
  // its instructions have to be read as well.
  const int turns = (spans + kWarps - 1) / kWarps;
  const int chunk = Shape::chunk(tokens, spans);
  float* const parts = reinterpret_cast<float*>(shared_memory() + Shape::ring_bytes(tokens));
  float* const scales = parts + chunk * tokens * kRows;
  int slot = 0, begin = 0;  // of the ring; the first span of the chunk
#pragma unroll 1
  for (int step = -2 * kStages; step < turns; ++step) {
    unsigned char* const stage = ring + slot * stage_bytes;
    slot = slot + 1 == kStages ? 0 : slot + 1;
    if (step == -kStages) {
      if (known) after_earlier_kernels();
#pragma unroll
      for (int i = 0; i < Shape::kEach; ++i)
        if (out[i] != nullptr && share.accumulate) before[i] = *out[i];
    }
    const int span = step * kWarps + warp;
    if (step >= 0) {
      wait_for_copies<kStages - 1>();
      __syncwarp();  // what the other lanes have copied
      if (span < spans) {
        typename Weights::Part part = {};
        weights.multiply(stage, span, part);
        weights.store(parts + (span - begin) * tokens * kRows, part);
        if constexpr (Weights::kScaled)
          if (lane < share.count) scales[(span - begin) * tokens + lane] = weights.scale(stage);
      }
      __syncwarp();  // the stage has been read
    }
    // The turns whose weights, and whose rows of x, are copied.
    const int next = span + kStages * kWarps;
    const int next_weights = step < -kStages ? next + kStages * kWarps : next;
    if (next_weights < spans && (step < -kStages || step >= 0))
      weights.copy_weights(stage, next_weights);
    if (step >= -kStages) {
      if (next < spans) weights.copy_activations(stage, next);
      commit_copies();
    }

    const int end = (step + 1) * kWarps;
    if (step < 0 || (end < begin + chunk && step + 1 < turns)) continue;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Shape::kEach; ++i) {
      if (out[i] == nullptr) continue;
      const int element = i * Shape::kThreads + threadIdx.x, token = element / kRows;
      const int count = (end < spans ? end : spans) - begin;
#pragma unroll 4
      for (int at = 0; at < count; ++at) {
        const float part = parts[at * tokens * kRows + element];
        sums[i] =
            Weights::kScaled ? fmaf(part, scales[at * tokens + token], sums[i]) : sums[i] + part;
      }
    }
    begin += chunk;
    if (step + 1 < turns) __syncthreads();  // before the parts are others
  }
  wait_for_copies<0>();
#pragma unroll
  for (int i = 0; i < Shape::kEach; ++i)
    if (out[i] != nullptr) {
      const int64_t column = row + (i * Shape::kThreads + threadIdx.x) % kRows;
      const float bias = call.bias != nullptr ? call.bias[column] : 0.0f;
      *out[i] = finished(call, sums[i], bias, before[i], share.accumulate);
    }
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
