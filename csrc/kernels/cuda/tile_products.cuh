// Attention on the tensor cores, in bfloat16 with fp32 sums, a tile of 64 tokens at a time. Queries
// are rows of the left operand, 16 to a warp; tokens are the columns of the scores, and are summed
// over for the values.
#pragma once

#include "kernels/cuda/ptx.h"

namespace puna::cuda {

// --- tiles in shared memory: keys and values are bfloat16 in chunks of 8 (16 bytes), which lie in
// columns, so that the 8 chunks of a matrix, and what neighbouring threads store, fall into
// different banks

constexpr int kTileTokens = 64;
constexpr int kTileThreads = 256;  // of the blocks that work on tiles
constexpr int kTileWarps = kTileThreads / kWarp;

// A matrix of kRows rows whose rows go over the columns of the products (tokens for keys, channels
// for values), or, `kDeep`, over what is summed.
template <int kRows, bool kDeep>
struct Chunks {
  static constexpr int kColumn = (kRows + 1) * 16;  // bytes; one chunk more turns the banks
  unsigned char* data;

  __device__ unsigned char* at(int row, int column) const {
    return data + column * kColumn + row * 16;
  }
  // B of two products: 16 from `k` on, columns [n, n + 8) and [n + 8, n + 16).
  __device__ void load_wide(uint32_t (&b)[4], int k, int n) const {
    const int lane = threadIdx.x % kWarp;
    if constexpr (kDeep)
      load_matrices<true>(b, at(k + lane % 16, n / 8 + lane / 16));
    else
      load_matrices<false>(b, at(n + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2));
  }
  // B of two products: 16 from `k` on, and the next 16, columns [n, n + 8).
  __device__ void load_deep(uint32_t (&b)[4], int k, int n) const {
    const int lane = threadIdx.x % kWarp;
    if constexpr (kDeep)
      load_matrices<true>(b, at(k + lane, n / 8));
    else
      load_matrices<false>(b, at(n + lane % 8, k / 8 + lane / 8));
  }
};
// c += A B for kCount times 8 columns from `n` on, over kSteps times 16 from `k` on; a(step) is A.
// Sums go on in turns, since each has to wait for its last.
template <int kSteps, int kCount, class A, class B>
__device__ __forceinline__ void multiply(float (&c)[kCount][4], const A& a, const B& b, int k,
                                         int n) {
  if constexpr (kCount % 2 == 0) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t left[4];
      a(left, step);
#pragma unroll
      for (int i = 0; i < kCount; i += 2) {
        uint32_t right[4];
        b.load_wide(right, k + 16 * step, n + 8 * i);
        mma_bf16(c[i], left, right[0], right[1]);
        mma_bf16(c[i + 1], left, right[2], right[3]);
      }
    }
  } else {
    static_assert(kCount == 1 && kSteps % 2 == 0);
#pragma unroll
    for (int step = 0; step < kSteps; step += 2) {
      uint32_t left[4], right[4];
      b.load_deep(right, k + 16 * step, n);
      a(left, step);
      mma_bf16(c[0], left, right[0], right[1]);
      a(left, step + 1);
      mma_bf16(c[0], left, right[2], right[3]);
    }
  }
}

constexpr int chunk_bytes(int rows, int columns) { return (rows + 1) * columns * 16; }
constexpr int larger(int a, int b) { return a > b ? a : b; }
// Of keys, and of values, in either order of the rows.
constexpr int tile_part_bytes(int dim) {
  return larger(chunk_bytes(kTileTokens, dim / 8), chunk_bytes(dim, kTileTokens / 8));
}
template <int kDim>
struct StagedTile {
  unsigned char keys[tile_part_bytes(kDim)], values[tile_part_bytes(kDim)];
};

// --- queries and scores --------------------------------------------------------------------------

// Queries are left operands of 16 rows; a lane has parts of rows g and g + 8. a(to, step) is for
// channels [16 step, 16 step + 16).
template <int kDim>
struct QueriesInRegisters {
  uint32_t registers[kDim / 16][4];

  // at(half, c): channels c and c + 1 of row g + 8 half.
  template <class At>
  __device__ void load(const At& at) {
    const int t = threadIdx.x % kWarp % 4;
#pragma unroll
    for (int k = 0; k < kDim / 8; ++k)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        registers[k / 2][half + k % 2 * 2] = at(half, 8 * k + 2 * t);
  }
  __device__ void operator()(uint32_t (&to)[4], int step) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = registers[step][i];
  }
};

// Scores of kCount times 8 tokens, from token `first` of the tile on.
template <int kDim, int kCount, class Queries, class Keys>
__device__ __forceinline__ void score(float (&scores)[kCount][4], const Queries& queries,
                                      const Keys& keys, int first) {
#pragma unroll
  for (int n = 0; n < kCount; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] = 0;
  multiply<kDim / 16>(scores, queries, keys, 0, first);
}

// Tokens from `seen` on are not seen; `first` is that of the scores.
template <int kCount>
__device__ __forceinline__ void hide(float (&scores)[kCount][4], const int (&seen)[2], int first) {
  const int t = threadIdx.x % kWarp % 4;
#pragma unroll
  for (int n = 0; n < kCount; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (first + 8 * n + 2 * t + i % 2 >= seen[i / 2]) scores[n][i] = -INFINITY;
}

// The largest of a row, over the lanes that share it.
template <int kCount>
__device__ __forceinline__ float largest(const float (&scores)[kCount][4], int row) {
  float most = -INFINITY;
#pragma unroll
  for (int n = 0; n < kCount; ++n)
    most = fmaxf(most, fmaxf(scores[n][2 * row], scores[n][2 * row + 1]));
  most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
  return fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
}

// The state of the tokens so far, for two rows: `kCount` times 8 channels of its values.
template <int kCount>
struct TileState {
  float most[2] = {-INFINITY, -INFINITY};
  float total[2] = {};
  float sums[kCount][4] = {};

  // Scores up to `top` are to come.
  __device__ void raise(const float (&top)[2]) {
    float factor[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float next = fmaxf(most[row], top[row]);
      factor[row] = power_of_2(most[row] - next);
      most[row] = next;
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) total[row] *= factor[row];
#pragma unroll
    for (int n = 0; n < kCount; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] *= factor[i / 2];
  }
  // The weights of two columns, of row `row`.
  __device__ uint32_t weights(float first, float second, int row) const {
    return rounded_bf16_pair(power_of_2(first - most[row]), power_of_2(second - most[row]));
  }
  // A tile, with the values from channel `first` on; its weights are left operands.
  template <class Values>
  __device__ void add(const uint32_t (&weights)[kTileTokens / 16][4], const Values& values,
                      int first) {
    constexpr uint32_t kOnes = 0x3f803f80u;
    constexpr int kSteps = kTileTokens / 16;
    float totals[4] = {total[0], total[0], total[1], total[1]};  // of columns that are all 1
#pragma unroll
    for (int step = 0; step < kSteps; ++step) mma_bf16(totals, weights[step], kOnes, kOnes);
    total[0] = totals[0];
    total[1] = totals[2];
    const auto left = [&](uint32_t (&to)[4], int step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = weights[step][i];
    };
    multiply<kSteps>(sums, left, values, 0, first);
  }
  // A warp's own tile, of which it has all scores: its weights are left operands as they are.
  template <class Values>
  __device__ void add_tile(const float (&scores)[kTileTokens / 8][4], const Values& values) {
    const float top[2] = {largest(scores, 0), largest(scores, 1)};
    raise(top);
    uint32_t all[kTileTokens / 16][4];
#pragma unroll
    for (int n = 0; n < kTileTokens / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        all[n / 2][n % 2 * 2 + half] = weights(scores[n][2 * half], scores[n][2 * half + 1], half);
    add(all, values, 0);
  }
};

// --- tile after tile ---------------------------------------------------------------------------

// For each of `steps` tiles, which of(step) tells, all threads call scores(step, its keys,
// request), then values(step, its values). The next tile is on its way meanwhile: as asked for,
// piece after piece, by request(0), request(1), ... within the scores, so that products do not have
// to wait until many copies have begun.
template <int kDim, class Tiles, class Of, class Scores, class Values>
__device__ __forceinline__ void for_each_tile(Tiles tiles, StagedTile<kDim> (&memory)[2], int steps,
                                              const Of& of, const Scores& scores,
                                              const Values& values) {
  const auto deliver = [&](int step) {
    tiles.deliver_keys(of(step), memory[step % 2].keys);
    tiles.deliver_values(of(step), memory[step % 2].values);
    Tiles::template wait_for_all_but<0>();
  };
#pragma unroll
  for (int piece = 0; piece < Tiles::kPieces; ++piece) tiles.request(piece, of(0), memory[0]);
  deliver(0);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    __syncthreads();  // the tile is there, and the one before is not needed any more
    const bool more = step + 1 < steps;
    const auto next = of(more ? step + 1 : step);
    scores(step, memory[step % 2].keys, [&](int piece) {
      if (more && piece < Tiles::kPieces) tiles.request(piece, next, memory[(step + 1) % 2]);
    });
    values(step, memory[step % 2].values);
    if (more) deliver(step + 1);
  }
}

}  // namespace puna::cuda
