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

template <class Accumulator, class Multiply>
__device__ __forceinline__ void multiply(const ExerciseCall& call, const Multiply& product) {
  Accumulator sums[kExerciseProducts][4] = {};
  const uint32_t operand[4] = {threadIdx.x, 1, 2, 3};
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

}  // namespace

int launch_exercise(const ExerciseCall& call, Stream stream) {
  const auto kernel = call.kind == kExerciseRead   ? read_kernel
                      : call.kind == kExerciseInt8 ? multiply_int8_kernel
                                                   : multiply_bf16_kernel;
  return launch(kernel, dim3{static_cast<unsigned>(call.blocks), 1, 1}, kThreads, 0, stream, call);
}

}  // namespace puna::cuda
