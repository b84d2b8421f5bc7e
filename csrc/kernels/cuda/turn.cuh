// Rotary embedding and norm of the heads of queries and keys.
#pragma once

#include "kernels/cuda/reduce.cuh"

namespace puna::cuda {

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

}  // namespace puna::cuda
