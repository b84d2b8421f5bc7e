// What all kernels of products share: which rows of x a block multiplies with which matrix, and
// what becomes of a sum.
//
// The summed dimension is cut into spans of kActivationGroup columns. Each span's sum starts from
// zero, and the spans' are added up in their order. So an element's bits depend neither on the
// number of rows nor on how blocks and warps share the work, and with quantised weights they are
// those of the CPU's kernels (kernel_table.h: gemm_quantized).
//
// Weights are the left operand of the tensor cores, so that few rows of x waste nothing. A lane
// loads 16 bytes, which are rows 4 g .. 4 g + 3 of 32 (g = lane / 4): a panel's order of bytes is
// that of the operand's registers but for the order of rows. Of these 32 rows a lane has, with
// t = lane % 4, the sums [tile j][i] of rows 4 g + 2 j + i / 2 and tokens 2 t + i % 2 of 8.
#pragma once

#include "kernels/cuda/launches.h"
#include "kernels/kernel_table.h"
#include "quant/traits.h"

namespace puna::cuda {

constexpr int kSpan = static_cast<int>(kActivationGroup);
constexpr int kPanel = static_cast<int>(kPanelRows);
constexpr int kHalf = 32;       // rows of a panel that a warp's lanes load together
constexpr int kTilesEach = 2;   // tiles of 16 rows in a half
constexpr int kTileTokens = 8;  // columns of a tile

// Rows [first, first + count) of x, and what a block does with them.
struct Share {
  const uint8_t* weights;
  Operand x;
  FloatRows out;
  int64_t first;
  int count;
  bool accumulate;
};

template <int kTokens>
__host__ __device__ constexpr int64_t tiles_of(int64_t rows) {
  return (rows + kTokens - 1) / kTokens;
}

// How many tiles of up to kTokens rows a call has at most, whatever rows its experts have: e of
// them with n rows each have (n - 1) / kTokens + 1.
template <int kTokens>
unsigned most_tiles(const ProductCall& call) {
  const int64_t slots = call.experts.slots;
  const int64_t own = call.experts.offsets == nullptr ? tiles_of<kTokens>(call.count)
                                                      : (call.count - slots) / kTokens + slots;
  return static_cast<unsigned>(tiles_of<kTokens>(call.shared.count) + own);
}

// What a product takes: reading the weights, or multiplying with them. Of experts the rows that
// each has on average decide.
enum ProductSize { kFewRows, kSomeRows, kManyRows };
inline ProductSize size_of(const ProductCall& call) {
  const int64_t matrices = call.experts.offsets == nullptr ? 1 : call.experts.slots;
  const int64_t rows = call.count / matrices;
  if (rows <= 16) return kFewRows;
  // Large tiles, of 128 by 128, where there are enough of them for the whole device.
  const int64_t tiles = tiles_of<128>(rows) * matrices * tiles_of<128>(call.rows);
  return rows > 64 && tiles >= multiprocessors() ? kManyRows : kSomeRows;
}

// Whether the products of many rows are those of warpgroups.
inline bool by_warpgroups(const ProductCall& call) {
  return has_warpgroups && call.form == kProductOfWarpgroups;
}

// Whether the matrix of a tile is known before earlier kernels have ended.
template <int kTokens>
__device__ __forceinline__ bool matrix_is_known(const ProductCall& call, int tile) {
  return call.experts.offsets == nullptr || tile < tiles_of<kTokens>(call.shared.count);
}

// Finds the tile's share; false if there are not so many tiles. Those of the shared expert come
// first, then the others' in their order.
template <int kTokens>
__device__ __forceinline__ bool find_share(const ProductCall& call, int tile, Share* share) {
  const int shared_tiles = static_cast<int>(tiles_of<kTokens>(call.shared.count));
  const bool shared = tile < shared_tiles;
  share->x = shared ? call.shared.x : call.x;
  share->out = shared ? call.shared.out : call.out;
  share->accumulate = (shared ? call.shared.accumulate : call.accumulate) != 0;
  share->weights = static_cast<const uint8_t*>(shared ? call.shared.weights : call.weights);
  int64_t begin = 0, end = shared ? call.shared.count : call.count;
  if (!shared) tile -= shared_tiles;
  if (!shared && call.experts.offsets != nullptr) {
    const void* matrix = nullptr;
#pragma unroll 4
    for (int slot = 0; slot < call.experts.slots; ++slot) {
      const int expert = call.experts.occupied[slot];
      if (expert < 0) return false;
      begin = call.experts.offsets[expert];
      end = call.experts.offsets[expert + 1];
      matrix = call.experts.matrices[expert];
      const int tiles = static_cast<int>(tiles_of<kTokens>(end - begin));
      if (tile < tiles) break;
      tile -= tiles;
      matrix = nullptr;
    }
    if (matrix == nullptr) return false;
    share->weights = static_cast<const uint8_t*>(matrix);
  }
  share->first = begin + static_cast<int64_t>(tile) * kTokens;
  share->count = static_cast<int>(end - share->first < kTokens ? end - share->first : kTokens);
  return true;
}

// --- rows of x in shared memory ------------------------------------------------------------------
// kRowBytes of each row are 8 chunks of 16 bytes; chunk c of row r lies at c ^ r % 8, so that the
// lanes that load a column of them meet no bank of the memory twice.
constexpr int kRowBytes = 128, kChunk = 16, kRowChunks = kRowBytes / kChunk;

// Bytes [at, at + kRowBytes) of `count` rows, as far as these go; by thread `thread` of kThreads.
template <int kRows, int kThreads>
__device__ __forceinline__ void copy_rows(unsigned char* to, int thread, const uint8_t* rows,
                                          int count, int row_bytes, int at) {
  constexpr int kTurn = kThreads / kRowChunks;  // rows that are copied together
  const int chunk = thread % kRowChunks;
  if (at + chunk * kChunk >= row_bytes) return;
  const uint8_t* from = rows + int64_t{thread / kRowChunks} * row_bytes + at + chunk * kChunk;
#pragma unroll
  for (int first = 0; first < kRows; first += kTurn) {
    const int row = first + thread / kRowChunks;
    if (row < count) copy_async<kChunk>(to + row * kRowBytes + (chunk ^ row % 8) * kChunk, from);
    from += int64_t{kTurn} * row_bytes;
  }
}
// The right operands of the products 2 * pair and 2 * pair + 1, of 32 bytes of 8 rows each; lanes
// of the same lane % 8 name the same row.
__device__ __forceinline__ void load_rows(uint32_t (&x)[4], const unsigned char* from, int row,
                                          int pair) {
  const int chunk = 4 * pair + threadIdx.x % kWarp / 8;
  load_matrices<false>(x, from + row * kRowBytes + (chunk ^ row % 8) * kChunk);
}

__device__ __forceinline__ float gelu(float x) {
  return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
}

// What an element of the product becomes: the sum, `bias` and the value that was there.
__device__ __forceinline__ float finished(const ProductCall& call, float sum, float bias,
                                          float before, bool accumulate) {
  if (call.bias != nullptr) sum += bias;
  if (call.gelu) sum = gelu(sum);
  return accumulate ? before + sum : sum;
}

}  // namespace puna::cuda
