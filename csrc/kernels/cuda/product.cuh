// The matrix product, for any number of rows. A block computes one panel of weights (64 output
// columns) for some rows of x.
//
// The summed dimension is cut into spans of kActivationGroup columns. Warps take spans in turn and
// leave each one's sums in shared memory; threads then add these up in the order of the spans. So
// an element's bits depend neither on the number of rows nor on that of warps, and with quantised
// weights they are those of the CPU's kernels (kernel_table.h: gemm_quantized).
//
// Weights are the left operand of the tensor cores, so that few rows of x waste nothing. A lane
// loads 16 bytes, which are rows 4 g .. 4 g + 3 of 32 (g = lane / 4): a panel's order of bytes is
// that of the operand's registers but for the order of rows, which the way out puts right.
#pragma once

#include "kernels/cuda/launches.h"
#include "kernels/kernel_table.h"
#include "quant/traits.h"

namespace puna::cuda {

constexpr int kSpan = static_cast<int>(kActivationGroup);
constexpr int kPanel = static_cast<int>(kPanelRows);
constexpr int kHalves = 2;      // of a panel: 32 rows, a 16-byte load of each lane
constexpr int kTilesEach = 2;   // tiles of 16 rows in a half
constexpr int kTileTokens = 8;  // columns of a tile

// Rows [first, first + count) of x, at most kTileTokens * kTokenTiles.
struct Tokens {
  int64_t first;
  int count;
};

// The sums of a warp's span: tile j of half h holds panel rows 32 h + 4 g + 2 j (sums 0 and 1) and
// + 1 (2 and 3), tokens 2 t and 2 t + 1 of each group of 8.
template <int kTokenTiles>
struct Sums {
  float value[kHalves][kTilesEach][kTokenTiles][4];
};

// Leaves them as [token][kPanel].
template <int kTokenTiles>
__device__ __forceinline__ void store_sums(float* part, const Sums<kTokenTiles>& sums) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int h = 0; h < kHalves; ++h)
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n)
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        float* to = part + (n * kTileTokens + 2 * t + column) * kPanel + 32 * h + 4 * g;
#pragma unroll
        for (int j = 0; j < kTilesEach; ++j)
#pragma unroll
          for (int row = 0; row < 2; ++row) to[2 * j + row] = sums.value[h][j][n][2 * row + column];
      }
}

__device__ __forceinline__ float gelu(float x) {
  return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
}

template <int kTokenTiles>
constexpr int kProductWarps = 8 / kTokenTiles;
// Two rounds of sums: while one is added up, warps write the next.
template <int kTokenTiles>
constexpr size_t kProductShared =
    2 * kProductWarps<kTokenTiles> * kTokenTiles * kTileTokens * kPanel * sizeof(float);

// Weights::span(part, panel, call, span, tokens) is a warp's work; Weights::kScaled: sums are
// multiplied by the activations' scales.
template <class Weights, int kTokenTiles>
__global__ void __launch_bounds__(kProductWarps<kTokenTiles>* kWarp, 1)
    product_kernel(const ProductCall call) {
  after_earlier_kernels();
  constexpr int kWarps = kProductWarps<kTokenTiles>, kTokens = kTokenTiles * kTileTokens;
  constexpr int kThreads = kWarps * kWarp, kEach = kTokens * kPanel / kThreads;
  int64_t begin = 0, end = call.count;
  const void* weights = call.weights;
  if (call.experts.offsets != nullptr) {
    const int32_t expert = call.experts.occupied[blockIdx.z];
    if (expert < 0) return;
    begin = call.experts.offsets[expert];
    end = call.experts.offsets[expert + 1];
    weights = call.experts.matrices[expert];
  }
  Tokens tokens;
  tokens.first = begin + static_cast<int64_t>(blockIdx.y) * kTokens;
  if (tokens.first >= end) return;
  tokens.count = static_cast<int>(end - tokens.first < kTokens ? end - tokens.first : kTokens);

  const auto* panel = static_cast<const uint8_t*>(weights) + blockIdx.x * call.panel_bytes;
  float* parts = reinterpret_cast<float*>(shared_memory());
  const int warp = threadIdx.x / kWarp;
  const int spans = static_cast<int>((call.cols + kSpan - 1) / kSpan);
  float sums[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) sums[i] = 0;
  for (int first = 0, round = 0; first < spans; first += kWarps, round ^= 1) {
    float* const these = parts + round * kWarps * kTokens * kPanel;
    if (first + warp < spans)
      Weights::template span<kTokenTiles>(these + warp * kTokens * kPanel, panel, call,
                                          first + warp, tokens);
    __syncthreads();
    const int count = spans - first < kWarps ? spans - first : kWarps;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = i * kThreads + threadIdx.x, token = at / kPanel;
      if (token >= tokens.count) continue;
      for (int w = 0; w < count; ++w) {
        const float part = these[w * kTokens * kPanel + at];
        if constexpr (Weights::kScaled)
          sums[i] =
              fmaf(part, call.x.scales[(tokens.first + token) * call.x.spans + first + w], sums[i]);
        else
          sums[i] += part;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = i * kThreads + threadIdx.x, token = at / kPanel;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * kPanel + at % kPanel;
    if (token >= tokens.count || column >= call.rows) continue;
    float* out = call.out.data + (tokens.first + token) * call.out.stride + column;
    float value = sums[i];
    if (call.bias != nullptr) value += call.bias[column];
    if (call.gelu) value = gelu(value);
    *out = call.accumulate ? *out + value : value;
  }
}

// Rows of x from which a block takes more of them: one reading of the weights serves them all.
constexpr int64_t kFewTokens = kTileTokens;
constexpr int kManyTokenTiles = 2;

template <class Weights, int kTokenTiles>
int launch_product_of(const ProductCall& call, Stream stream) {
  constexpr int64_t kTokens = kTokenTiles * kTileTokens;
  const bool experts = call.experts.offsets != nullptr;
  // Any expert may have all the rows.
  const dim3 grid{static_cast<unsigned>((call.rows + kPanel - 1) / kPanel),
                  static_cast<unsigned>((call.count + kTokens - 1) / kTokens),
                  static_cast<unsigned>(experts ? call.experts.slots : 1)};
  return launch(product_kernel<Weights, kTokenTiles>, grid, kProductWarps<kTokenTiles> * kWarp,
                kProductShared<kTokenTiles>, stream, call);
}
template <class Weights>
int launch_product_of(const ProductCall& call, Stream stream) {
  return call.count <= kFewTokens ? launch_product_of<Weights, 1>(call, stream)
                                  : launch_product_of<Weights, kManyTokenTiles>(call, stream);
}

}  // namespace puna::cuda
