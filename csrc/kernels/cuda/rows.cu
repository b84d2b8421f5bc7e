// What happens to rows of activations between products: norms, moves, rounding and quantising.
#include "kernels/cuda/operand.cuh"

namespace puna::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

// Element (r, c) of what is made an operand.
__device__ __forceinline__ float operand_value(const OperandCall& call, int64_t r, int64_t c) {
  const float* x = call.x.data + (call.index != nullptr ? call.index[r] : r) * call.x.stride;
  if (call.gated) return silu(x[c]) * x[call.cols + c];
  return call.score != nullptr ? call.score[r] * x[c] : x[c];
}

// A warp takes a span of a row.
__global__ void __launch_bounds__(kThreads) prepare_kernel(const OperandCall call) {
  after_earlier_kernels();
  const Operand& to = call.operand;
  const int64_t r = blockIdx.y;
  const int64_t span = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t first = span * kOperandSpan + threadIdx.x % kWarp * kLaneColumns;
  if (span * kOperandSpan >= to.stride) return;  // a whole warp
  float x[kLaneColumns];
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i)
    x[i] = first + i < call.cols ? operand_value(call, r, first + i) : 0.0f;
  store_operand(to, r, span, x);
}

// A block normalises a row, and writes it as an operand too if there is one. x may be out. Warps
// take spans in turn, in each step the same, so a thread reads what itself has written.
__global__ void __launch_bounds__(kThreads) norm_kernel(const NormCall call) {
  after_earlier_kernels();
  auto* scratch = reinterpret_cast<float*>(shared_memory());
  const int64_t r = blockIdx.x;
  const float* x = call.x.data + r * call.x.stride;
  float* out = call.out.data + r * call.out.stride;
  const auto count = static_cast<float>(call.cols);
  const int64_t begin = threadIdx.x / kWarp * kOperandSpan + threadIdx.x % kWarp * kLaneColumns;
  constexpr int64_t kStep = kWarps * kOperandSpan;
  const auto sum_of = [&](const auto& term) {
    float sum = 0;
    for (int64_t first = begin; first < call.cols; first += kStep)
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i)
        if (first + i < call.cols) sum = term(sum, x[first + i]);
    return sum_block<kThreads>(sum, scratch);
  };
  const float mean =
      call.bias != nullptr ? sum_of([](float sum, float at) { return sum + at; }) / count : 0.0f;
  const float squares =
      sum_of([&](float sum, float at) { return fmaf(at - mean, at - mean, sum); });
  const float factor = 1.0f / sqrtf(squares / count + call.eps);
  const bool prepares = call.operand.data != nullptr;
  const int64_t end = prepares ? call.operand.stride : call.cols;
  for (int64_t first = begin; first / kOperandSpan * kOperandSpan < end; first += kStep) {
    float values[kLaneColumns];
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      const int64_t c = first + i;
      values[i] = 0;
      if (c >= call.cols) continue;
      values[i] = (x[c] - mean) * factor * call.weight[c];
      if (call.bias != nullptr) values[i] += call.bias[c];
      out[c] = values[i];
    }
    if (prepares) store_operand(call.operand, r, first / kOperandSpan, values);
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
                kWarps * sizeof(float), stream, call);
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
