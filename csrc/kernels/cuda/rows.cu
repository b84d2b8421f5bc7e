// What happens to rows of activations between products: norms, moves, rounding and quantising.
#include "kernels/cuda/launches.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/kernel_table.h"

namespace puna::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSpan = static_cast<int>(kActivationGroup);
constexpr int kLaneColumns = kSpan / kWarp;  // that a lane takes of a span

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

// Element (r, c) of what is made an operand.
__device__ __forceinline__ float operand_value(const OperandCall& call, int64_t r, int64_t c) {
  const float* x = call.x.data + (call.index != nullptr ? call.index[r] : r) * call.x.stride;
  if (call.gated) return silu(x[c]) * x[call.cols + c];
  return call.score != nullptr ? call.score[r] * x[c] : x[c];
}

__device__ __forceinline__ int8_t quantize(float x, float inverse) {
  // Codes of 0 where there is nothing to scale: NaN has no integer.
  return inverse > 0 ? static_cast<int8_t>(rintf(x * inverse)) : int8_t{0};
}

// A warp quantises kSpan columns, a lane kLaneColumns neighbours of them. kernel_table.h
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
  const int64_t column = span * kSpan + lane * kLaneColumns;
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
    if (column % to.group == 0) to.sums[r * to.groups + column / to.group] = sums;
  }
  if (lane == 0) to.scales[r * to.spans + span] = (zeros ? 0.0f : most / 127.0f) + poison;
}

__global__ void __launch_bounds__(kThreads) prepare_kernel(const OperandCall call) {
  after_earlier_kernels();
  const Operand& to = call.operand;
  const int64_t r = blockIdx.y;
  const int64_t span = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t first = span * kSpan + threadIdx.x % kWarp * kLaneColumns;
  if (span * kSpan >= to.stride) return;  // a whole warp
  float x[kLaneColumns];
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i)
    x[i] = first + i < call.cols ? operand_value(call, r, first + i) : 0.0f;
  if (to.kind == kOperandInt8) {
    quantize_span(to, r, span, x);
    return;
  }
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    if (first + i >= to.stride) break;
    const int64_t at = r * to.stride + first + i;
    if (to.kind == kOperandF32)
      static_cast<float*>(to.data)[at] = x[i];
    else
      static_cast<uint16_t*>(to.data)[at] = static_cast<uint16_t>(bf16_of_float(x[i]));
  }
}

// A block normalises a row. x may be out.
__global__ void __launch_bounds__(kThreads) norm_kernel(const NormCall call) {
  after_earlier_kernels();
  auto* scratch = reinterpret_cast<float*>(shared_memory());
  const float* x = call.x.data + blockIdx.x * call.x.stride;
  float* out = call.out.data + blockIdx.x * call.out.stride;
  const auto count = static_cast<float>(call.cols);
  float mean = 0;
  if (call.bias != nullptr) {
    float sum = 0;
    for (int64_t c = threadIdx.x; c < call.cols; c += kThreads) sum += x[c];
    mean = sum_block<kThreads>(sum, scratch) / count;
  }
  float squares = 0;
  for (int64_t c = threadIdx.x; c < call.cols; c += kThreads)
    squares = fmaf(x[c] - mean, x[c] - mean, squares);
  const float factor = 1.0f / sqrtf(sum_block<kThreads>(squares, scratch) / count + call.eps);
  for (int64_t c = threadIdx.x; c < call.cols; c += kThreads) {
    const float value = (x[c] - mean) * factor * call.weight[c];
    out[c] = call.bias != nullptr ? value + call.bias[c] : value;
  }
}

__global__ void __launch_bounds__(kThreads) move_kernel(const MoveCall call) {
  after_earlier_kernels();
  const int64_t r = blockIdx.y;
  const float* x = call.x.data + (call.from != nullptr ? call.from[r] : r) * call.x.stride;
  float* out = call.out.data + (call.to != nullptr ? call.to[r] : r) * call.out.stride;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c < call.cols) out[c] = x[c];
}

__global__ void __launch_bounds__(kThreads) add_experts_kernel(const AddExpertsCall call) {
  after_earlier_kernels();
  const int64_t r = blockIdx.y;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= call.cols) return;
  float* residual = call.residual.data + r * call.residual.stride + c;
  float sum = *residual;
  for (int i = 0; i < call.top_k; ++i)
    sum += call.x.data[call.slot[r * call.top_k + i] * call.x.stride + c];
  *residual = sum;
}

__global__ void __launch_bounds__(kThreads) unfold_kernel(const UnfoldCall call) {
  after_earlier_kernels();
  const int64_t r = blockIdx.y, grid = call.size / call.patch, area = call.patch * call.patch;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= 3 * area) return;
  const int64_t tile = r / (grid * grid), channel = c / area;
  const int64_t y = r / grid % grid * call.patch + c / call.patch % call.patch;
  const int64_t x = r % grid * call.patch + c % call.patch;
  call.out.data[r * call.out.stride + c] =
      call.pixels[((tile * 3 + channel) * call.size + y) * call.size + x];
}

__global__ void __launch_bounds__(kThreads) pixel_shuffle_kernel(const PixelShuffleCall call) {
  after_earlier_kernels();
  const int64_t r = blockIdx.y, small = call.grid / call.factor;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= call.factor * call.factor * call.cols) return;
  const int64_t tile = r / (small * small), neighbour = c / call.cols;
  const int64_t y = r / small % small * call.factor + neighbour / call.factor;
  const int64_t x = r % small * call.factor + neighbour % call.factor;
  call.out.data[r * call.out.stride + c] =
      call.x.data[((tile * call.grid + y) * call.grid + x) * call.x.stride + c % call.cols];
}

// A thread for every element of `rows` rows of `cols` columns.
dim3 grid_over(int64_t rows, int64_t cols, int64_t columns_each = kThreads) {
  return {static_cast<unsigned>((cols + columns_each - 1) / columns_each),
          static_cast<unsigned>(rows), 1};
}

}  // namespace

int launch_prepare_operand(const OperandCall& call, Stream stream) {
  return launch(prepare_kernel, grid_over(call.rows, call.operand.stride, kThreads * kLaneColumns),
                kThreads, 0, stream, call);
}
int launch_norm(const NormCall& call, Stream stream) {
  return launch(norm_kernel, dim3{static_cast<unsigned>(call.rows), 1, 1}, kThreads,
                kThreads / kWarp * sizeof(float), stream, call);
}
int launch_move(const MoveCall& call, Stream stream) {
  return launch(move_kernel, grid_over(call.rows, call.cols), kThreads, 0, stream, call);
}
int launch_add_experts(const AddExpertsCall& call, Stream stream) {
  return launch(add_experts_kernel, grid_over(call.rows, call.cols), kThreads, 0, stream, call);
}
int launch_unfold(const UnfoldCall& call, Stream stream) {
  const int64_t grid = call.size / call.patch;
  return launch(unfold_kernel, grid_over(call.tiles * grid * grid, 3 * call.patch * call.patch),
                kThreads, 0, stream, call);
}
int launch_pixel_shuffle(const PixelShuffleCall& call, Stream stream) {
  const int64_t small = call.grid / call.factor;
  return launch(pixel_shuffle_kernel,
                grid_over(call.tiles * small * small, call.factor * call.factor * call.cols),
                kThreads, 0, stream, call);
}

}  // namespace puna::cuda
