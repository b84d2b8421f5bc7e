// Attention over pages on the tensor cores; a query of tile_products.cuh is a pair of a query and a
// head. A page starts with a fresh state, and its weights refer to the largest score so far.
//
// Two kernels divide this up: for few queries a block takes a page and its warps share the pairs;
// for many a block takes a group of pages and each warp has pairs of its own. A pair goes through
// the same sums in the same order in both, so it has the same bits.
#include "kernels/cuda/launches.h"
#include "kernels/cuda/page_tiles.cuh"

namespace puna::cuda {
namespace {

constexpr int kWarpPairs = 16;

template <class Tiles>
struct TilesOfPage {
  using Form = Tiles;
  Tiles of[kPageTiles];
  __device__ Tiles& operator[](int i) { return of[i]; }
};
// The tiles of a page, of the form that one shows.
template <class Tiles>
__device__ __forceinline__ TilesOfPage<Tiles> four(const Tiles& one) {
  static_assert(kPageTiles == 4);
  return {{one, one, one, one}};
}

// The queries of a tile's pairs in shared memory, as bfloat16: left operands of 16 pairs.
template <int kDim, int kPairs>
struct Queries {
  static constexpr int kBytes = chunk_bytes(kPairs, kDim / 8);
  Chunks<kPairs, false> chunks;
  int first;  // of the warp's

  // What a thread has of them on the way: all threads load, then store, and have to meet before
  // they read. Pairs that the tile has not are zeros.
  struct Loaded {
    static constexpr int kQuads = kDim / 4, kEach = kPairs * kQuads / kTileThreads;
    uint4 of[kEach];
  };
  static __device__ Loaded load(const AttendCall& call, const AttentionTile& tile, int kv_head) {
    Loaded loaded;
#pragma unroll
    for (int i = 0; i < Loaded::kEach; ++i) {
      const int at = i * kTileThreads + threadIdx.x, pair = at / Loaded::kQuads;
      loaded.of[i] = {};
      if (pair < tile.pairs)
        loaded.of[i] =
            load_words(pair_of(call, tile, kv_head, pair).query + at % Loaded::kQuads * 4);
    }
    return loaded;
  }
  __device__ void store(const Loaded& loaded) const {
    const auto scaled = [](uint32_t bits) { return __uint_as_float(bits) * kLog2E; };
#pragma unroll
    for (int i = 0; i < Loaded::kEach; ++i) {
      const int at = i * kTileThreads + threadIdx.x, c = at % Loaded::kQuads * 4;
      const uint4& x = loaded.of[i];
      *reinterpret_cast<uint2*>(chunks.at(at / Loaded::kQuads, c / 8) + c % 8 * 2) = {
          rounded_bf16_pair(scaled(x.x), scaled(x.y)), rounded_bf16_pair(scaled(x.z), scaled(x.w))};
    }
  }
  __device__ void operator()(uint32_t (&to)[4], int step) const {
    const int lane = threadIdx.x % kWarp;
    load_matrices<false>(to, chunks.at(first + lane % 16, 2 * step + lane / 16));
  }
};
// Tokens of its own page that a pair sees.
__device__ __forceinline__ int seen_by(const AttendCall& call, const AttentionTile& tile,
                                       int kv_head, int pair) {
  return pair < tile.pairs ? pair_of(call, tile, kv_head, pair).seen : kPageTokens;
}

// --- few pairs: a block for each page ------------------------------------------------------------

// Warps share 16 pairs: in the scores each takes 32 tokens, in the values some channels. As much of
// the page as there is memory for is asked for at once: all keys, and values as their places, or
// registers, come free.
template <int kDim>
struct PageMemory {
  static constexpr int kRow = kPageTokens + 8;  // a row's weights are not in the next one's banks
  unsigned char parts[kPageTiles + 1][tile_part_bytes(kDim)];
  unsigned char queries[Queries<kDim, kWarpPairs>::kBytes];
  float most[kTileWarps][kWarpPairs];
  uint32_t weights[kWarpPairs][kRow / 2];
  int32_t slot;

  __device__ unsigned char* keys(int tile) { return parts[tile]; }
  // Those of the first tile have a place of their own, the others one that had keys.
  __device__ unsigned char* values(int tile) { return parts[tile == 0 ? kPageTiles : tile - 1]; }
};

template <int kDim>
__global__ void __launch_bounds__(kTileThreads, 2) attend_pages_kernel(const AttendCall call) {
  after_earlier_kernels();
  const AttentionTile& tile = call.tiles[blockIdx.z];
  const int64_t page = call.first_page + blockIdx.x;
  if (page > tile.before) return;
  const int kv_head = blockIdx.y, warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  auto& memory = *reinterpret_cast<PageMemory<kDim>*>(shared_memory());
  const bool own = page == tile.before;
  constexpr int kCount = kDim / 8 / kTileWarps;
  constexpr int kWarpTokens = kPageTokens / kTileWarps;
  TileState<kCount> state;

  const auto attend = [&](auto tiles, const void* data, int tokens) {
    using Tiles = typename decltype(tiles)::Form;
    const int count = tiles_of(tokens);
    const auto loaded = Queries<kDim, kWarpPairs>::load(call, tile, kv_head);
    const auto of = [&](int number) { return TileOfPage{data, number, tokens}; };
#pragma unroll
    for (int i = 0; i < kPageTiles; ++i)
      if (i < count) tiles[i].request_keys(of(i), memory.keys(i));
    tiles[0].request_values(of(0), memory.values(0));

    const Queries<kDim, kWarpPairs> queries{{memory.queries}, 0};
    queries.store(loaded);
#pragma unroll
    for (int i = 0; i < kPageTiles; ++i)
      if (i < count) tiles[i].deliver_keys(of(i), memory.keys(i));
    Tiles::template wait_for_all_but<1>();
    __syncthreads();  // keys and queries are there
    const auto request_values = [&] {
#pragma unroll
      for (int i = 1; i < kPageTiles; ++i)
        if (i < count) tiles[i].request_values(of(i), memory.values(i));
    };
    const int own_tile = warp * kWarpTokens / kTileTokens;
    const int first = warp * kWarpTokens % kTileTokens;
    float scores[kWarpTokens / 8][4] = {};
    if (own_tile < count) {
      score<kDim>(scores, queries, Tiles::keys(memory.keys(own_tile)), first);
      if (own) {
        const int seen[2] = {seen_by(call, tile, kv_head, g), seen_by(call, tile, kv_head, g + 8)};
        hide(scores, seen, warp * kWarpTokens);
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float most = largest(scores, row);
        if (t == 0) memory.most[warp][g + 8 * row] = most;
      }
    }
    if constexpr (Tiles::kInRegisters) request_values();
    __syncthreads();  // the largest are known, and keys not needed any more
    if constexpr (!Tiles::kInRegisters) request_values();
    const auto top_of = [&](int i, float (&top)[2]) {
#pragma unroll
      for (int row = 0; row < 2; ++row)
        top[row] = fmaxf(memory.most[2 * i][g + 8 * row], memory.most[2 * i + 1][g + 8 * row]);
    };
    static_assert(2 * kWarpTokens == kTileTokens);
    if (own_tile < count) {
      TileState<kCount> so_far;
      for (int i = 0; i <= own_tile; ++i) {
        float top[2];
        top_of(i, top);
        so_far.raise(top);
      }
#pragma unroll
      for (int n = 0; n < kWarpTokens / 8; ++n)
#pragma unroll
        for (int row = 0; row < 2; ++row)
          memory.weights[g + 8 * row][(warp * kWarpTokens + 8 * n) / 2 + t] =
              so_far.weights(scores[n][2 * row], scores[n][2 * row + 1], row);
    }
#pragma unroll
    for (int i = 0; i < kPageTiles; ++i)
      if (i < count) tiles[i].deliver_values(of(i), memory.values(i));
    Tiles::template wait_for_all_but<0>();
    __syncthreads();  // weights and values are there
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      float top[2];
      top_of(i, top);
      state.raise(top);
      const auto weights = [&](uint32_t (&to)[4], int step) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          to[j] = memory.weights[g + j % 2 * 8][(i * kTileTokens + 16 * step + j / 2 * 8) / 2 + t];
      };
      state.add(weights, Tiles::values(memory.values(i)), 8 * kCount * warp);
    }
  };
  if (own) {
    // The last pair's query sees most.
    const int tokens = pair_of(call, tile, kv_head, tile.pairs - 1).seen;
    attend(four(OpenTiles<kDim>{call, kv_head}), tile.own, tokens);
  } else {
    const void* data = call.pages[tile.first_page + page];
    if (call.closed.form == kPageBF16)
      attend(four(OpenTiles<kDim>{call, kv_head}), data, kPageTokens);
    else if (call.closed.form == kPageInt8)
      attend(four(SealedTiles<kDim, 8>(call, kv_head)), data, kPageTokens);
    else
      attend(four(SealedTiles<kDim, 4>(call, kv_head)), data, kPageTokens);
  }

  const States states(call, blockIdx.z, kv_head);
  for (int row = 0; row < 2; ++row) {
    const int pair = g + 8 * row;
    if (pair >= tile.pairs) continue;
    float* to = states.of(pair, page);
    if (warp == 0 && t == 0) {
      to[0] = state.most[row];
      to[1] = state.total[row];
    }
    for (int n = 0; n < kCount; ++n)
      *reinterpret_cast<float2*>(to + kStateHead + 8 * (kCount * warp + n) + 2 * t) = {
          state.sums[n][2 * row], state.sums[n][2 * row + 1]};
  }
  finish_pages(call, tile, kv_head, page, states, &memory.slot);
}

// --- many pairs: a block for each group of pages -------------------------------------------------

template <int kDim>
struct GroupMemory {
  StagedTile<kDim> tiles[2];
  unsigned char queries[Queries<kDim, kMostPairs[kAttendGroups]>::kBytes];
  TileOfPage pages[kGroupPages];  // the first tile of each
  int32_t whole, own_tiles;       // pages in their closed form; tiles of the queries' own
  int32_t slot;
};

template <int kDim>
__global__ void __launch_bounds__(kTileThreads, 1) attend_groups_kernel(const AttendCall call) {
  after_earlier_kernels();
  const AttentionTile& tile = call.tiles[blockIdx.x];
  const int64_t group = call.first_page / kGroupPages + blockIdx.z, first = group * kGroupPages;
  if (first > tile.before) return;
  const int kv_head = blockIdx.y, first_pair = threadIdx.x / kWarp * kWarpPairs;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  auto& memory = *reinterpret_cast<GroupMemory<kDim>*>(shared_memory());
  const Queries<kDim, kMostPairs[kAttendGroups]> queries{{memory.queries}, first_pair};
  queries.store(queries.load(call, tile, kv_head));
  if (threadIdx.x == 0) {
    const int64_t left = tile.before - first;
    memory.whole = static_cast<int32_t>(left < kGroupPages ? left : kGroupPages);
    memory.own_tiles = 0;
    if (left < kGroupPages) {
      // The last pair's query sees most.
      const int seen = pair_of(call, tile, kv_head, tile.pairs - 1).seen;
      memory.pages[left] = {tile.own, 0, seen};
      memory.own_tiles = tiles_of(seen);
    }
  }
  if (threadIdx.x < kGroupPages && first + threadIdx.x < tile.before)
    memory.pages[threadIdx.x] = {call.pages[tile.first_page + first + threadIdx.x], 0, kPageTokens};
  __syncthreads();
  constexpr int kCount = kDim / 8;
  TileState<kCount> state;
  Merged merged[2];
  float sums[kCount][4] = {};

  const auto attend = [&](auto tiles, int steps, const auto& of) {
    using Tiles = decltype(tiles);
    float scores[kTileTokens / 8][4];
    const auto score_tile = [&](int step, unsigned char* at, const auto& request) {
      const auto left = [&](uint32_t (&to)[4], int of_step) {
        queries(to, of_step);
        request(of_step);
      };
      score<kDim>(scores, left, Tiles::keys(at), 0);
      const TileOfPage from = of(step);
      if (from.page == tile.own) {
        const int seen[2] = {seen_by(call, tile, kv_head, first_pair + g),
                             seen_by(call, tile, kv_head, first_pair + g + 8)};
        hide(scores, seen, from.number * kTileTokens);
      }
    };
    const auto add_values = [&](int step, unsigned char* at) {
      state.add_tile(scores, Tiles::values(at));
      const TileOfPage from = of(step);
      if (from.number + 1 < tiles_of(from.tokens)) return;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const Merged::Factors factors = merged[row].add(state.most[row], state.total[row]);
#pragma unroll
        for (int n = 0; n < kCount; ++n)
#pragma unroll
          for (int i = 2 * row; i < 2 * row + 2; ++i)
            sums[n][i] = factors.merge(sums[n][i], state.sums[n][i]);
      }
      state = {};
    };
    for_each_tile<kDim>(tiles, memory.tiles, steps, of, score_tile, add_values);
    static_assert(kPageTiles % 2 == 0);  // so the next ones may come: they begin where they should
  };
  const auto from_page = [&](int first_page) {
    return [first_page, &memory](int step) {
      TileOfPage of = memory.pages[first_page + step / kPageTiles];
      of.number = step % kPageTiles;
      return of;
    };
  };
  if (call.closed.form == kPageBF16) {
    attend(OpenTiles<kDim>{call, kv_head}, memory.whole * kPageTiles + memory.own_tiles,
           from_page(0));
  } else {
    if (memory.whole > 0) {
      const int steps = memory.whole * kPageTiles;
      if (call.closed.form == kPageInt8)
        attend(SealedTiles<kDim, 8>(call, kv_head), steps, from_page(0));
      else
        attend(SealedTiles<kDim, 4>(call, kv_head), steps, from_page(0));
    }
    if (memory.own_tiles > 0)
      attend(OpenTiles<kDim>{call, kv_head}, memory.own_tiles, from_page(memory.whole));
  }

  const States states(call, blockIdx.x, kv_head);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int pair = first_pair + g + 8 * row;
    if (pair >= tile.pairs) continue;
    float* to = states.of(pair, group);
    if (t == 0) {
      to[0] = merged[row].most;
      to[1] = static_cast<float>(merged[row].total);
    }
#pragma unroll
    for (int n = 0; n < kCount; ++n)
      *reinterpret_cast<float2*>(to + kStateHead + 8 * n + 2 * t) = {sums[n][2 * row],
                                                                     sums[n][2 * row + 1]};
  }
  __syncthreads();
  finish_groups(call, tile, kv_head, states, &memory.slot);
}

unsigned extent(int64_t count) { return static_cast<unsigned>(count); }

template <int kDim>
int launch_for(const AttendCall& call, Stream stream) {
  if (call.kind == kAttendPages)
    return launch(attend_pages_kernel<kDim>,
                  dim3{extent(call.page_count), extent(call.heads.key_value), extent(call.count)},
                  kTileThreads, sizeof(PageMemory<kDim>), stream, call);
  return launch(
      attend_groups_kernel<kDim>,
      dim3{extent(call.count), extent(call.heads.key_value), extent(groups_of(call.page_count))},
      kTileThreads, sizeof(GroupMemory<kDim>), stream, call);
}

}  // namespace

int launch_tensor_attention(const AttendCall& call, Stream stream) {
  return call.heads.dim == 64 ? launch_for<64>(call, stream) : launch_for<128>(call, stream);
}

}  // namespace puna::cuda
