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

// Where a head's queries (part 0), keys or values of a tile are, rounded.
__device__ __forceinline__ uint16_t* rounded(const VisionAttentionCall& call, int64_t tile,
                                             int part, int head) {
  return call.rounded +
         ((tile * 3 + part) * call.heads + head) * call.tokens * int64_t{kMostVisionDim};
}

// A warp turns a head of queries or keys.
__global__ void __launch_bounds__(kWarp) turn_vision_kernel(const VisionAttentionCall call) {
  after_earlier_kernels();
  const int64_t r = blockIdx.x, angles = r % call.tokens * (call.dim / 2);
  float* head = call.qkv.data + r * call.qkv.stride + static_cast<int64_t>(blockIdx.y) * call.dim;
  turn(head, head, call.dim, call.cos + angles, call.sin + angles, false, 0,
       static_cast<int>(blockIdx.y) < call.heads ? call.scale : 1.0f);
}

// A block rounds a row: queries and keys turned as turn() does, and values. Its warps take heads.
constexpr int kRoundThreads = 256, kRoundWarps = kRoundThreads / kWarp;
__global__ void __launch_bounds__(kRoundThreads)
    round_vision_kernel(const VisionAttentionCall call) {
  after_earlier_kernels();
  const int64_t r = blockIdx.x, tile = r / call.tokens, token = r % call.tokens;
  const int64_t angles = token * (call.dim / 2);
  const float* row = call.qkv.data + r * call.qkv.stride;
  const int lane = threadIdx.x % kWarp;
#pragma unroll 3
  for (int number = threadIdx.x / kWarp; number < 3 * call.heads; number += kRoundWarps) {
    const int part = number / call.heads, head = number % call.heads;
    auto* to =
        reinterpret_cast<uint32_t*>(rounded(call, tile, part, head) + token * kMostVisionDim);
    const float scale = part == 0 ? call.scale : 1.0f;
    const float factor = part == 0 ? kLog2E : 1.0f;
#pragma unroll
    for (int first = 0; first < kMostVisionDim / 2; first += kWarp) {
      const int pair = first + lane;
      if (pair >= kMostVisionDim / 2) continue;
      float2 x = {};
      if (2 * pair < call.dim) {
        x = *reinterpret_cast<const float2*>(row + number * call.dim + 2 * pair);
        if (part < 2) {
          const float c = call.cos[angles + pair], s = call.sin[angles + pair];
          x = {fmaf(x.x, c, -(x.y * s)) * scale, fmaf(x.x, s, x.y * c) * scale};
        }
      }
      to[pair] = rounded_bf16_pair(x.x * factor, x.y * factor);
    }
  }
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

constexpr int kBlockQueries = 16 * kTileWarps;

struct TileOfRows {
  int first, tokens;  // of all tokens
};
// Keys and values from rounded rows.
struct RowTiles {
  using Keys = Chunks<kTileTokens, false>;
  using Values = Chunks<kTileTokens, true>;
  static __device__ Keys keys(unsigned char* part) { return {part}; }
  static __device__ Values values(unsigned char* part) { return {part}; }
  static constexpr int kOctets = kMostVisionDim / 8;
  static constexpr int kCopies = kTileTokens * kOctets / kTileThreads;  // of keys, and of values
  static constexpr int kPieces = 2 * kCopies;

  const uint16_t *key, *value;  // of token 0

  __device__ void request(int piece, const TileOfRows& of, StagedTile<kMostVisionDim>& tile) const {
    const int i = piece % kCopies * kTileThreads + threadIdx.x;
    const int token = i / kOctets, octet = i % kOctets;
    const bool there = of.first + token < of.tokens;
    const int64_t from = there ? (of.first + token) * kMostVisionDim + octet * 8 : 0;
    if (piece < kCopies)
      copy_async(keys(tile.keys).at(token, octet), key + from, there);
    else
      copy_async(values(tile.values).at(token, octet), value + from, there);
    if (piece + 1 == kPieces) commit_copies();
  }
  __device__ void deliver_keys(const TileOfRows&, unsigned char*) {}
  __device__ void deliver_values(const TileOfRows&, unsigned char*) {}
  template <int kLeft>
  static __device__ void wait_for_all_but() {
    wait_for_copies<kLeft>();
  }
};

// kBlockQueries neighbouring queries of a tile of the image, one head.
__global__ void __launch_bounds__(kTileThreads)
    attend_vision_tensor_kernel(const VisionAttentionCall call) {
  after_earlier_kernels();
  const int tokens = static_cast<int>(call.tokens), head = blockIdx.y, dim = call.dim;
  const int first = blockIdx.x * kBlockQueries + threadIdx.x / kWarp * 16;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  auto& memory = *reinterpret_cast<StagedTile<kMostVisionDim>(*)[2]>(shared_memory());
  const auto part = [&](int number) { return rounded(call, blockIdx.z, number, head); };
  QueriesInRegisters<kMostVisionDim> queries;
  queries.load([&](int half, int c) {
    const int token = first + g + 8 * half;
    const uint16_t* pair = part(0) + token * kMostVisionDim + c;
    return token < tokens ? load_word(pair) : 0;
  });
  TileState<kMostVisionDim / 8> state;
  float scores[kTileTokens / 8][4];
  const auto of = [&](int step) { return TileOfRows{step * kTileTokens, tokens}; };
  const auto score_tile = [&](int step, unsigned char* keys, const auto& request) {
    const auto left = [&](uint32_t (&to)[4], int of_step) {
      queries(to, of_step);
      request(of_step);
    };
    score<kMostVisionDim>(scores, left, RowTiles::keys(keys), 0);
    const int there = tokens - step * kTileTokens;
    if (there < kTileTokens) hide(scores, {there, there}, 0);
  };
  const auto add_values = [&](int, unsigned char* values) {
    state.add_tile(scores, RowTiles::values(values));
  };
  for_each_tile<kMostVisionDim>(RowTiles{part(1), part(2)}, memory,
                                (tokens + kTileTokens - 1) / kTileTokens, of, score_tile,
                                add_values);
  for (int i = 0; i < 2; ++i) {
    if (first + g + 8 * i >= tokens) continue;
    const int64_t row = static_cast<int64_t>(blockIdx.z) * tokens + first + g + 8 * i;
    const int column = head * dim + 2 * t;
    float* out = call.out.data + row * call.out.stride + column;
    auto* operand = static_cast<uint16_t*>(call.operand.data) + row * call.operand.stride + column;
#pragma unroll
    for (int n = 0; n < kMostVisionDim / 8; ++n) {
      if (8 * n + 2 * t >= dim) continue;
      const float2 two = {state.sums[n][2 * i] / state.total[i],
                          state.sums[n][2 * i + 1] / state.total[i]};
      *reinterpret_cast<float2*>(out + 8 * n) = two;
      if (call.operand.data != nullptr)
        *reinterpret_cast<uint32_t*>(operand + 8 * n) = bf16_pair(two.x, two.y);
    }
  }
}

unsigned extent(int64_t count) { return static_cast<unsigned>(count); }

}  // namespace

int launch_vision_attention(const VisionAttentionCall& call, Stream stream) {
  const int64_t rows = call.tiles * call.tokens;
  const int64_t pages = (call.tokens + kPageTokens - 1) / kPageTokens;
  int error =
      call.rounded != nullptr
          ? launch(round_vision_kernel, dim3{extent(rows), 1, 1}, kRoundThreads, 0, stream, call)
          : launch(turn_vision_kernel, dim3{extent(rows), extent(2 * call.heads), 1}, kWarp, 0,
                   stream, call);
  if (error != 0) return error;
  if (call.rounded != nullptr)
    return launch(attend_vision_tensor_kernel,
                  dim3{extent((call.tokens + kBlockQueries - 1) / kBlockQueries),
                       extent(call.heads), extent(call.tiles)},
                  kTileThreads, 2 * sizeof(StagedTile<kMostVisionDim>), stream, call);
  const int64_t blocks = (call.tokens + kMostQueries - 1) / kMostQueries;
  error = launch(attend_vision_kernel,
                 dim3{extent(pages), extent(call.heads), extent(call.tiles * blocks)},
                 kPlainThreads, plain_shared(call.dim, 0), stream, call);
  if (error != 0) return error;
  return launch(merge_vision_kernel, dim3{extent(call.heads), extent(rows), 1}, kPlainThreads, 0,
                stream, call, pages);
}

}  // namespace puna::cuda
