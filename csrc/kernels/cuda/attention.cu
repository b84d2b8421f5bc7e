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
// key(t, c) and value(t, c): of one head, at token t of the page.

struct OpenF32 {
  const float *keys, *values;
  int dim;
  __device__ float key(int t, int c) const {
    return keys[(t / kKeyBlock * dim + c) * kKeyBlock + t % kKeyBlock];
  }
  __device__ float value(int t, int c) const { return values[t * dim + c]; }
};

struct OpenBF16 {
  const uint16_t *keys, *values;
  int dim;
  __device__ float key(int t, int c) const {
    return float_of_bf16(keys[(t / kKeyBlock * dim + c) * kKeyBlock + t % kKeyBlock]);
  }
  __device__ float value(int t, int c) const { return float_of_bf16(values[t * dim + c]); }
};

// zero + scale * code, of a channel for keys and of a token for values.
template <int kBits>
struct Sealed {
  const uint8_t *upper, *lower, *values;
  const uint16_t *key_scales, *value_scales;
  int padded;  // channels of a line

  __device__ float key(int t, int c) const {
    const int line = t / kLineRows * (padded / 8) + c / 8;
    const int at = line * kSealedLine + t % kLineRows * 4 + c % 4, shift = c / 4 % 2 * 4;
    int code = upper[at] >> shift & 15;
    if constexpr (kBits == 8) code = code << 4 | (lower[at] >> shift & 15);
    return fmaf(float_of_bf16(key_scales[c]), static_cast<float>(code),
                float_of_bf16(key_scales[padded + c]));
  }
  __device__ float value(int t, int c) const {
    constexpr int kTokens = 4 * (8 / kBits);  // of a line
    const int line = c / kLineRows * (kPageTokens / kTokens) + t / kTokens;
    const int at = line * kSealedLine + c % kLineRows * 4 + t % 4, shift = t % kTokens / 4 * 4;
    const int code = values[at] >> shift & ((1 << kBits) - 1);
    return fmaf(float_of_bf16(value_scales[t]), static_cast<float>(code),
                float_of_bf16(value_scales[kPageTokens + t]));
  }
};

// Rows of a matrix that hold keys and values as they are.
struct PlainRows {
  const float *keys, *values;
  int64_t stride;
  __device__ float key(int t, int c) const { return keys[t * stride + c]; }
  __device__ float value(int t, int c) const { return values[t * stride + c]; }
};

// --- a page --------------------------------------------------------------------------------------

// Shared memory of a block: queries [kMostQueries][dim], scores [kMostQueries][kPageTokens].
constexpr size_t attend_shared(int dim) {
  return kMostQueries * static_cast<size_t>(dim + kPageTokens) * sizeof(float);
}

// Up to kMostQueries queries, [dim] each in `queries`, over tokens [0, tokens) of `page`; the state
// of query i goes to states + i * stride: largest score, sum, then dim weighted values.
template <class Page>
__device__ void attend_page(const Page& page, const float* queries, float* scores, int count,
                            int dim, int tokens, float* states, int64_t stride) {
  // A thread takes a token, and the whole of its products.
  for (int t = threadIdx.x; t < tokens; t += kThreads) {
    float sums[kMostQueries] = {};
    for (int c = 0; c < dim; ++c) {
      const float key = page.key(t, c);
#pragma unroll
      for (int i = 0; i < kMostQueries; ++i)
        if (i < count) sums[i] = fmaf(queries[i * dim + c], key, sums[i]);
    }
#pragma unroll
    for (int i = 0; i < kMostQueries; ++i)
      if (i < count) scores[i * kPageTokens + t] = sums[i];
  }
  __syncthreads();
  // A warp takes a query.
  const int lane = threadIdx.x % kWarp;
  for (int i = threadIdx.x / kWarp; i < count; i += kWarps) {
    float* of = scores + i * kPageTokens;
    float most = -INFINITY, sum = 0;
    for (int t = lane; t < tokens; t += kWarp) most = fmaxf(most, of[t]);
    most = max_lanes(most);
    for (int t = lane; t < tokens; t += kWarp) sum += of[t] = expf(of[t] - most);
    sum = sum_lanes(sum);
    if (lane == 0) {
      states[i * stride] = most;
      states[i * stride + 1] = sum;
    }
  }
  __syncthreads();
  // A thread takes a channel.
  for (int c = threadIdx.x; c < dim; c += kThreads) {
    float sums[kMostQueries] = {};
    for (int t = 0; t < tokens; ++t) {
      const float value = page.value(t, c);
#pragma unroll
      for (int i = 0; i < kMostQueries; ++i)
        if (i < count) sums[i] = fmaf(scores[i * kPageTokens + t], value, sums[i]);
    }
#pragma unroll
    for (int i = 0; i < kMostQueries; ++i)
      if (i < count) states[i * stride + 2 + c] = sums[i];
  }
}

template <int kBits>
__device__ __forceinline__ Sealed<kBits> sealed_page(const AttendCall& call, const void* page,
                                                     int head) {
  const SealedPages& at = call.closed;
  const auto* bytes = static_cast<const uint8_t*>(page);
  const auto scales = [&](int64_t offset) {
    return reinterpret_cast<const uint16_t*>(bytes + offset);
  };
  return {bytes + head * at.plane_bytes,
          bytes + at.lower + head * at.plane_bytes,
          bytes + at.values + head * at.code_bytes,
          scales(at.key_scales + head * at.key_scale_bytes),
          scales(at.value_scales + head * at.value_scale_bytes),
          static_cast<int>(at.key_scale_bytes / 4)};
}

// Some heads of queries that share a KV head, one row, one page.
__global__ void __launch_bounds__(kThreads) attend_kernel(const AttendCall call) {
  const AttentionQuery& query = call.queries[blockIdx.z];
  const int64_t index = blockIdx.x;
  if (index > query.before) return;
  const int dim = call.heads.dim, group = call.heads.query / call.heads.key_value;
  const int slices = (group + kMostQueries - 1) / kMostQueries;
  const int kv_head = blockIdx.y / slices, first = blockIdx.y % slices * kMostQueries;
  const int count = group - first < kMostQueries ? group - first : kMostQueries;
  const int64_t head = static_cast<int64_t>(kv_head) * group + first;
  auto* queries = reinterpret_cast<float*>(shared_memory());
  float* scores = queries + kMostQueries * dim;
  const float* row = call.qkv.data + query.row * call.qkv.stride + head * dim;
  for (int i = threadIdx.x; i < count * dim; i += kThreads) queries[i] = row[i];
  __syncthreads();

  const bool own = index == query.before;
  const void* data = own ? query.own : call.pages[query.first + index];
  const int tokens = own ? query.seen : kPageTokens;
  const int form = own ? call.open.form : call.closed.form;
  const int64_t stride = call.most_pages * (2 + dim);
  float* states = call.states +
                  (static_cast<int64_t>(blockIdx.z) * call.heads.query + head) * stride +
                  index * (2 + dim);
  const auto attend = [&](const auto& page) {
    attend_page(page, queries, scores, count, dim, tokens, states, stride);
  };
  const char* keys = static_cast<const char*>(data) + kv_head * call.open.head_bytes;
  const char* values = keys + call.open.part_bytes;
  if (form == kPageF32)
    attend(
        OpenF32{reinterpret_cast<const float*>(keys), reinterpret_cast<const float*>(values), dim});
  else if (form == kPageBF16)
    attend(OpenBF16{reinterpret_cast<const uint16_t*>(keys),
                    reinterpret_cast<const uint16_t*>(values), dim});
  else if (form == kPageInt8)
    attend(sealed_page<8>(call, data, kv_head));
  else
    attend(sealed_page<4>(call, data, kv_head));
}

// The states of `pages` pages of a query, in order, into out [dim].
__device__ void merge(float* out, const float* states, int64_t pages, int dim) {
  for (int c = threadIdx.x; c < dim; c += kThreads) {
    float most = -INFINITY, sum = 0;
    double total = 0;  // over millions of tokens an fp32 sum would stop growing
    for (int64_t page = 0; page < pages; ++page) {
      const float* state = states + page * (2 + dim);
      const float top = fmaxf(most, state[0]);
      const float old_factor = expf(most - top), new_factor = expf(state[0] - top);
      most = top;
      total = fma(total, static_cast<double>(old_factor),
                  static_cast<double>(state[1]) * static_cast<double>(new_factor));
      sum = fmaf(sum, old_factor, state[2 + c] * new_factor);
    }
    out[c] = static_cast<float>(static_cast<double>(sum) / total);
  }
}

__global__ void __launch_bounds__(kThreads) merge_kernel(const AttendCall call) {
  const int head = blockIdx.x, dim = call.heads.dim;
  const int64_t query = blockIdx.y;
  merge(call.out.data + query * call.out.stride + static_cast<int64_t>(head) * dim,
        call.states + (query * call.heads.query + head) * call.most_pages * (2 + dim),
        call.queries[query].before + 1, dim);
}

// --- vision --------------------------------------------------------------------------------------

// A warp turns a head of queries (blockIdx.y < heads) or keys.
__global__ void __launch_bounds__(kWarp) turn_vision_kernel(const VisionAttentionCall call) {
  const int64_t r = blockIdx.x, angles = r % call.tokens * (call.dim / 2);
  const bool query = blockIdx.y < static_cast<unsigned>(call.heads);
  float* x = call.qkv.data + r * call.qkv.stride + static_cast<int64_t>(blockIdx.y) * call.dim;
  turn(x, call.dim, call.cos + angles, call.sin + angles, false, 0, query ? call.scale : 1.0f);
}

// kPageTokens keys of a tile, kMostQueries neighbouring queries, one head.
__global__ void __launch_bounds__(kThreads) attend_vision_kernel(const VisionAttentionCall call) {
  const int64_t blocks = (call.tokens + kMostQueries - 1) / kMostQueries;
  const int64_t tile = blockIdx.z / blocks, first = blockIdx.z % blocks * kMostQueries;
  const int64_t left = call.tokens - first;
  const int count = static_cast<int>(left < kMostQueries ? left : kMostQueries);
  const int head = blockIdx.y, dim = call.dim;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kPageTokens;
  const int64_t keys_left = call.tokens - begin;
  const int tokens = static_cast<int>(keys_left < kPageTokens ? keys_left : kPageTokens);
  auto* queries = reinterpret_cast<float*>(shared_memory());
  float* scores = queries + kMostQueries * dim;
  const auto row = [&](int64_t token, int64_t part) {
    return call.qkv.data + (tile * call.tokens + token) * call.qkv.stride +
           (part * call.heads + head) * dim;
  };
  for (int i = threadIdx.x; i < count * dim; i += kThreads)
    queries[i] = row(first + i / dim, 0)[i % dim];
  __syncthreads();
  const int64_t stride = static_cast<int64_t>(call.heads) * gridDim.x * (2 + dim);
  float* states = call.states + (tile * call.tokens + first) * stride +
                  (static_cast<int64_t>(head) * gridDim.x + blockIdx.x) * (2 + dim);
  attend_page(PlainRows{row(begin, 1), row(begin, 2), call.qkv.stride}, queries, scores, count, dim,
              tokens, states, stride);
}

__global__ void __launch_bounds__(kThreads)
    merge_vision_kernel(const VisionAttentionCall call, int64_t pages) {
  const int head = blockIdx.x;
  const int64_t query = blockIdx.y;
  merge(call.out.data + query * call.out.stride + static_cast<int64_t>(head) * call.dim,
        call.states + (query * call.heads + head) * pages * (2 + call.dim), pages, call.dim);
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
  const int error =
      launch(attend_kernel, grid, kThreads, attend_shared(call.heads.dim), stream, call);
  if (error != 0) return error;
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
                 attend_shared(call.dim), stream, call);
  if (error != 0) return error;
  return launch(merge_vision_kernel, dim3{extent(call.heads), extent(rows), 1}, kThreads, 0, stream,
                call, pages);
}

}  // namespace puna::cuda
