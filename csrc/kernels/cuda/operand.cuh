// Writing activations as products want them: what a warp does with a span of columns.
#pragma once

#include "kernels/cuda/launches.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/kernel_table.h"

namespace puna::cuda {

constexpr int kOperandSpan = static_cast<int>(kActivationGroup);
constexpr int kLaneColumns = kOperandSpan / kWarp;  // that a lane takes of a span

__device__ __forceinline__ int8_t quantize(float x, float inverse) {
  // Codes of 0 where there is nothing to scale: NaN has no integer.
  return inverse > 0 ? static_cast<int8_t>(rintf(x * inverse)) : int8_t{0};
}

// A warp quantises kOperandSpan columns, a lane kLaneColumns neighbours of them. kernel_table.h
// (quantize_row) says what results, bit for bit.
__device__ __forceinline__ void quantize_span(const Operand& to, int64_t r, int64_t span,
                                              const float (&x)[kLaneColumns]) {
  float most = 0, poison = 0;
#pragma unroll
  for (const float value : x) {
    most = fmaxf(most, fabsf(value));
    poison += value * 0.0f;  // NaN if the value is not finite
  }
  most = max_lanes(most);
  poison = sum_lanes(poison);
  const bool zeros = most < 0x1p-100f;
  const float inverse = zeros || !(poison == 0) ? 0.0f : 127.0f / most;
  const int lane = threadIdx.x % kWarp;
  const int64_t column = span * kOperandSpan + lane * kLaneColumns;
  uint32_t codes = 0;
  int32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    const int8_t code = quantize(x[i], inverse);
    codes |= static_cast<uint32_t>(static_cast<uint8_t>(code)) << 8 * i;
    sum += code;
  }
  // A group is at least 16 columns.
  int32_t sums = sum_lanes<4>(sum);
  if (to.group > 16) sums += __shfl_xor_sync(kAllLanes, sums, 4);
  if (to.group > 32) sums += __shfl_xor_sync(kAllLanes, sums, 8);
  if (to.group > 64) sums += __shfl_xor_sync(kAllLanes, sums, 16);
  if (column < to.stride) {
    *reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(to.data) + r * to.stride + column) = codes;
    // Groups are 16, 32, 64 or 128 columns; a division would take longer than all else here.
    const int shift = to.group == 16 ? 4 : to.group == 32 ? 5 : to.group == 64 ? 6 : 7;
    if ((column & (to.group - 1)) == 0) to.sums[r * to.groups + (column >> shift)] = sums;
  }
  if (lane == 0) to.scales[r * to.spans + span] = (zeros ? 0.0f : most / 127.0f) + poison;
}

// Columns span * kOperandSpan + lane * kLaneColumns and the next ones of row r, 0 beyond the last.
__device__ __forceinline__ void store_operand(const Operand& to, int64_t r, int64_t span,
                                              const float (&x)[kLaneColumns]) {
  if (to.kind == kOperandInt8) {
    quantize_span(to, r, span, x);
    return;
  }
  static_assert(kLaneColumns == 4);
  const int64_t first = span * kOperandSpan + threadIdx.x % kWarp * kLaneColumns;
  if (to.kind == kOperandBF16) {  // whose rows are a whole number of spans
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(to.data) + r * to.stride + first) = {
        bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3])};
    return;
  }
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i)
    if (first + i < to.stride) static_cast<float*>(to.data)[r * to.stride + first + i] = x[i];
}

}  // namespace puna::cuda
