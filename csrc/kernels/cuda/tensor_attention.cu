// Attention over pages on the tensor cores; a query of tile_products.cuh is a pair of a query and a
// head. A page starts with a fresh state, and its weights refer to the largest score so far.
//
// Two kernels divide this up: for few queries a block takes a run of pages and its warps share the
// pairs; for many a block takes a group of pages and each warp has pairs of its own. A pair goes
// through the same sums in the same order in both, so it has the same bits.
#include "kernels/cuda/append.cuh"
#include "kernels/cuda/launches.h"
#include "kernels/cuda/page_parts.cuh"
#include "kernels/cuda/page_tiles.cuh"

namespace puna::cuda {
namespace {

constexpr int kWarpPairs = 16;

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
  // Of `pairs` pairs, at query(pair).
  template <class Query>
  static __device__ Loaded load(int pairs, const Query& query) {
    Loaded loaded;
#pragma unroll
    for (int i = 0; i < Loaded::kEach; ++i) {
      const int at = i * kTileThreads + threadIdx.x, pair = at / Loaded::kQuads;
      loaded.of[i] = {};
      if (pair < pairs)
        loaded.of[i] = *reinterpret_cast<const uint4*>(query(pair) + at % Loaded::kQuads * 4);
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

// --- few pairs: a block for each run of pages ----------------------------------------------------

// What the time goes into is the arrival of the pages. They come in parts, all keys of a page, then
// its values, through a ring of places that has no end until the run has: the place that has been
// read last is asked for again before the next part is worked on. So but for one all places of a
// block are always on their way, 66 KB for heads of 128, and two blocks share a multiprocessor. For
// 33 KB/us, 4.4 TB/s over 132 multiprocessors, at a latency of 1 us, 33 KB have to be.
//
// Warps share 16 pairs: in the scores each takes some tokens of a part, in the values some
// channels.
template <int kDim>
struct alignas(16) PageMemory {
  static constexpr int kRow = kPageTokens + 8;  // a row's weights are not in the next one's banks
  unsigned char queries[Queries<kDim, kWarpPairs>::kBytes];
  union alignas(16) {
    uint16_t weights[kWarpPairs][kRow];
    float turned[kWarpPairs][kDim];  // heads, before there are weights
  };
  const void* pages[kGroupPages];  // of the run
  int32_t slot;
};
template <int kDim, class Parts>
struct alignas(16) PartRing {
  // That a warp takes for its scores; those of a page are in its registers.
  static constexpr int kWarpTokens = Parts::kTokens / kTileWarps;
  static constexpr int kUnits = kPageTokens / kWarpTokens;
  static constexpr int kTileUnits = kTileTokens / kWarpTokens;
  static constexpr int kPlaces =
      (kMostShared - sizeof(PageMemory<kDim>) - kUnits * kWarpPairs * 4) / Parts::kBytes;

  unsigned char places[kPlaces][Parts::kBytes];
  float most[kUnits][kWarpPairs];

  // The largest score of a tile of the page, of a lane's two rows.
  __device__ void top_of(int tile, float (&top)[2]) const {
    const int g = threadIdx.x % kWarp / 4;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      top[row] = -INFINITY;
#pragma unroll
      for (int i = 0; i < kTileUnits; ++i)
        top[row] = fmaxf(top[row], most[tile * kTileUnits + i][g + 8 * row]);
    }
  }
};
template <int kDim, class Closed>
constexpr size_t run_shared() {
  return sizeof(PageMemory<kDim>) +
         static_cast<size_t>(
             larger(sizeof(PartRing<kDim, Closed>), sizeof(PartRing<kDim, OpenParts<kDim>>)));
}

// Neighbouring columns of a lane, of one row of products: give(first column, values of both).
template <bool kInterleaved, int kCount, class Give>
__device__ __forceinline__ void for_each_pair(const float (&c)[kCount][4], int row,
                                              const Give& give) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (kInterleaved && kCount % 2 == 0) {
      const int of = 2 * row + i % 2;
      give(8 * (i - i % 2) + 4 * t + i % 2 * 2, c[i - i % 2][of], c[i - i % 2 + 1][of]);
    } else {
      give(8 * i + 2 * t, c[i][2 * row], c[i][2 * row + 1]);
    }
  }
}

template <int kDim, class Closed>
__global__ void __launch_bounds__(kTileThreads, 2) attend_pages_kernel(const AttendCall call) {
  after_earlier_kernels();
  const AttentionTile tile = call.tiles[blockIdx.z];
  const int64_t first = call.first_page + static_cast<int64_t>(blockIdx.x) * call.run_pages;
  const int64_t left = tile.before + 1 - first;
  if (left <= 0) return;
  const int count = static_cast<int>(left < call.run_pages ? left : call.run_pages);
  const bool has_own = count == left;
  const int kv_head = blockIdx.y, warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  auto& memory = *reinterpret_cast<PageMemory<kDim>*>(shared_memory());
  const Queries<kDim, kWarpPairs> queries{{memory.queries}, 0};
  const States states(call, blockIdx.z, kv_head);
  if (const int i = threadIdx.x; i < count)
    memory.pages[i] =
        has_own && i + 1 == count ? tile.own : call.pages[tile.first_page + first + i];
  // The row's key and value, which its page may not have yet.
  const AppendCall& append = call.append;
  const bool appends = append.rows > 0;
  const int64_t row = call.queries[tile.query].row;
  if (appends && has_own) {
    const int key = call.heads.query + kv_head;
    if (warp == 1) {
      turn_head(append, row, key, kDim, memory.turned[0]);
      __syncwarp();
      append_key(append, append.to[row], kv_head, kDim, memory.turned[0]);
    }
    if (warp == 2)
      append_value(append, append.to[row], kv_head, kDim,
                   head_of(append, row, key + call.heads.key_value, kDim));
  }
  __syncthreads();
  // While the first parts are on their way.
  const auto store_queries = [&] {
    const int group = call.heads.query / call.heads.key_value;
    for (int pair = warp; appends && pair < tile.pairs; pair += kTileWarps)
      turn_head(append, row, kv_head * group + pair, kDim, memory.turned[pair]);
    if (appends) __syncthreads();
    queries.store(queries.load(tile.pairs, [&](int pair) {
      return appends ? memory.turned[pair] : pair_of(call, tile, kv_head, pair).query;
    }));
  };

  int tokens = kPageTokens, seen[2] = {};  // of the own page
  if (has_own) {
    tokens = pair_of(call, tile, kv_head, tile.pairs - 1).seen;  // the last pair's query sees most
#pragma unroll
    for (int row = 0; row < 2; ++row) seen[row] = seen_by(call, tile, kv_head, g + 8 * row);
  }

  // Pages [begin, end) of the run, of which the last has `tokens`.
  const auto attend = [&](auto parts, int begin, int end, int tokens) {
    using Parts = decltype(parts);
    using Ring = PartRing<kDim, Parts>;
    constexpr int kPageParts = kPageTokens / Parts::kTokens;
    constexpr int kPartTiles = Parts::kTokens / kTileTokens;
    auto& ring = *reinterpret_cast<Ring*>(shared_memory() + sizeof(PageMemory<kDim>));
    const int last_parts = (tokens + Parts::kTokens - 1) / Parts::kTokens;
    // The next part that is asked for; all threads' groups of copies have one each.
    int page_asked = begin, part_asked = 0, place_asked = 0;
    const auto request = [&] {
      if (page_asked < end) {
        const bool last = page_asked + 1 == end;
        const int there = last ? last_parts : kPageParts;
        const bool values = part_asked >= there;
        const PartOfPage of{memory.pages[page_asked], part_asked - (values ? there : 0),
                            last ? tokens : kPageTokens};
        if (values)
          parts.copy_values(of, ring.places[place_asked]);
        else
          parts.copy_keys(of, ring.places[place_asked]);
        if (++part_asked == 2 * there) {
          part_asked = 0;
          ++page_asked;
        }
        place_asked = place_asked + 1 == Ring::kPlaces ? 0 : place_asked + 1;
      }
      commit_copies();
    };
    int place = 0;
    const auto next_part = [&] {
      wait_for_copies<Ring::kPlaces - 2>();
      __syncthreads();  // the part is there, and the one before is not needed any more
      request();
      unsigned char* const part = ring.places[place];
      place = place + 1 == Ring::kPlaces ? 0 : place + 1;
      return part;
    };
#pragma unroll 1
    for (int i = 0; i + 1 < Ring::kPlaces; ++i) request();
    if (begin == 0) store_queries();

    constexpr int kCount = kDim / 8 / kTileWarps;
    constexpr int kWarpTokens = Ring::kWarpTokens;
#pragma unroll 1
    for (int page = begin; page < end; ++page) {
      const int there = page + 1 == end ? last_parts : kPageParts;
      float scores[kPageParts][kWarpTokens / 8][4];
#pragma unroll
      for (int i = 0; i < kPageParts; ++i) {
        if (i >= there) break;
        score<kDim>(scores[i], queries, Parts::keys(next_part()), warp * kWarpTokens);
        if (Parts::kOpen && has_own && page + 1 == count)
          hide(scores[i], seen, i * Parts::kTokens + warp * kWarpTokens);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const float most = largest(scores[i], row);
          if (t == 0) ring.most[i * kTileWarps + warp][g + 8 * row] = most;
        }
      }
      __syncthreads();  // the largest are known
      TileState<kCount> so_far;
      const int own_tile = warp * kWarpTokens / kTileTokens;  // of a part
#pragma unroll
      for (int i = 0; i < kPageParts; ++i) {
        if (i >= there) break;
#pragma unroll 1
        for (int part_tile = 0; part_tile < kPartTiles; ++part_tile) {
          float top[2];
          ring.top_of(i * kPartTiles + part_tile, top);
#pragma unroll
          for (int row = 0; row < 2; ++row) so_far.most[row] = fmaxf(so_far.most[row], top[row]);
          if (part_tile != own_tile) continue;
#pragma unroll
          for (int row = 0; row < 2; ++row) {
            uint16_t* const to =
                memory.weights[g + 8 * row] + i * Parts::kTokens + warp * kWarpTokens;
            for_each_pair<Parts::kInterleaved>(scores[i], row, [&](int token, float a, float b) {
              *reinterpret_cast<uint32_t*>(to + token) = so_far.weights(a, b, row);
            });
          }
        }
      }
      TileState<kCount> state;
#pragma unroll 1
      for (int i = 0; i < there; ++i) {
        unsigned char* const part = next_part();  // and weights are there
#pragma unroll 1
        for (int part_tile = 0; part_tile < kPartTiles; ++part_tile) {
          const int number = i * kPartTiles + part_tile;
          float top[2];
          ring.top_of(number, top);
          state.raise(top);
          uint32_t weights[kTileTokens / 16][4];
#pragma unroll
          for (int step = 0; step < kTileTokens / 16; ++step)
            load_matrices<false>(weights[step], memory.weights[lane % 16] + number * kTileTokens +
                                                    16 * step + lane / 16 * 8);
          state.add(weights, Parts::values(part, part_tile), 8 * kCount * warp);
        }
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int pair = g + 8 * row;
        if (pair >= tile.pairs) continue;
        float* to = states.of(pair, first + page);
        if (warp == 0 && t == 0) {
          to[0] = state.most[row];
          to[1] = state.total[row];
        }
        to += kStateHead + 8 * kCount * warp;
        for_each_pair<Parts::kInterleaved>(state.sums, row, [&](int channel, float a, float b) {
          *reinterpret_cast<float2*>(to + channel) = {a, b};
        });
      }
    }
    wait_for_copies<0>();  // of nothing
  };
  if constexpr (Closed::kOpen) {
    attend(Closed(call, kv_head), 0, count, tokens);
  } else {
    const int closed = has_own ? count - 1 : count;
    if (closed > 0) attend(Closed(call, kv_head), 0, closed, kPageTokens);
    if (has_own) {
      __syncthreads();  // the places of closed pages are not needed any more
      attend(OpenParts<kDim>(call, kv_head), closed, count, tokens);
    }
  }
  finish_pages(call, tile, kv_head, first, states, &memory.slot);
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
  queries.store(
      queries.load(tile.pairs, [&](int pair) { return pair_of(call, tile, kv_head, pair).query; }));
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

template <int kDim, class Closed>
int launch_pages(const AttendCall& call, Stream stream) {
  const int64_t runs = (call.page_count + call.run_pages - 1) / call.run_pages;
  return launch(attend_pages_kernel<kDim, Closed>,
                dim3{extent(runs), extent(call.heads.key_value), extent(call.count)}, kTileThreads,
                run_shared<kDim, Closed>(), stream, call);
}

template <int kDim>
int launch_for(const AttendCall& call, Stream stream) {
  if (call.kind == kAttendPages) {
    if (call.closed.form == kPageInt8)
      return launch_pages<kDim, SealedParts<kDim, 8>>(call, stream);
    if (call.closed.form == kPageInt4)
      return launch_pages<kDim, SealedParts<kDim, 4>>(call, stream);
    return launch_pages<kDim, OpenParts<kDim>>(call, stream);
  }
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
