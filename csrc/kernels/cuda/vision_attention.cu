// Attention within the tiles of an image.
#include "kernels/cuda/launches.h"
#include "kernels/cuda/plain_attention.cuh"
#include "kernels/cuda/tile_products.cuh"
#include "kernels/cuda/turn.cuh"

namespace puna::cuda {
namespace {

// Rows of a matrix that hold keys and values as they are.
struct PlainRows {
  const float *key, *value;
  int64_t stride;
  __device__ Run keys(int t, int c, int count) const {
    Run run;
#pragma unroll
    for (int i = 0; i < kRun; ++i) run.at[i] = i < count ? key[t * stride + c + i] : 0.0f;
    return run;
  }
  __device__ Run values(int t, int c, int count) const {
    Run run;
#pragma unroll
    for (int i = 0; i < kRun; ++i) run.at[i] = i < count ? value[(t + i) * stride + c] : 0.0f;
    return run;
  }
};

// --- vision --------------------------------------------------------------------------------------

// A warp turns a head of queries (blockIdx.y < heads) or keys.
__global__ void __launch_bounds__(kWarp) turn_vision_kernel(const VisionAttentionCall call) {
  after_earlier_kernels();
  const int64_t r = blockIdx.x, angles = r % call.tokens * (call.dim / 2);
  const bool query = blockIdx.y < static_cast<unsigned>(call.heads);
  float* x = call.qkv.data + r * call.qkv.stride + static_cast<int64_t>(blockIdx.y) * call.dim;
  turn(x, call.dim, call.cos + angles, call.sin + angles, false, 0, query ? call.scale : 1.0f);
}

// Up to kPageTokens keys of a tile, kMostQueries neighbouring queries, one head.
__global__ void __launch_bounds__(kPlainThreads)
    attend_vision_kernel(const VisionAttentionCall call) {
  after_earlier_kernels();
  const int64_t blocks = (call.tokens + kMostQueries - 1) / kMostQueries;
  const int64_t tile = blockIdx.z / blocks, first = blockIdx.z % blocks * kMostQueries;
  const int64_t left = call.tokens - first;
  const int count = static_cast<int>(left < kMostQueries ? left : kMostQueries);
  const int head = blockIdx.y, dim = call.dim;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kPageTokens;
  const int64_t keys_left = call.tokens - begin;
  const int tokens = static_cast<int>(keys_left < kPageTokens ? keys_left : kPageTokens);
  const PlainMemory memory(dim, 0);
  const auto row = [&](int64_t token, int64_t part) {
    return call.qkv.data + (tile * call.tokens + token) * call.qkv.stride +
           (part * call.heads + head) * dim;
  };
  load_queries(memory, count, dim, [&](int i, int c) { return row(first + i, 0)[c] * kLog2E; });
  __syncthreads();
  const int64_t each = state_floats(dim);
  const int64_t stride = static_cast<int64_t>(call.heads) * gridDim.x * each;
  float* states = call.states + (tile * call.tokens + first) * stride +
                  (static_cast<int64_t>(head) * gridDim.x + blockIdx.x) * each;
  attend_page(PlainRows{row(begin, 1), row(begin, 2), call.qkv.stride}, memory, count, dim, tokens,
              states, stride);
}

__global__ void __launch_bounds__(kPlainThreads)
    merge_vision_kernel(const VisionAttentionCall call, int64_t pages) {
  after_earlier_kernels();
  const int64_t query = blockIdx.y, place = query * call.heads + blockIdx.x;
  const int64_t each = state_floats(call.dim);
  float* out = call.out.data + query * call.out.stride + blockIdx.x * call.dim;
  for (int c = threadIdx.x; c < call.dim; c += kPlainThreads) {
    const float* state = call.states + place * pages * each;
    Merged merged;
    float sum = 0;
    for (int64_t page = 0; page < pages; ++page, state += each)
      sum = merged.add(state[0], state[1]).merge(sum, state[kStateHead + c]);
    out[c] = sum / static_cast<float>(merged.total);
  }
}

// --- on the tensor cores -------------------------------------------------------------------------

// Heads of up to this many channels; the others become zeros. Llama 4's have 88.
constexpr int kMostDim = 96;
constexpr int kBlockQueries = 16 * kTileWarps;

// Channels c and c + 1 of `from`, of which there are `dim`, an even number.
__device__ __forceinline__ uint32_t rounded_pair(const float* from, int c, int dim, float scale) {
  if (c >= dim) return 0;
  const auto pair = *reinterpret_cast<const float2*>(from + c);
  return rounded_bf16_pair(pair.x * scale, pair.y * scale);
}

struct TileOfRows {
  int first, tokens;  // of all tokens
};
// Keys and values from the rows of a matrix, rounded on their way.
struct RowTiles {
  using Keys = Chunks<kTileTokens, false>;
  using Values = Chunks<kTileTokens, true>;
  static __device__ Keys keys(unsigned char* tile) { return {tile}; }
  static __device__ Values values(unsigned char* tile) {
    return {tile + tile_part_bytes(kMostDim)};
  }

  const float *key, *value;  // of token 0
  int64_t stride;
  int dim;

  __device__ void request_keys(const TileOfRows&, unsigned char*) {}
  __device__ void request_values(const TileOfRows&, unsigned char*) {}
  __device__ void deliver_keys(const TileOfRows& of, unsigned char* tile) {
    store(keys(tile), key, of);
  }
  __device__ void deliver_values(const TileOfRows& of, unsigned char* tile) {
    store(values(tile), value, of);
  }
  template <class To>
  __device__ void store(const To& to, const float* from, const TileOfRows& of) const {
    constexpr int kOctets = kMostDim / 8;
#pragma unroll
    for (int i = 0; i < kTileTokens * kOctets; i += kTileThreads) {
      const int token = (i + threadIdx.x) / kOctets, octet = (i + threadIdx.x) % kOctets;
      const float* row = from + (of.first + token) * stride;
      const int there = of.first + token < of.tokens ? dim : 0;
      const auto pair = [&](int j) { return rounded_pair(row, 8 * octet + 2 * j, there, 1); };
      *reinterpret_cast<uint4*>(to.at(token, octet)) = {pair(0), pair(1), pair(2), pair(3)};
    }
  }
};

// kBlockQueries neighbouring queries of a tile of the image, one head.
__global__ void __launch_bounds__(kTileThreads)
    attend_vision_tensor_kernel(const VisionAttentionCall call) {
  after_earlier_kernels();
  const int tokens = static_cast<int>(call.tokens), head = blockIdx.y, dim = call.dim;
  const int first = blockIdx.x * kBlockQueries + threadIdx.x / kWarp * 16;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int64_t row = static_cast<int64_t>(blockIdx.z) * tokens;
  auto& memory = *reinterpret_cast<unsigned char (*)[2][kTileBytes<kMostDim>]>(shared_memory());
  const auto part = [&](int64_t number, int token) {
    return call.qkv.data + (row + token) * call.qkv.stride + (number * call.heads + head) * dim;
  };
  QueriesInRegisters<kMostDim> queries;
  queries.load([&](int half, int c) {
    const int token = first + g + 8 * half;
    return rounded_pair(part(0, token), c, token < tokens ? dim : 0, kLog2E);
  });
  TileState<kMostDim / 8> state;
  float scores[kTileTokens / 8][4];
  const auto of = [&](int step) { return TileOfRows{step * kTileTokens, tokens}; };
  const auto score_tile = [&](int step, unsigned char* tile) {
    score<kMostDim>(scores, queries, RowTiles::keys(tile), 0);
    const int left = tokens - step * kTileTokens;
    if (left < kTileTokens) hide(scores, {left, left}, 0);
  };
  const auto add_values = [&](int, unsigned char* tile) {
    state.add_tile(scores, RowTiles::values(tile));
  };
  for_each_tile<kMostDim>(
      RowTiles{part(1, 0), part(2, 0), call.qkv.stride, dim}, memory,
      (tokens + kTileTokens - 1) / kTileTokens, of, [] {}, score_tile, add_values);
  for (int i = 0; i < 2; ++i) {
    if (first + g + 8 * i >= tokens) continue;
    float* out = call.out.data + (row + first + g + 8 * i) * call.out.stride + head * dim + 2 * t;
#pragma unroll
    for (int n = 0; n < kMostDim / 8; ++n)
      if (8 * n + 2 * t < dim)
        *reinterpret_cast<float2*>(out + 8 * n) = {state.sums[n][2 * i] / state.total[i],
                                                   state.sums[n][2 * i + 1] / state.total[i]};
  }
}

unsigned extent(int64_t count) { return static_cast<unsigned>(count); }

}  // namespace

int launch_vision_attention(const VisionAttentionCall& call, Stream stream) {
  const int64_t rows = call.tiles * call.tokens;
  const int64_t pages = (call.tokens + kPageTokens - 1) / kPageTokens;
  int error = launch(turn_vision_kernel, dim3{extent(rows), extent(2 * call.heads), 1}, kWarp, 0,
                     stream, call);
  if (error != 0) return error;
  if (call.bf16 != 0 && call.dim <= kMostDim)
    return launch(attend_vision_tensor_kernel,
                  dim3{extent((call.tokens + kBlockQueries - 1) / kBlockQueries),
                       extent(call.heads), extent(call.tiles)},
                  kTileThreads, 2 * kTileBytes<kMostDim>, stream, call);
  const int64_t blocks = (call.tokens + kMostQueries - 1) / kMostQueries;
  error = launch(attend_vision_kernel,
                 dim3{extent(pages), extent(call.heads), extent(call.tiles * blocks)},
                 kPlainThreads, plain_shared(call.dim, 0), stream, call);
  if (error != 0) return error;
  return launch(merge_vision_kernel, dim3{extent(call.heads), extent(rows), 1}, kPlainThreads, 0,
                stream, call, pages);
}

}  // namespace puna::cuda
