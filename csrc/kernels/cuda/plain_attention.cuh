// Attention of a few queries over up to a page of keys and values, in fp32.
#pragma once

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/reduce.cuh"

namespace puna::cuda {

constexpr int kPlainThreads = 128;
constexpr int kPlainWarps = kPlainThreads / kWarp;
constexpr int kMostQueries = kMostPairs[kAttendPlain];  // that read a page together

// --- keys and values in their forms --------------------------------------------------------------
// Of one head: keys(t, c, count) are channels c, c + 1, ... of token t, values(t, c, count) tokens
// t, t + 1, ... of channel c; `count` of them exist, at most kRun. They begin at a multiple of
// kRun.

constexpr int kRun = 8;
struct Run {
  float at[kRun];
};

__device__ __forceinline__ float as_float(float value) { return value; }
__device__ __forceinline__ float as_float(uint16_t value) { return float_of_bf16(value); }

template <class T>
struct Open {
  const T *key, *value;
  int dim;

  __device__ Run keys(int t, int c, int count) const {
    const T* from = key + (t / kKeyBlock * dim + c) * kKeyBlock + t % kKeyBlock;
    Run run;
#pragma unroll
    for (int i = 0; i < kRun; ++i) run.at[i] = i < count ? as_float(from[i * kKeyBlock]) : 0.0f;
    return run;
  }
  __device__ Run values(int t, int c, int count) const {
    const T* from = value + t * dim + c;
    Run run;
#pragma unroll
    for (int i = 0; i < kRun; ++i) run.at[i] = i < count ? as_float(from[i * dim]) : 0.0f;
    return run;
  }
};

// zero + scale * code, of a channel for keys and of a token for values. A run's codes are the
// bytes, or their halves, of a word or two.
template <int kBits>
struct Sealed {
  const uint8_t *upper, *lower, *codes;
  const float *key_scales, *value_scales;  // in shared memory, with the zero points behind
  int padded;                              // channels of a line

  __device__ static uint32_t word(const uint8_t* at) {
    return *reinterpret_cast<const uint32_t*>(at);
  }
  // Half `i / 4` of byte i % 4.
  __device__ static uint32_t half(uint32_t word, int i) {
    return word >> (i % 4 * 8 + i / 4 * 4) & 15u;
  }

  __device__ Run keys(int t, int c, int) const {
    const int line = t / kLineRows * (padded / kRun) + c / kRun;
    const int at = line * kSealedLine + t % kLineRows * 4;
    const uint32_t high = word(upper + at), low = kBits == 8 ? word(lower + at) : 0;
    Run run;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const uint32_t code = kBits == 8 ? half(high, i) << 4 | half(low, i) : half(high, i);
      run.at[i] = fmaf(key_scales[c + i], static_cast<float>(code), key_scales[padded + c + i]);
    }
    return run;
  }
  __device__ Run values(int t, int c, int) const {
    constexpr int kTokens = 4 * (8 / kBits);  // of a line
    const int line = c / kLineRows * (kPageTokens / kTokens) + t / kTokens;
    const uint8_t* at = codes + line * kSealedLine + c % kLineRows * 4;
    const uint32_t first = word(at), second = kBits == 8 ? word(at + kSealedLine) : 0;
    Run run;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const uint32_t code =
          kBits == 8 ? (i < 4 ? first : second) >> i % 4 * 8 & 255u : half(first, i);
      run.at[i] =
          fmaf(value_scales[t + i], static_cast<float>(code), value_scales[kPageTokens + t + i]);
    }
    return run;
  }
};

// --- a page --------------------------------------------------------------------------------------

// A float for each query, read by two loads.
struct alignas(16) PerQuery {
  float of[kMostQueries];
};

// The shared memory of a block.
struct PlainMemory {
  PerQuery *queries, *scores;  // [dim], [kPageTokens]
  int32_t* slot;
  float *key_scales, *value_scales;  // [2][padded], [2][kPageTokens], of sealed pages

  __device__ PlainMemory(int dim, int padded)
      : queries(reinterpret_cast<PerQuery*>(shared_memory())),
        scores(queries + dim),
        slot(reinterpret_cast<int32_t*>(scores + kPageTokens)),
        key_scales(reinterpret_cast<float*>(slot + 1)),
        value_scales(key_scales + 2 * padded) {}
};
// `padded` is 0 where pages are not sealed.
constexpr size_t plain_shared(int dim, int padded) {
  return static_cast<size_t>(dim + kPageTokens) * sizeof(PerQuery) + sizeof(int32_t) +
         (padded > 0 ? 2 * static_cast<size_t>(padded + kPageTokens) * sizeof(float) : 0);
}
__host__ __device__ __forceinline__ int padded_of(const SealedPages& pages) {
  const bool sealed = pages.form == kPageInt8 || pages.form == kPageInt4;
  return sealed ? static_cast<int>(pages.key_scale_bytes / 4) : 0;
}

// Queries at(i, c) of `count`, and nothing for the others.
template <class At>
__device__ __forceinline__ void load_queries(const PlainMemory& memory, int count, int dim,
                                             const At& at) {
  for (int i = threadIdx.x; i < kMostQueries * dim; i += kPlainThreads) {
    const int query = i / dim, c = i % dim;
    memory.queries[c].of[query] = query < count ? at(query, c) : 0.0f;
  }
}

// `count` queries over tokens [0, tokens) of `page`; the state of query i goes to states +
// i * stride.
template <class Page>
__device__ __forceinline__ void attend_page(const Page& page, const PlainMemory& memory, int count,
                                            int dim, int tokens, float* states, int64_t stride) {
  const auto run_of = [](int left) { return left < kRun ? left : kRun; };
  PerQuery* const scores = memory.scores;
  // A thread takes a token, and the whole of its products.
  for (int t = threadIdx.x; t < tokens; t += kPlainThreads) {
    PerQuery sums = {};
    for (int c = 0; c < dim; c += kRun) {
      const int there = run_of(dim - c);
      const Run keys = page.keys(t, c, there);
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        if (j >= there) break;
        const PerQuery query = memory.queries[c + j];
#pragma unroll
        for (int i = 0; i < kMostQueries; ++i)
          sums.of[i] = fmaf(query.of[i], keys.at[j], sums.of[i]);
      }
    }
    scores[t] = sums;
  }
  __syncthreads();
  // A warp takes a query.
  const int lane = threadIdx.x % kWarp;
  for (int i = threadIdx.x / kWarp; i < count; i += kPlainWarps) {
    float most = -INFINITY, sum = 0;
    for (int t = lane; t < tokens; t += kWarp) most = fmaxf(most, scores[t].of[i]);
    most = max_lanes(most);
    for (int t = lane; t < tokens; t += kWarp)
      sum += scores[t].of[i] = power_of_2(scores[t].of[i] - most);
    sum = sum_lanes(sum);
    if (lane == 0) {
      states[i * stride] = most;
      states[i * stride + 1] = sum;
    }
  }
  __syncthreads();
  // A thread takes a channel.
  for (int c = threadIdx.x; c < dim; c += kPlainThreads) {
    PerQuery sums = {};
    for (int t = 0; t < tokens; t += kRun) {
      const int there = run_of(tokens - t);
      const Run values = page.values(t, c, there);
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        if (j >= there) break;
        const PerQuery weight = scores[t + j];
#pragma unroll
        for (int i = 0; i < kMostQueries; ++i)
          sums.of[i] = fmaf(weight.of[i], values.at[j], sums.of[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kMostQueries; ++i)
      if (i < count) states[i * stride + kStateHead + c] = sums.of[i];
  }
}

}  // namespace puna::cuda
