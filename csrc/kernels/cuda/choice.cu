// What of a row of logits a token is chosen by: the largest element, and the largest ones with the
// weight of all.
#include "kernels/cuda/launches.h"
#include "kernels/cuda/reduce.cuh"

namespace puna::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
static_assert(kCandidateBins == kThreads);

// Greater for what is chosen before: of equal elements the lower column, and NaN comes last.
__device__ __forceinline__ uint64_t key_of(float x, int64_t column) {
  const auto place = static_cast<uint32_t>(~column);
  if (x != x) return place;
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 becomes 0
  const uint32_t ordered = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | place;
}

// The block's columns of its row.
struct Part {
  const float* x;
  int64_t first, end;
};
__device__ __forceinline__ Part part_of(const ConstFloatRows& x, int64_t cols) {
  const int64_t first = blockIdx.x * kChoiceColumns;
  const int64_t end = first + kChoiceColumns;
  return {x.data + blockIdx.y * x.stride, first, end < cols ? end : cols};
}

__global__ void __launch_bounds__(kThreads) argmax_kernel(const ArgmaxCall call) {
  after_earlier_kernels();
  auto* const scratch = reinterpret_cast<uint64_t*>(shared_memory());
  auto* const slot = reinterpret_cast<int32_t*>(scratch + kWarps);
  const int64_t r = blockIdx.y;
  const Part part = part_of(call.x, call.cols);
  uint64_t best = 0;
  for (int64_t c = part.first + threadIdx.x; c < part.end; c += kThreads)
    best = Largest()(best, key_of(part.x[c], c));
  uint64_t* const parts = call.parts + r * gridDim.x;
  if (!combine_row<Largest, kThreads>(best, parts, call.arrived + r, scratch, slot)) return;
  if (threadIdx.x == 0) call.out[r] = static_cast<int32_t>(~static_cast<uint32_t>(best));
}

// How many steps an element is below the largest; kCandidateBins or more, or a NaN, is too many.
// Of two elements the larger is never more steps below: each operation keeps the order.
__device__ __forceinline__ int bin_of(float x, float largest) {
  const float steps = (largest - x) * kCandidateSteps;
  return steps >= 0 && steps < kCandidateBins ? static_cast<int>(steps) : kCandidateBins;
}

// The weight of all, and as many steps as have at most kMostCandidates elements.
__global__ void __launch_bounds__(kThreads) weigh_kernel(const CandidatesCall call) {
  after_earlier_kernels();
  auto* const scratch = reinterpret_cast<double*>(shared_memory());
  auto* const counts = reinterpret_cast<int32_t*>(scratch + kWarps);
  int32_t* const slot = counts + kCandidateBins;
  const int64_t r = blockIdx.y;
  const double temperature = call.temperature[r];
  if (temperature == 0) return;  // all blocks of the row
  const Part part = part_of(call.x, call.cols);
  const float largest = part.x[call.largest[r]];
  counts[threadIdx.x] = 0;
  __syncthreads();
  double sum = 0;
  for (int64_t c = part.first + threadIdx.x; c < part.end; c += kThreads) {
    const float x = part.x[c];
    sum += exp((static_cast<double>(x) - largest) / temperature);
    if (const int bin = bin_of(x, largest); bin < kCandidateBins) add_to_shared(counts + bin, 1);
  }
  double* const parts = call.parts + r * gridDim.x;
  int32_t* const all_counts = call.counts + r * kCandidateBins;
  __syncthreads();  // the block's counts are there
  if (counts[threadIdx.x] != 0) add_to_shared(all_counts + threadIdx.x, counts[threadIdx.x]);
  if (!combine_row<Sum, kThreads>(sum, parts, call.arrived + r, scratch, slot)) return;
  // Of this bin and those before it, added up in steps twice as long each time.
  int32_t until = exchange_shared(all_counts + threadIdx.x, 0);
  for (int step = 1; step < kCandidateBins; step *= 2) {
    counts[threadIdx.x] = until;
    __syncthreads();
    if (static_cast<int>(threadIdx.x) >= step) until += counts[threadIdx.x - step];
    __syncthreads();
  }
  counts[threadIdx.x] = until;
  __syncthreads();
  if (threadIdx.x == 0) {
    call.out[r].total = sum;
    call.out[r].count = 0;
    if (until > kMostCandidates) call.bins[r] = 0;
  }
  if (until <= kMostCandidates &&
      (threadIdx.x + 1 == kCandidateBins || counts[threadIdx.x + 1] > kMostCandidates))
    call.bins[r] = static_cast<int32_t>(threadIdx.x) + 1;
}

// The elements of these steps, in whatever order.
__global__ void __launch_bounds__(kThreads) collect_kernel(const CandidatesCall call) {
  after_earlier_kernels();
  const int64_t r = blockIdx.y;
  if (call.temperature[r] == 0) return;
  const Part part = part_of(call.x, call.cols);
  const float largest = part.x[call.largest[r]];
  RowCandidates& out = call.out[r];
  const int bins = call.bins[r];
  for (int64_t c = part.first + threadIdx.x; c < part.end; c += kThreads) {
    const float x = part.x[c];
    if (bin_of(x, largest) >= bins) continue;
    out.at[add_to_shared(&out.count, 1)] = {x, static_cast<int32_t>(c)};
  }
}

dim3 grid_over(int64_t rows, int64_t cols) {
  return {static_cast<unsigned>(choice_blocks(cols)), static_cast<unsigned>(rows), 1};
}

}  // namespace

int launch_argmax(const ArgmaxCall& call, Stream stream) {
  return launch(argmax_kernel, grid_over(call.rows, call.cols), kThreads,
                kWarps * sizeof(uint64_t) + sizeof(int32_t), stream, call);
}

int launch_candidates(const CandidatesCall& call, Stream stream) {
  const dim3 grid = grid_over(call.rows, call.cols);
  constexpr size_t kShared = kWarps * sizeof(double) + (kCandidateBins + 1) * sizeof(int32_t);
  if (const int code = launch(weigh_kernel, grid, kThreads, kShared, stream, call)) return code;
  return launch(collect_kernel, grid, kThreads, 0, stream, call);
}

}  // namespace puna::cuda
