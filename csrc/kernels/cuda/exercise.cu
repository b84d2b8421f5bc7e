// What the device can do at best, for benchmarks to compare with: reading memory, and products of
// the tensor cores on registers.
#include "kernels/cuda/launches.h"

namespace puna::cuda {
namespace {

constexpr int kThreads = kExerciseWarps * kWarp;
constexpr int kLoads = 8;  // in flight in each thread

__global__ void __launch_bounds__(kThreads) read_kernel(const ExerciseCall call) {
  after_earlier_kernels();
  const auto* data = static_cast<const uint4*>(call.data);
  const int64_t count = call.bytes / 16, step = static_cast<int64_t>(gridDim.x) * kThreads;
  uint32_t bits = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += kLoads * step) {
    uint4 words[kLoads];
#pragma unroll
    for (int load = 0; load < kLoads; ++load)
      words[load] =
          i + load * step < count ? load_streaming(data + i + load * step) : uint4{0, 0, 0, 0};
#pragma unroll
    for (const uint4& word : words) bits ^= word.x ^ word.y ^ word.z ^ word.w;
  }
  if (bits == 0x5eed) *call.out = 1;  // hardly ever
}

// Whatever they are: what is multiplied changes nothing.
constexpr uint32_t kLeft[3] = {1, 2, 3};

template <class Accumulator, class Multiply>
__device__ __forceinline__ void multiply(const ExerciseCall& call, const Multiply& product) {
  Accumulator sums[kExerciseProducts][4] = {};
  const uint32_t operand[4] = {threadIdx.x, kLeft[0], kLeft[1], kLeft[2]};
  for (int64_t round = 0; round < call.rounds; ++round)
#pragma unroll
    for (auto& sum : sums) product(sum, operand, threadIdx.x, 5u);
  Accumulator total = 0;
#pragma unroll
  for (const auto& sum : sums) total += sum[0] + sum[1] + sum[2] + sum[3];
  if (total == static_cast<Accumulator>(0x5eed)) *call.out = 1;
}

__global__ void __launch_bounds__(kThreads) multiply_int8_kernel(const ExerciseCall call) {
  after_earlier_kernels();
  multiply<int32_t>(call, [](auto& sum, auto&&... operands) { mma_u8s8(sum, operands..., sum); });
}
__global__ void __launch_bounds__(kThreads) multiply_bf16_kernel(const ExerciseCall call) {
  after_earlier_kernels();
  multiply<float>(call, [](auto&&... operands) { mma_bf16(operands...); });
}

// Products of warpgroups, whose right operands are in shared memory.
constexpr int kOperandBytes = kWarpgroupColumns * 128;

#if PUNA_WARPGROUPS
template <class Accumulator, class Multiply>
__device__ __forceinline__ void multiply_by_warpgroups(const ExerciseCall& call,
                                                       const Multiply& product) {
  auto* const words = reinterpret_cast<uint32_t*>(shared_memory());
  for (int i = threadIdx.x; i < kOperandBytes / 4; i += kThreads) words[i] = i;
  fence_shared_operands();
  __syncthreads();
  const SharedOperand rows = shared_operand(words);
  Accumulator sums[2][kWarpgroupSums] = {};
  const uint32_t operand[4] = {threadIdx.x, kLeft[0], kLeft[1], kLeft[2]};
  for (int64_t round = 0; round < call.rounds; ++round) {
    fence_products();
#pragma unroll
    for (int i = 0; i < kExerciseProducts; ++i)
      product(sums[i % 2], operand, rows.after(i / 2 % 4));
    commit_products();
    wait_for_products<0>(sums[0]);
    wait_for_products<0>(sums[1]);
  }
  Accumulator total = 0;
#pragma unroll
  for (int i = 0; i < kWarpgroupSums; ++i) total += sums[0][i] + sums[1][i];
  if (total == static_cast<Accumulator>(0x5eed)) *call.out = 1;
}
#endif

__global__ void __launch_bounds__(kThreads) warpgroups_int8_kernel(const ExerciseCall call) {
#if PUNA_WARPGROUPS
  after_earlier_kernels();
  multiply_by_warpgroups<int32_t>(
      call, [](auto&&... operands) { warpgroup_mma_u8s8<true>(operands...); });
#endif
}
__global__ void __launch_bounds__(kThreads) warpgroups_bf16_kernel(const ExerciseCall call) {
#if PUNA_WARPGROUPS
  after_earlier_kernels();
  multiply_by_warpgroups<float>(call,
                                [](auto&&... operands) { warpgroup_mma_bf16<true>(operands...); });
#endif
}

}  // namespace

int launch_exercise(const ExerciseCall& call, Stream stream) {
  if (is_of_warpgroups(call.kind) && !has_warpgroups) {
    // As many operations.
    ExerciseCall by_warps = call;
    by_warps.kind = call.kind == kExerciseWarpgroupsInt8 ? kExerciseInt8 : kExerciseBF16;
    by_warps.rounds *= exercise_operations(call.kind) / exercise_operations(by_warps.kind);
    return launch_exercise(by_warps, stream);
  }
  using Kernel = void (*)(ExerciseCall);
  constexpr Kernel kKernels[] = {read_kernel, multiply_int8_kernel, multiply_bf16_kernel,
                                 warpgroups_int8_kernel, warpgroups_bf16_kernel};
  return launch(kKernels[call.kind], dim3{static_cast<unsigned>(call.blocks), 1, 1}, kThreads,
                is_of_warpgroups(call.kind) ? kOperandBytes : 0, stream, call);
}

}  // namespace puna::cuda
