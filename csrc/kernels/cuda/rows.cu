// What happens to rows of activations between products: norms, moves, rounding and quantising.
#include "kernels/cuda/norm.cuh"

namespace puna::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// exp(x) as the CPU's kernels compute it (simd.h), operation by operation: what an expert makes
// does not depend on where it lies.
__device__ __forceinline__ float exp_like_cpu(float x) {
  const float clamped = fminf(fmaxf(x, -87.3f), 88.0f);
  const float k = rintf(clamped * 1.44269504f);
  float r = fmaf(k, -0.693359375f, clamped);
  r = fmaf(k, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fmaf(p, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  p = fmaf(p, r * r, r + 1.0f) *
      __uint_as_float(static_cast<uint32_t>(static_cast<int>(k) + 127) << 23);
  return x < -87.3f ? 0.0f : p;
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + exp_like_cpu(-x)); }

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

// A block normalises a row, and writes it as an operand too if there is one. x may be out.
__global__ void __launch_bounds__(kNormThreads, 1) norm_kernel(const NormCall call) {
  const NormWeights weights(call);
  after_earlier_kernels();
  const int64_t r = blockIdx.x;
  float* out = call.out.data + r * call.out.stride;
  const auto cols = static_cast<int>(call.cols);
  const bool prepares = call.operand.data != nullptr;
  normalise_row(call, r, weights, prepares ? static_cast<int>(call.operand.stride) : cols,
                reinterpret_cast<float*>(shared_memory()), [&](int first, const Four& four) {
                  store_four(out, first, cols, four);
                  if (prepares) store_operand(call.operand, r, first / kOperandSpan, four.at);
                });
}

// A layer norm of rows that a warp's registers hold, each its own: so many more are on their way
// than with a row to a block, and nothing waits for a block.
constexpr int kRowSpans = 12;
__global__ void __launch_bounds__(kThreads, 2) layer_norm_kernel(const NormCall call) {
  after_earlier_kernels();
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (r >= call.rows) return;
  const auto cols = static_cast<int>(call.cols);
  const float* x = call.x.data + r * call.x.stride;
  float* out = call.out.data + r * call.out.stride;
  const auto each = [&](const auto& of) {
#pragma unroll
    for (int span = 0; span < kRowSpans; ++span)
      of(span, span * kOperandSpan + threadIdx.x % kWarp * kLaneColumns);
  };
  Four values[kRowSpans];
  each([&](int span, int first) { values[span] = load_four(x, first, cols); });
  const auto sum_of = [&](const auto& term) {
    float sum = 0;
    each([&](int span, int first) {
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i)
        if (first + i < cols) sum = term(sum, values[span].at[i]);
    });
    return sum_lanes(sum) / static_cast<float>(cols);
  };
  const float mean = sum_of([](float sum, float at) { return sum + at; });
  const float squares =
      sum_of([&](float sum, float at) { return fmaf(at - mean, at - mean, sum); });
  const float factor = 1.0f / sqrtf(squares + call.eps);
  const bool prepares = call.operand.data != nullptr;
  const int end = prepares ? static_cast<int>(call.operand.stride) : cols;
  each([&](int span, int first) {
    if (span * kOperandSpan >= end) return;  // a whole warp
    const Four weight = load_four(call.weight, first, cols);
    const Four bias = load_four(call.bias, first, cols);
    Four four;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i)
      four.at[i] = (values[span].at[i] - mean) * factor * weight.at[i] + bias.at[i];
    store_four(out, first, cols, four);
    if (prepares) store_operand(call.operand, r, span, four.at);
  });
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
  for (int i = 0; i < call.top_k; ++i) sum += expert_row(call, r, i)[c];
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
  // By the columns alone: a row's bits depend on nothing beside it.
  if (call.bias != nullptr && call.added.rows == 0 && call.cols <= kRowSpans * kOperandSpan)
    return launch(layer_norm_kernel,
                  dim3{static_cast<unsigned>((call.rows + kWarps - 1) / kWarps), 1, 1}, kThreads, 0,
                  stream, call);
  return launch(norm_kernel, dim3{static_cast<unsigned>(call.rows), 1, 1}, kNormThreads,
                kNormWarps * sizeof(float), stream, call);
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
