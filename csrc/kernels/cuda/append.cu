// Queries and keys are turned, and keys and values stored in their pages.
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/launches.h"
#include "kernels/cuda/turn.cuh"

namespace puna::cuda {
namespace {

__device__ __forceinline__ void store(int form, void* to, int64_t at, float value) {
  if (form == kPageF32)
    static_cast<float*>(to)[at] = value;
  else
    static_cast<uint16_t*>(to)[at] = static_cast<uint16_t>(bf16_of_float(value));
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

}  // namespace

int launch_append(const AppendCall& call, Stream stream) {
  const dim3 grid{static_cast<unsigned>(call.rows),
                  static_cast<unsigned>(call.heads.query + call.heads.key_value), 1};
  return launch(append_kernel, grid, kWarp, 0, stream, call);
}

}  // namespace puna::cuda
