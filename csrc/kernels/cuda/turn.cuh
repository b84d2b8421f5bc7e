// Rotary embedding and norm of the heads of queries and keys.
#pragma once

#include "kernels/cuda/reduce.cuh"

namespace puna::cuda {

// A warp turns a head, into `to`, which may be where it is: pairs (2 i, 2 i + 1) by an angle, then
// the norm, then `scale`. What a lane has of `to` is its own until the warp has met.
__device__ __forceinline__ void turn(const float* head, float* to, int dim, const float* cos,
                                     const float* sin, bool norm, float eps, float scale) {
  constexpr int kEach = 2;  // pairs of a lane that are on their way together
  const int lane = threadIdx.x % kWarp;
  float squares = 0;
  for (int first = lane; 2 * first < dim; first += kEach * kWarp) {
    float2 x[kEach] = {}, angle[kEach] = {};
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int pair = first + i * kWarp;
      if (2 * pair < dim) x[i].x = head[2 * pair];
      if (2 * pair + 1 < dim) x[i].y = head[2 * pair + 1];
      if (2 * pair < dim && cos != nullptr) angle[i] = {cos[pair], sin[pair]};
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int pair = first + i * kWarp;
      float a = x[i].x, b = x[i].y;
      if (cos != nullptr) {
        a = fmaf(x[i].x, angle[i].x, -(x[i].y * angle[i].y));
        b = fmaf(x[i].x, angle[i].y, x[i].y * angle[i].x);
      }
      squares = fmaf(a, a, fmaf(b, b, squares));
      if (2 * pair < dim) to[2 * pair] = a;
      if (2 * pair + 1 < dim) to[2 * pair + 1] = b;
    }
  }
  float factor = scale;
  if (norm) {
    const float mean = sum_lanes(squares) / static_cast<float>(dim);
    factor = scale / sqrtf(mean + eps);
  }
  for (int pair = lane; 2 * pair < dim; pair += kWarp) {
    to[2 * pair] *= factor;
    if (2 * pair + 1 < dim) to[2 * pair + 1] *= factor;
  }
}

}  // namespace puna::cuda
