// Sums and maxima over the lanes of a warp and the threads of a block, in a fixed order; and blocks
// that wait for none, but know which of them comes last.
#pragma once

#include "kernels/cuda/ptx.h"

namespace puna::cuda {

// Of `kLanes` neighbouring lanes (a power of two), the same for all of them.
template <int kLanes = kWarp, class T>
__device__ __forceinline__ T sum_lanes(T value) {
#pragma unroll
  for (int mask = 1; mask < kLanes; mask *= 2) value += __shfl_xor_sync(kAllLanes, value, mask);
  return value;
}
template <int kLanes = kWarp>
__device__ __forceinline__ float max_lanes(float value) {
#pragma unroll
  for (int mask = 1; mask < kLanes; mask *= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, mask));
  return value;
}

// Of all threads of the block; `scratch` is shared memory for a float a warp.
template <int kThreads>
__device__ __forceinline__ float sum_block(float value, float* scratch) {
  value = sum_lanes(value);
  __syncthreads();  // what was read of an earlier sum
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  constexpr int kWarps = kThreads / kWarp;  // a power of two
  return sum_lanes<kWarps>(scratch[threadIdx.x % kWarps]);
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

}  // namespace puna::cuda
