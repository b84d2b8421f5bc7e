// Sums and maxima over the lanes of a warp and the threads of a block, in a fixed order; and blocks
// that wait for none, but know which of them comes last.
#pragma once

#include "kernels/cuda/ptx.h"

namespace puna::cuda {

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Largest {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
  __device__ __forceinline__ uint64_t operator()(uint64_t a, uint64_t b) const {
    return a > b ? a : b;
  }
};

// Of `kLanes` neighbouring lanes (a power of two), the same for all of them.
template <class Combine, int kLanes = kWarp, class T>
__device__ __forceinline__ T combine_lanes(T value) {
#pragma unroll
  for (int mask = 1; mask < kLanes; mask *= 2)
    value = Combine()(value, __shfl_xor_sync(kAllLanes, value, mask));
  return value;
}
template <int kLanes = kWarp, class T>
__device__ __forceinline__ T sum_lanes(T value) {
  return combine_lanes<Sum, kLanes>(value);
}
template <int kLanes = kWarp>
__device__ __forceinline__ float max_lanes(float value) {
  return combine_lanes<Largest, kLanes>(value);
}

// Of all threads of the block, the same for all of them; `scratch` is shared memory for a T a warp,
// which no thread may be reading any more.
template <class Combine, int kThreads, class T>
__device__ __forceinline__ T combine_block(T value, T* scratch) {
  value = combine_lanes<Combine>(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  constexpr int kWarps = kThreads / kWarp;  // a power of two
  return combine_lanes<Combine, kWarps>(scratch[threadIdx.x % kWarps]);
}

// Whether all threads of `count` blocks have come here, of which this is the last; `slot` is of
// shared memory.
__device__ __forceinline__ bool is_last(int32_t* arrived, int64_t count, int32_t* slot) {
  __syncthreads();
  if (threadIdx.x == 0) {
    *slot = add_after_writes(arrived) + 1 == count;
    if (*slot) *arrived = 0;
  }
  __syncthreads();
  return *slot != 0;
}

// Of all threads of the blocks of a row (of the grid's x), each block's part going through `parts`:
// true in the row's last block, where `value` then is that of all threads. Else as combine_block()
// and is_last().
template <class Combine, int kThreads, class T>
__device__ __forceinline__ bool combine_row(T& value, T* parts, int32_t* arrived, T* scratch,
                                            int32_t* slot) {
  value = combine_block<Combine, kThreads>(value, scratch);
  if (threadIdx.x == 0) parts[blockIdx.x] = value;
  if (!is_last(arrived, gridDim.x, slot)) return false;
  value = 0;  // of which both combinations make nothing
  for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads)
    value = Combine()(value, load_number_shared_by_blocks(parts + i));
  value = combine_block<Combine, kThreads>(value, scratch);
  return true;
}

}  // namespace puna::cuda
