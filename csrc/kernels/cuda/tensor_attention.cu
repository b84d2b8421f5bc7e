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

__device__ __forceinline__ uint32_t rounded_query(const float* two) {
  const auto x = *reinterpret_cast<const float2*>(two);
  return rounded_bf16_pair(x.x * kLog2E, x.y * kLog2E);
}
// The query of a pair, channels c and c + 1, as bfloat16; zero if the tile has no such pair.
__device__ __forceinline__ uint32_t query_of(const AttendCall& call, const AttentionTile& tile,
                                             int kv_head, int pair, int c) {
  if (pair >= tile.pairs) return 0;
  return rounded_query(pair_of(call, tile, kv_head, pair).query + c);
}
// Tokens of its own page that a pair sees.
__device__ __forceinline__ int seen_by(const AttendCall& call, const AttentionTile& tile,
                                       int kv_head, int pair) {
  return pair < tile.pairs ? pair_of(call, tile, kv_head, pair).seen : kPageTokens;
}

// The queries of all pairs of a tile, for registers are short.
struct QueriesInMemory {
  static constexpr int kPairs = kMostPairs[kAttendGroups];
  Chunks<kPairs, false> chunks;
  int first;  // of the warp's

  __device__ static constexpr int bytes(int dim) { return chunk_bytes(kPairs, dim / 8); }
  // All threads, of all pairs; they have to meet before they read.
  template <int kDim>
  __device__ void store(const AttendCall& call, const AttentionTile& tile, int kv_head) const {
    for (int i = threadIdx.x; i < kPairs * kDim / 2; i += kTileThreads) {
      const int pair = i / (kDim / 2), c = i % (kDim / 2) * 2;
      *reinterpret_cast<uint32_t*>(chunks.at(pair, c / 8) + c % 8 * 2) =
          query_of(call, tile, kv_head, pair, c);
    }
  }
  __device__ void operator()(uint32_t (&to)[4], int step) const {
    const int lane = threadIdx.x % kWarp;
    load_matrices<false>(to, chunks.at(first + lane % 16, 2 * step + lane / 16));
  }
};

// --- few pairs: a block for each page ------------------------------------------------------------

// Warps share 16 pairs: in the scores each takes 8 tokens, in the values some channels.
template <int kDim>
struct PageMemory {
  static constexpr int kRow =
      kTileTokens + 8;  // one row's weights do not share the next one's bank
  unsigned char tiles[2][kTileBytes<kDim>];
  float most[kTileWarps][kWarpPairs];
  uint32_t weights[kWarpPairs][kRow / 2];
  int32_t slot;
};

template <int kDim>
__global__ void __launch_bounds__(kTileThreads, 2) attend_pages_kernel(const AttendCall call) {
  after_earlier_kernels();
  const AttentionTile& tile = call.tiles[blockIdx.z];
  const int64_t page = blockIdx.x;
  if (page > tile.before) return;
  const int kv_head = blockIdx.y, warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  auto& memory = *reinterpret_cast<PageMemory<kDim>*>(shared_memory());
  QueriesInRegisters<kDim> queries;
  int seen[2];
  const auto load_queries = [&] {
    const float* query[2];
    for (int half = 0; half < 2; ++half) {
      const Pair pair = pair_of(call, tile, kv_head, g + 8 * half < tile.pairs ? g + 8 * half : 0);
      query[half] = g + 8 * half < tile.pairs ? pair.query : nullptr;
      seen[half] = g + 8 * half < tile.pairs ? pair.seen : kPageTokens;
    }
    queries.load([&](int half, int c) {
      return query[half] != nullptr ? rounded_query(query[half] + c) : 0;
    });
  };
  const bool own = page == tile.before;
  constexpr int kCount = kDim / 8 / kTileWarps;
  TileState<kCount> state;

  const auto attend = [&](auto tiles, const void* data, int tokens) {
    using Tiles = decltype(tiles);
    const auto of = [&](int step) { return TileOfPage{data, step, tokens}; };
    const auto scores = [&](int step, unsigned char* at) {
      float scores[1][4];
      score<kDim>(scores, queries, Tiles::keys(at), 8 * warp);
      if (own) hide(scores, seen, step * kTileTokens + 8 * warp);
      for (int row = 0; row < 2; ++row) {
        const float most = largest(scores, row);
        if (t == 0) memory.most[warp][g + 8 * row] = most;
      }
      __syncthreads();
      float top[2] = {-INFINITY, -INFINITY};
      for (int row = 0; row < 2; ++row)
        for (int w = 0; w < kTileWarps; ++w)
          top[row] = fmaxf(top[row], memory.most[w][g + 8 * row]);
      state.raise(top);
      for (int row = 0; row < 2; ++row)
        memory.weights[g + 8 * row][4 * warp + t] =
            state.weights(scores[0][2 * row], scores[0][2 * row + 1], row);
      __syncthreads();
    };
    const auto values = [&](int, unsigned char* at) {
      const auto weights = [&](uint32_t (&to)[4], int step) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          to[i] = memory.weights[g + i % 2 * 8][(16 * step + i / 2 * 8) / 2 + t];
      };
      state.add(weights, Tiles::values(at), 8 * kCount * warp);
    };
    for_each_tile<kDim>(tiles, memory.tiles, tiles_of(tokens), of, load_queries, scores, values);
  };
  if (own) {
    // The last pair's query sees most.
    attend(OpenTiles<kDim>{call, kv_head}, tile.own,
           pair_of(call, tile, kv_head, tile.pairs - 1).seen);
  } else {
    const void* data = call.pages[tile.first_page + page];
    if (call.closed.form == kPageBF16)
      attend(OpenTiles<kDim>{call, kv_head}, data, kPageTokens);
    else if (call.closed.form == kPageInt8)
      attend(SealedTiles<kDim, 8>{call, kv_head}, data, kPageTokens);
    else
      attend(SealedTiles<kDim, 4>{call, kv_head}, data, kPageTokens);
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
  unsigned char tiles[2][kTileBytes<kDim>];
  unsigned char queries[QueriesInMemory::bytes(kDim)];
  TileOfPage pages[kGroupPages];  // the first tile of each
  int32_t whole, own_tiles;       // pages in their closed form; tiles of the queries' own
  int32_t slot;
};

template <int kDim>
__global__ void __launch_bounds__(kTileThreads, 1) attend_groups_kernel(const AttendCall call) {
  after_earlier_kernels();
  const AttentionTile& tile = call.tiles[blockIdx.x];
  const int64_t group = blockIdx.z, first = group * kGroupPages;
  if (first > tile.before) return;
  const int kv_head = blockIdx.y, first_pair = threadIdx.x / kWarp * kWarpPairs;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  auto& memory = *reinterpret_cast<GroupMemory<kDim>*>(shared_memory());
  const QueriesInMemory queries{{memory.queries}, first_pair};
  queries.store<kDim>(call, tile, kv_head);
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
    const auto score_tile = [&](int step, unsigned char* at) {
      score<kDim>(scores, queries, Tiles::keys(at), 0);
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
    for_each_tile<kDim>(tiles, memory.tiles, steps, of, [] {}, score_tile, add_values);
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
        attend(SealedTiles<kDim, 8>{call, kv_head}, steps, from_page(0));
      else
        attend(SealedTiles<kDim, 4>{call, kv_head}, steps, from_page(0));
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
                  dim3{extent(call.most_pages), extent(call.heads.key_value), extent(call.count)},
                  kTileThreads, sizeof(PageMemory<kDim>), stream, call);
  return launch(
      attend_groups_kernel<kDim>,
      dim3{extent(call.count), extent(call.heads.key_value), extent(groups_of(call.most_pages))},
      kTileThreads, sizeof(GroupMemory<kDim>), stream, call);
}

}  // namespace

int launch_tensor_attention(const AttendCall& call, Stream stream) {
  return call.heads.dim == 64 ? launch_for<64>(call, stream) : launch_for<128>(call, stream);
}

}  // namespace puna::cuda
