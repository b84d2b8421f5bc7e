// What warps do with the heads of a row before attention: in a kernel of its own (append.cu), or in
// that of attention, if each row has a tile.
#pragma once

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/turn.cuh"

namespace puna::cuda {

// The head of qkv, of `dim` channels: those of queries, of keys, of values.
__device__ __forceinline__ float* head_of(const AppendCall& call, int64_t r, int head, int dim) {
  return call.qkv.data + r * call.qkv.stride + static_cast<int64_t>(head) * dim;
}

// A head of queries or keys is turned, into `to`.
__device__ __forceinline__ void turn_head(const AppendCall& call, int64_t r, int head, int dim,
                                          float* to) {
  const float* cos = call.cos != nullptr ? call.cos + r * (dim / 2) : nullptr;
  const float* sin = call.sin != nullptr ? call.sin + r * (dim / 2) : nullptr;
  float scale = 1;
  if (head < call.heads.query)
    scale = call.temperature != nullptr ? call.temperature[r] * call.scale : call.scale;
  turn(head_of(call, r, head, dim), to, dim, cos, sin, call.norm != 0, call.norm_eps, scale);
}

__device__ __forceinline__ void store_element(int form, void* to, int64_t at, float value) {
  if (form == kPageF32)
    static_cast<float*>(to)[at] = value;
  else
    static_cast<uint16_t*>(to)[at] = static_cast<uint16_t>(bf16_of_float(value));
}
// A KV head's key, which is turned and there for all lanes, goes to its page.
__device__ __forceinline__ void append_key(const AppendCall& call, const AppendedRow& to,
                                           int kv_head, int dim, const float* key) {
  char* const keys = static_cast<char*>(to.page) + kv_head * call.open.head_bytes;
  for (int c = threadIdx.x % kWarp; c < dim; c += kWarp)
    store_element(call.open.form, keys,
                  (to.token / kKeyBlock * dim + c) * kKeyBlock + to.token % kKeyBlock, key[c]);
}
__device__ __forceinline__ void append_value(const AppendCall& call, const AppendedRow& to,
                                             int kv_head, int dim, const float* value) {
  char* const values =
      static_cast<char*>(to.page) + kv_head * call.open.head_bytes + call.open.part_bytes;
  for (int c = threadIdx.x % kWarp; c < dim; c += kWarp)
    store_element(call.open.form, values, to.token * dim + c, value[c]);
}

}  // namespace puna::cuda
