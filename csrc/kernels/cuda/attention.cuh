// What the kernels of attention share: the pairs of queries and heads that a block works on, and
// the states of pages, which are added up in an order that depends on the number of pages alone.
//
// The state of some tokens, for a pair, is the largest of their scores, the sum of their weights
// 2 ^ (score - largest), and the sum of their values, so weighted; scores are those of softmax
// times log2(e).
#pragma once

#include "kernels/cuda/device_table.h"
#include "kernels/cuda/operand.cuh"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/reduce.cuh"

namespace puna::cuda {

constexpr int kPageTokens = 256, kKeyBlock = 16;  // backend/kv_layout.h
constexpr int kSealedLine = 128, kLineRows = 32;
constexpr float kLog2E = 1.4426950408889634f;

// Kernels for the kinds of attend calls, but for the plain one.
int launch_tensor_attention(const AttendCall& call, Stream stream);

// --- pairs ---------------------------------------------------------------------------------------

struct Pair {
  const float* query;  // [dim]
  float* out;
  int seen;     // tokens of its own page
  int64_t row;  // of out
  int head;
};
__device__ __forceinline__ Pair pair_of(const AttendCall& call, const AttentionTile& tile,
                                        int kv_head, int i) {
  const int group = call.heads.query / call.heads.key_value;
  const int64_t query = tile.query + (tile.first + i) / group;
  const int head = kv_head * group + (tile.first + i) % group;
  const int64_t channel = static_cast<int64_t>(head) * call.heads.dim;
  const AttentionQuery& of = call.queries[query];
  return {call.qkv.data + of.row * call.qkv.stride + channel,
          call.out.data + query * call.out.stride + channel, static_cast<int>(of.seen), query,
          head};
}

// --- states --------------------------------------------------------------------------------------

// States that are added up; of their weighted values, those that a thread has are elsewhere.
struct Merged {
  float most = -INFINITY;
  double total = 0;  // over millions of tokens an fp32 sum would stop growing

  // What the values so far, and those of the new state, are multiplied with.
  struct Factors {
    float old_one, new_one;
    __device__ float merge(float sum, float value) const {
      return fmaf(sum, old_one, value * new_one);
    }
  };
  __device__ Factors add(float state_most, float state_total) {
    const float top = fmaxf(most, state_most);
    const Factors factors{power_of_2(most - top), power_of_2(state_most - top)};
    most = top;
    total = fma(total, static_cast<double>(factors.old_one),
                static_cast<double>(state_total) * static_cast<double>(factors.new_one));
    return factors;
  }
};

// Where the states of a tile's pairs for one KV head are.
struct States {
  float* data;
  int32_t* arrived;
  int64_t each, pair_stride;  // floats

  __device__ States(const AttendCall& call, int64_t tile, int kv_head)
      : each(state_floats(call.heads.dim)),
        pair_stride(parts_of(call.kind, call.most_pages) * each) {
    const int64_t place = tile * call.heads.key_value + kv_head;
    data = call.states + place * call.most_pairs * pair_stride;
    arrived = call.arrived + place * (groups_of(call.most_pages) + 1);
  }
  __device__ float* of(int pair, int64_t part) const {
    return data + pair * pair_stride + part * each;
  }
};

// Adds up the states of parts [first, first + count) for all pairs: a thread takes four channels of
// a pair at a time, and calls give(pair, channel, merged, sums).
template <class Give>
__device__ __forceinline__ void merge_parts(const States& states, int pairs, int dim, int64_t first,
                                            int64_t count, const Give& give) {
  const int quads = (dim + 3) / 4;
  for (int i = threadIdx.x; i < pairs * quads; i += blockDim.x) {
    const int pair = i / quads, channel = i % quads * 4;
    const float* state = states.of(pair, first);
    Merged merged;
    float sums[4] = {};
    // Some at a time are on their way, also of the last ones.
    constexpr int kTogether = 8;
    for (int64_t begin = 0; begin < count; begin += kTogether) {
      const int there = static_cast<int>(count - begin < kTogether ? count - begin : kTogether);
      uint4 heads[kTogether], values[kTogether];
#pragma unroll
      for (int part = 0; part < kTogether; ++part, state += states.each) {
        if (part >= there) continue;
        heads[part] = load_shared_by_blocks(state);
        values[part] = load_shared_by_blocks(state + kStateHead + channel);
      }
#pragma unroll
      for (int part = 0; part < kTogether; ++part) {
        if (part >= there) break;
        const Merged::Factors factors =
            merged.add(__uint_as_float(heads[part].x), __uint_as_float(heads[part].y));
        sums[0] = factors.merge(sums[0], __uint_as_float(values[part].x));
        sums[1] = factors.merge(sums[1], __uint_as_float(values[part].y));
        sums[2] = factors.merge(sums[2], __uint_as_float(values[part].z));
        sums[3] = factors.merge(sums[3], __uint_as_float(values[part].w));
      }
    }
    give(pair, channel, merged, sums);
  }
}

// The states of a tile's groups become its results, in the block that comes last.
__device__ __forceinline__ void finish_groups(const AttendCall& call, const AttentionTile& tile,
                                              int kv_head, const States& states, int32_t* slot) {
  const int64_t groups = groups_of(tile.before + 1);
  const int64_t first = parts_of(call.kind, call.most_pages) - groups_of(call.most_pages);
  if (groups > 1 && !is_last(states.arrived, groups, slot)) return;
  const int dim = call.heads.dim;
  merge_parts(states, tile.pairs, dim, first, groups,
              [&](int pair, int channel, const Merged& merged, const float (&sums)[4]) {
                const Pair of = pair_of(call, tile, kv_head, pair);
                float values[kLaneColumns];
                static_assert(kLaneColumns == 4);
                for (int i = 0; i < 4; ++i) values[i] = sums[i] / static_cast<float>(merged.total);
                for (int i = 0; i < 4 && channel + i < dim; ++i) of.out[channel + i] = values[i];
                // The lanes of a warp have the channels of one pair.
                if (call.operand.data != nullptr)
                  store_operand(call.operand, of.row, of.head, values);
              });
}

// The same from the states of pages, of which a block has written those of a run, `page` among
// them; runs of call.run_pages make up a group.
__device__ __forceinline__ void finish_pages(const AttendCall& call, const AttentionTile& tile,
                                             int kv_head, int64_t page, const States& states,
                                             int32_t* slot) {
  const int64_t group = page / kGroupPages, first = group * kGroupPages;
  const int64_t left = tile.before + 1 - first, count = left < kGroupPages ? left : kGroupPages;
  const int64_t runs = (count + call.run_pages - 1) / call.run_pages;
  if (runs == 1)
    __syncthreads();  // the block reads what its threads wrote
  else if (!is_last(states.arrived + 1 + group, runs, slot))
    return;
  merge_parts(states, tile.pairs, call.heads.dim, first, count,
              [&](int pair, int channel, const Merged& merged, const float (&sums)[4]) {
                float* state = states.of(pair, call.most_pages + group);
                if (channel == 0) {
                  state[0] = merged.most;
                  state[1] = static_cast<float>(merged.total);
                }
                for (int i = 0; i < 4; ++i) state[kStateHead + channel + i] = sums[i];
              });
  __syncthreads();  // for the only group's block, which reads what its threads wrote
  finish_groups(call, tile, kv_head, states, slot);
}

}  // namespace puna::cuda
