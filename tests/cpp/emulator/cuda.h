// The part of CUDA's own language and headers that the kernels use, for the emulator; included
// where nvcc would include its own. Instructions beyond it are in kernels/cuda/ptx.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/half.h"
#include "emulator/machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

using dim3 = emulator::Extent;
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

#define threadIdx (emulator::Machine::instance().thread_index())
#define blockIdx (emulator::Machine::instance().block_index)
#define blockDim (emulator::Machine::instance().block_extent)
#define gridDim (emulator::Machine::instance().grid_extent)

inline void __syncthreads() { emulator::Machine::instance().sync_block(); }
inline void __syncwarp() {
  emulator::Machine::instance().with_warp<int, int>("__syncwarp", 0,
                                                    [](const auto&, auto& out) { out = {}; });
}
template <class T>
T __shfl_xor_sync(uint32_t, T value, int mask) {
  return emulator::Machine::instance().with_warp<T, T>(
      "__shfl_xor_sync", value, [&](const auto& in, auto& out) {
        for (int lane = 0; lane < emulator::kWarpLanes; ++lane) out[lane] = in[lane ^ mask];
      });
}

inline float __uint_as_float(uint32_t bits) { return puna::float_of_bits(bits); }
inline uint32_t __float_as_uint(float value) { return puna::bits_of_float(value); }
// Byte i of the result is the byte of (y, x) that nibble i of the selector numbers.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return result;
}
