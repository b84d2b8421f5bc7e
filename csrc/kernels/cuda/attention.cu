// Attention over pages, in three steps: rows are turned and their keys and values stored; each page
// is attended to by itself, from a fresh state; the states of the pages are added up in order. What
// is added to what depends on positions alone, so neither the cut of a prompt nor the rows beside
// change a bit.
#include "kernels/cuda/launches.h"
#include "kernels/cuda/reduce.cuh"

namespace puna::cuda {
namespace {

constexpr int kPageTokens = 256, kKeyBlock = 16;  // backend/kv_layout.h
constexpr int kSealedLine = 128, kLineRows = 32;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMostQueries = 8;  // rows of queries that read a page together

// --- turning and storing -------------------------------------------------------------------------

__device__ __forceinline__ void store(int form, void* to, int64_t at, float value) {
  if (form == kPageF32)
    static_cast<float*>(to)[at] = value;
  else
    static_cast<uint16_t*>(to)[at] = static_cast<uint16_t>(bf16_of_float(value));
}

// A warp turns a head, in place: pairs (2 i, 2 i + 1) by an angle, then the norm, then `scale`.
__device__ __forceinline__ void turn(float* head, int dim, const float* cos, const float* sin,
                                     bool norm, float eps, float scale) {
  const int lane = threadIdx.x % kWarp;
  float squares = 0;
  for (int pair = lane; 2 * pair < dim; pair += kWarp) {
    float a = head[2 * pair], b = 2 * pair + 1 < dim ? head[2 * pair + 1] : 0.0f;
    if (cos != nullptr) {
      const float c = cos[pair], s = sin[pair], x = a, y = b;
      a = fmaf(x, c, -(y * s));
      b = fmaf(x, s, y * c);
    }
    squares = fmaf(a, a, fmaf(b, b, squares));
    head[2 * pair] = a;
    if (2 * pair + 1 < dim) head[2 * pair + 1] = b;
  }
  float factor = scale;
  if (norm) {
    const float mean = sum_lanes(squares) / static_cast<float>(dim);
    factor = scale / sqrtf(mean + eps);
  }
  for (int pair = lane; 2 * pair < dim; pair += kWarp) {
    head[2 * pair] *= factor;
    if (2 * pair + 1 < dim) head[2 * pair + 1] *= factor;
  }
}

// A warp for each row and head; heads are those of queries, then of keys (with their values).
__global__ void __launch_bounds__(kWarp) append_kernel(const AppendCall call) {
  after_earlier_kernels();
  const int64_t r = blockIdx.x;
  const int head = blockIdx.y, dim = call.heads.dim, lane = threadIdx.x;
  float* x = call.qkv.data + r * call.qkv.stride + static_cast<int64_t>(head) * dim;
  const float* cos = call.cos != nullptr ? call.cos + r * (dim / 2) : nullptr;
  const float* sin = call.sin != nullptr ? call.sin + r * (dim / 2) : nullptr;
  const bool query = head < call.heads.query;
  float scale = 1;
  if (query) scale = call.temperature != nullptr ? call.temperature[r] * call.scale : call.scale;
  turn(x, dim, cos, sin, call.norm != 0, call.norm_eps, scale);
  if (query) return;
  __syncwarp();
  const float* value = x + static_cast<int64_t>(call.heads.key_value) * dim;
  auto* keys =
      static_cast<char*>(call.to[r].page) + (head - call.heads.query) * call.open.head_bytes;
  char* values = keys + call.open.part_bytes;
  const int64_t token = call.to[r].token;
  for (int c = lane; c < dim; c += kWarp) {
    store(call.open.form, keys, (token / kKeyBlock * dim + c) * kKeyBlock + token % kKeyBlock,
          x[c]);
    store(call.open.form, values, token * dim + c, value[c]);
  }
}

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

// --- a page --------------------------------------------------------------------------------------

// A float for each query, read by two loads.
struct alignas(16) PerQuery {
  float of[kMostQueries];
};

// The shared memory of a block.
struct AttendMemory {
  PerQuery *queries, *scores;        // [dim], [kPageTokens]
  float *key_scales, *value_scales;  // [2][padded], [2][kPageTokens], of sealed pages

  __device__ AttendMemory(int dim, int padded)
      : queries(reinterpret_cast<PerQuery*>(shared_memory())),
        scores(queries + dim),
        key_scales(reinterpret_cast<float*>(scores + kPageTokens)),
        value_scales(key_scales + 2 * padded) {}
};
// `padded` is 0 where pages are not sealed.
constexpr size_t attend_shared(int dim, int padded) {
  return static_cast<size_t>(dim + kPageTokens) * sizeof(PerQuery) +
         (padded > 0 ? 2 * static_cast<size_t>(padded + kPageTokens) * sizeof(float) : 0);
}
__host__ __device__ __forceinline__ int padded_of(const SealedPages& pages) {
  const bool sealed = pages.form == kPageInt8 || pages.form == kPageInt4;
  return sealed ? static_cast<int>(pages.key_scale_bytes / 4) : 0;
}

// Queries at(i, c) of `count`, and nothing for the others.
template <class At>
__device__ __forceinline__ void load_queries(const AttendMemory& memory, int count, int dim,
                                             const At& at) {
  for (int i = threadIdx.x; i < kMostQueries * dim; i += kThreads) {
    const int query = i / dim, c = i % dim;
    memory.queries[c].of[query] = query < count ? at(query, c) : 0.0f;
  }
}

// `count` queries over tokens [0, tokens) of `page`; the state of query i goes to states +
// i * stride: largest score, sum, then dim weighted values.
template <class Page>
__device__ void attend_page(const Page& page, const AttendMemory& memory, int count, int dim,
                            int tokens, float* states, int64_t stride) {
  const auto run_of = [](int left) { return left < kRun ? left : kRun; };
  PerQuery* const scores = memory.scores;
  // A thread takes a token, and the whole of its products.
  for (int t = threadIdx.x; t < tokens; t += kThreads) {
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
  for (int i = threadIdx.x / kWarp; i < count; i += kWarps) {
    float most = -INFINITY, sum = 0;
    for (int t = lane; t < tokens; t += kWarp) most = fmaxf(most, scores[t].of[i]);
    most = max_lanes(most);
    for (int t = lane; t < tokens; t += kWarp)
      sum += scores[t].of[i] = expf(scores[t].of[i] - most);
    sum = sum_lanes(sum);
    if (lane == 0) {
      states[i * stride] = most;
      states[i * stride + 1] = sum;
    }
  }
  __syncthreads();
  // A thread takes a channel.
  for (int c = threadIdx.x; c < dim; c += kThreads) {
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
      if (i < count) states[i * stride + 2 + c] = sums.of[i];
  }
}

// The page as attend_page reads it; its scales, which all threads need, go to shared memory.
template <int kBits>
__device__ __forceinline__ Sealed<kBits> sealed_page(const AttendCall& call, const void* page,
                                                     int head, const AttendMemory& memory) {
  const SealedPages& at = call.closed;
  const auto* bytes = static_cast<const uint8_t*>(page);
  const int padded = padded_of(at);
  const auto widen = [&](float* to, int64_t offset, int count) {
    const auto* from = reinterpret_cast<const uint16_t*>(bytes + offset);
    for (int i = threadIdx.x; i < count; i += kThreads) to[i] = float_of_bf16(from[i]);
  };
  widen(memory.key_scales, at.key_scales + head * at.key_scale_bytes, 2 * padded);
  widen(memory.value_scales, at.value_scales + head * at.value_scale_bytes, 2 * kPageTokens);
  return {bytes + head * at.plane_bytes,
          bytes + at.lower + head * at.plane_bytes,
          bytes + at.values + head * at.code_bytes,
          memory.key_scales,
          memory.value_scales,
          padded};
}

// Some heads of queries that share a KV head, one row, one page.
__global__ void __launch_bounds__(kThreads) attend_kernel(const AttendCall call) {
  after_earlier_kernels();
  const AttentionQuery& query = call.queries[blockIdx.z];
  const int64_t index = blockIdx.x;
  if (index > query.before) return;
  const int dim = call.heads.dim, group = call.heads.query / call.heads.key_value;
  const int slices = (group + kMostQueries - 1) / kMostQueries;
  const int kv_head = blockIdx.y / slices, first = blockIdx.y % slices * kMostQueries;
  const int count = group - first < kMostQueries ? group - first : kMostQueries;
  const int64_t head = static_cast<int64_t>(kv_head) * group + first;
  const AttendMemory memory(dim, padded_of(call.closed));
  const float* row = call.qkv.data + query.row * call.qkv.stride + head * dim;
  load_queries(memory, count, dim, [&](int i, int c) { return row[i * dim + c]; });

  const bool own = index == query.before;
  const void* data = own ? query.own : call.pages[query.first + index];
  const int tokens = own ? query.seen : kPageTokens;
  const int form = own ? call.open.form : call.closed.form;
  const int64_t stride = call.most_pages * (2 + dim);
  float* states = call.states +
                  (static_cast<int64_t>(blockIdx.z) * call.heads.query + head) * stride +
                  index * (2 + dim);
  const auto attend = [&](const auto& page) {
    __syncthreads();
    attend_page(page, memory, count, dim, tokens, states, stride);
  };
  const char* keys = static_cast<const char*>(data) + kv_head * call.open.head_bytes;
  const char* values = keys + call.open.part_bytes;
  if (form == kPageF32)
    attend(Open<float>{reinterpret_cast<const float*>(keys), reinterpret_cast<const float*>(values),
                       dim});
  else if (form == kPageBF16)
    attend(Open<uint16_t>{reinterpret_cast<const uint16_t*>(keys),
                          reinterpret_cast<const uint16_t*>(values), dim});
  else if (form == kPageInt8)
    attend(sealed_page<8>(call, data, kv_head, memory));
  else
    attend(sealed_page<4>(call, data, kv_head, memory));
}

// --- the states of pages -------------------------------------------------------------------------
// They are added up in order, kGroupPages to the state of a group, and groups in order to the
// result: a fixed tree, whose groups have blocks of their own where there are several.

constexpr int64_t kGroupPages = 64;

// A state, as a thread has it: of channel c.
struct State {
  float most, total, sum;
};

// Of `count` states, `step` floats apart.
__device__ __forceinline__ State merge(const float* states, int64_t count, int64_t step, int c) {
  float most = -INFINITY, sum = 0;
  double total = 0;  // over millions of tokens an fp32 sum would stop growing
  for (int64_t i = 0; i < count; ++i) {
    const float* state = states + i * step;
    const float top = fmaxf(most, state[0]);
    const float old_factor = expf(most - top), new_factor = expf(state[0] - top);
    most = top;
    total = fma(total, static_cast<double>(old_factor),
                static_cast<double>(state[1]) * static_cast<double>(new_factor));
    sum = fmaf(sum, old_factor, state[2 + c] * new_factor);
  }
  return {most, static_cast<float>(total), sum};
}

// A group of pages, into the place of its first one.
__global__ void __launch_bounds__(kThreads) merge_group_kernel(const AttendCall call) {
  after_earlier_kernels();
  const int head = blockIdx.x, dim = call.heads.dim;
  const int64_t query = blockIdx.y, first = blockIdx.z * kGroupPages;
  const int64_t left = call.queries[query].before + 1 - first;
  if (left <= 0) return;
  float* states =
      call.states + ((query * call.heads.query + head) * call.most_pages + first) * (2 + dim);
  State merged = {};
  for (int c = threadIdx.x; c < dim; c += kThreads) {
    merged = merge(states, left < kGroupPages ? left : kGroupPages, 2 + dim, c);
    states[2 + c] = merged.sum;
  }
  __syncthreads();  // all have read what the first thread overwrites
  if (threadIdx.x == 0) {
    states[0] = merged.most;
    states[1] = merged.total;
  }
}

// The result of `count` states, `step` floats apart, into out [dim].
__device__ __forceinline__ void finish(float* out, const float* states, int64_t count, int64_t step,
                                       int dim) {
  for (int c = threadIdx.x; c < dim; c += kThreads) {
    const State merged = merge(states, count, step, c);
    out[c] = merged.sum / merged.total;
  }
}

__global__ void __launch_bounds__(kThreads) merge_kernel(const AttendCall call) {
  after_earlier_kernels();
  const int head = blockIdx.x, dim = call.heads.dim;
  const int64_t query = blockIdx.y, pages = call.queries[query].before + 1;
  const bool grouped = call.most_pages > kGroupPages;
  finish(call.out.data + query * call.out.stride + static_cast<int64_t>(head) * dim,
         call.states + (query * call.heads.query + head) * call.most_pages * (2 + dim),
         grouped ? (pages + kGroupPages - 1) / kGroupPages : pages,
         (grouped ? kGroupPages : 1) * (2 + dim), dim);
}

// --- vision --------------------------------------------------------------------------------------

// A warp turns a head of queries (blockIdx.y < heads) or keys.
__global__ void __launch_bounds__(kWarp) turn_vision_kernel(const VisionAttentionCall call) {
  after_earlier_kernels();
  const int64_t r = blockIdx.x, angles = r % call.tokens * (call.dim / 2);
  const bool query = blockIdx.y < static_cast<unsigned>(call.heads);
  float* x = call.qkv.data + r * call.qkv.stride + static_cast<int64_t>(blockIdx.y) * call.dim;
  turn(x, call.dim, call.cos + angles, call.sin + angles, false, 0, query ? call.scale : 1.0f);
}

// kPageTokens keys of a tile, kMostQueries neighbouring queries, one head.
__global__ void __launch_bounds__(kThreads) attend_vision_kernel(const VisionAttentionCall call) {
  after_earlier_kernels();
  const int64_t blocks = (call.tokens + kMostQueries - 1) / kMostQueries;
  const int64_t tile = blockIdx.z / blocks, first = blockIdx.z % blocks * kMostQueries;
  const int64_t left = call.tokens - first;
  const int count = static_cast<int>(left < kMostQueries ? left : kMostQueries);
  const int head = blockIdx.y, dim = call.dim;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kPageTokens;
  const int64_t keys_left = call.tokens - begin;
  const int tokens = static_cast<int>(keys_left < kPageTokens ? keys_left : kPageTokens);
  const AttendMemory memory(dim, 0);
  const auto row = [&](int64_t token, int64_t part) {
    return call.qkv.data + (tile * call.tokens + token) * call.qkv.stride +
           (part * call.heads + head) * dim;
  };
  load_queries(memory, count, dim, [&](int i, int c) { return row(first + i, 0)[c]; });
  __syncthreads();
  const int64_t stride = static_cast<int64_t>(call.heads) * gridDim.x * (2 + dim);
  float* states = call.states + (tile * call.tokens + first) * stride +
                  (static_cast<int64_t>(head) * gridDim.x + blockIdx.x) * (2 + dim);
  attend_page(PlainRows{row(begin, 1), row(begin, 2), call.qkv.stride}, memory, count, dim, tokens,
              states, stride);
}

__global__ void __launch_bounds__(kThreads)
    merge_vision_kernel(const VisionAttentionCall call, int64_t pages) {
  after_earlier_kernels();
  const int head = blockIdx.x;
  const int64_t query = blockIdx.y;
  finish(call.out.data + query * call.out.stride + static_cast<int64_t>(head) * call.dim,
         call.states + (query * call.heads + head) * pages * (2 + call.dim), pages, 2 + call.dim,
         call.dim);
}

unsigned extent(int64_t count) { return static_cast<unsigned>(count); }

}  // namespace

int launch_append(const AppendCall& call, Stream stream) {
  const dim3 grid{extent(call.rows), extent(call.heads.query + call.heads.key_value), 1};
  return launch(append_kernel, grid, kWarp, 0, stream, call);
}

int launch_attend(const AttendCall& call, Stream stream) {
  const int group = call.heads.query / call.heads.key_value;
  const int slices = (group + kMostQueries - 1) / kMostQueries;
  const dim3 grid{extent(call.most_pages), extent(call.heads.key_value * slices),
                  extent(call.count)};
  int error = launch(attend_kernel, grid, kThreads,
                     attend_shared(call.heads.dim, padded_of(call.closed)), stream, call);
  if (error != 0) return error;
  if (call.most_pages > kGroupPages) {
    const int64_t groups = (call.most_pages + kGroupPages - 1) / kGroupPages;
    error = launch(merge_group_kernel,
                   dim3{extent(call.heads.query), extent(call.count), extent(groups)}, kThreads, 0,
                   stream, call);
    if (error != 0) return error;
  }
  return launch(merge_kernel, dim3{extent(call.heads.query), extent(call.count), 1}, kThreads, 0,
                stream, call);
}

int launch_vision_attention(const VisionAttentionCall& call, Stream stream) {
  const int64_t rows = call.tiles * call.tokens;
  const int64_t pages = (call.tokens + kPageTokens - 1) / kPageTokens;
  int error = launch(turn_vision_kernel, dim3{extent(rows), extent(2 * call.heads), 1}, kWarp, 0,
                     stream, call);
  if (error != 0) return error;
  const int64_t blocks = (call.tokens + kMostQueries - 1) / kMostQueries;
  error = launch(attend_vision_kernel,
                 dim3{extent(pages), extent(call.heads), extent(call.tiles * blocks)}, kThreads,
                 attend_shared(call.dim, 0), stream, call);
  if (error != 0) return error;
  return launch(merge_vision_kernel, dim3{extent(call.heads), extent(rows), 1}, kThreads, 0, stream,
                call, pages);
}

}  // namespace puna::cuda
