// How panels of bfloat16 lie in shared memory, for tiles of many rows.
#pragma once

#include "kernels/cuda/tiled_product.cuh"

namespace puna::cuda {

// A panel is words [pair of columns][kPanel]. The products of a span are added up in the tensor
// cores, 16 columns at a time.
constexpr int kPairBytes = 4 * kPanel, kStepColumns = 16;

// Copies kPairs pairs, from `column` on, of each of the panels that are `there`; beyond `limit`
// columns there are zeros. Chunk c of 16 bytes of pair p lies at c ^ 2 * (p % 4): lanes of one t
// load from pairs that are 256 bytes apart.
template <int kPanels, int kPairs, int kThreads>
__device__ __forceinline__ void copy_pairs(unsigned char* stage, const uint8_t* panels,
                                           int64_t panel_bytes, int there, int column, int limit) {
  constexpr int kPairChunks = kPairBytes / kChunk;
  constexpr int kTurn = kThreads / kPairChunks;  // pairs that are copied together
  const int pair = threadIdx.x / kPairChunks, chunk = threadIdx.x % kPairChunks;
  unsigned char* to = stage + pair * kPairBytes + (chunk ^ 2 * (pair % 4)) * kChunk;
  const uint8_t* from =
      panels + static_cast<int64_t>(column / 2 + pair) * kPairBytes + chunk * kChunk;
  const int left = limit - column - 2 * pair;  // columns
  static_assert(kTurn % 4 == 0);
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel)
    if (panel < there)
#pragma unroll
      for (int first = 0; first < kPairs; first += kTurn)
        copy_async(to + (panel * kPairs + first) * kPairBytes,
                   from + panel * panel_bytes + first * kPairBytes, 2 * first < left);
}

}  // namespace puna::cuda
