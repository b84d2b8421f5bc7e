// Queries and keys are turned, and keys and values stored in their pages.
#include "kernels/cuda/append.cuh"
#include "kernels/cuda/launches.h"

namespace puna::cuda {
namespace {

// A warp for each row and head; heads are those of queries, then of keys (with their values).
__global__ void __launch_bounds__(kWarp) append_kernel(const AppendCall call) {
  after_earlier_kernels();
  const int64_t r = blockIdx.x;
  const int head = blockIdx.y, dim = call.heads.dim;
  const int kv_head = head - call.heads.query;
  const AppendedRow to = call.to[r];
  float* x = head_of(call, r, head, dim);
  turn_head(call, r, head, dim, x);
  if (kv_head < 0) return;
  __syncwarp();
  append_key(call, to, kv_head, dim, x);
  append_value(call, to, kv_head, dim, head_of(call, r, head + call.heads.key_value, dim));
}

}  // namespace

int launch_append(const AppendCall& call, Stream stream) {
  const dim3 grid{static_cast<unsigned>(call.rows),
                  static_cast<unsigned>(call.heads.query + call.heads.key_value), 1};
  return launch(append_kernel, grid, kWarp, 0, stream, call);
}

}  // namespace puna::cuda
