// Which expert gets which rows: a counting sort by one block, so that nothing of it waits for the
// host.
#include "kernels/cuda/launches.h"

namespace puna::cuda {
namespace {

constexpr int kThreads = 256;

// Whether logit `a` goes before `b`. Equal ones keep their order; NaN comes last.
__device__ __forceinline__ bool before(float a, float b) { return a > b || (b != b && a == a); }

// The top_k of a row, by ascending index, into `best`.
__device__ void choose(const float* logits, int experts, int top_k, int32_t* best) {
  int count = 0;
  for (int e = 0; e < experts; ++e) {  // descending by logit, by insertion
    int place = count;
    while (place > 0 && before(logits[e], logits[best[place - 1]])) --place;
    if (place == top_k) continue;
    count = count < top_k ? count + 1 : top_k;
    for (int i = count - 1; i > place; --i) best[i] = best[i - 1];
    best[place] = e;
  }
  for (int i = 1; i < top_k; ++i)
    for (int j = i; j > 0 && best[j] < best[j - 1]; --j) {
      const int32_t larger = best[j - 1];
      best[j - 1] = best[j];
      best[j] = larger;
    }
}

__global__ void __launch_bounds__(kThreads) route_kernel(const RoutingCall call) {
  after_earlier_kernels();
  const int64_t slots = call.rows * call.top_k;
  // `slot` holds the experts themselves until each has its slots.
  for (int64_t r = threadIdx.x; r < call.rows; r += kThreads)
    choose(call.logits + r * call.experts, call.experts, call.top_k, call.slot + r * call.top_k);
  __syncthreads();
  for (int e = threadIdx.x; e < call.experts; e += kThreads) {
    int32_t count = 0;
    for (int64_t i = 0; i < slots; ++i) count += call.slot[i] == e;
    call.offsets[e + 1] = count;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    call.offsets[0] = 0;
    int occupied = 0;
    for (int e = 0; e < call.experts; ++e) {
      if (call.offsets[e + 1] > 0) call.occupied[occupied++] = e;
      call.offsets[e + 1] += call.offsets[e];
    }
    const int64_t places = call.experts < slots ? call.experts : slots;
    while (occupied < places) call.occupied[occupied++] = -1;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < call.experts; e += kThreads) {
    int32_t next = call.offsets[e];
    for (int64_t i = 0; i < slots; ++i) {
      if (call.slot[i] != e) continue;
      const auto r = static_cast<int32_t>(i / call.top_k);
      const double logit = call.logits[static_cast<int64_t>(r) * call.experts + e];
      call.row[next] = r;
      call.score[next] = static_cast<float>(1.0 / (1.0 + exp(-logit)));
      ++next;
    }
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < slots; i += kThreads) {
    // The rows of an expert are ascending: its slot of this row is found by halving.
    const auto r = static_cast<int32_t>(i / call.top_k);
    int32_t low = call.offsets[call.slot[i]], high = call.offsets[call.slot[i] + 1];
    while (high - low > 1) {
      const int32_t middle = low + (high - low) / 2;
      (call.row[middle] <= r ? low : high) = middle;
    }
    call.slot[i] = low;
  }
}

}  // namespace

int launch_route(const RoutingCall& call, Stream stream) {
  return launch(route_kernel, dim3{1, 1, 1}, kThreads, 0, stream, call);
}

}  // namespace puna::cuda
