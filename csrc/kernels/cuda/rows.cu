// What happens to rows of activations between products: norms, moves, rounding and quantising.
#include "kernels/cuda/operand.cuh"

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

// Columns first .. first + 3 of a row, 0 beyond the last.
struct Four {
  float at[kLaneColumns];
};
__device__ __forceinline__ Four load_four(const float* row, int first, int cols) {
  Four four;
  if (first + kLaneColumns <= cols && reinterpret_cast<uintptr_t>(row + first) % 16 == 0) {
    const float4 words = *reinterpret_cast<const float4*>(row + first);
    four = {{words.x, words.y, words.z, words.w}};
    return four;
  }
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) four.at[i] = first + i < cols ? row[first + i] : 0.0f;
  return four;
}
__device__ __forceinline__ void store_four(float* row, int first, int cols, const Four& four) {
  if (first + kLaneColumns <= cols && reinterpret_cast<uintptr_t>(row + first) % 16 == 0) {
    *reinterpret_cast<float4*>(row + first) = {four.at[0], four.at[1], four.at[2], four.at[3]};
    return;
  }
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i)
    if (first + i < cols) row[first + i] = four.at[i];
}

__device__ __forceinline__ void add(Four& sum, const Four& more) {
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) sum.at[i] += more.at[i];
}

// Row `slot[r][i]` of what experts made.
__device__ __forceinline__ const float* expert_row(const AddExpertsCall& call, int64_t r, int i) {
  return call.x.data + call.slot[r * call.top_k + i] * call.x.stride;
}

// A block normalises a row, to which experts may be added before, and writes it as an operand too
// if there is one. x may be out. Warps take spans in turn, in each step the same; what a thread has
// in the first kKept of them stays in registers (6,144 columns), so that most rows are read once.
constexpr int kNormThreads = 512, kNormWarps = kNormThreads / kWarp, kKept = 3;
__global__ void __launch_bounds__(kNormThreads, 1) norm_kernel(const NormCall call) {
  constexpr int kStep = kNormWarps * kOperandSpan;
  const int begin = threadIdx.x / kWarp * kOperandSpan + threadIdx.x % kWarp * kLaneColumns;
  const auto cols = static_cast<int>(call.cols);
  const auto kept = [&](const auto& each) {
#pragma unroll
    for (int k = 0; k < kKept; ++k) each(k, begin + k * kStep);
  };
  Four weights[kKept], values[kKept];
  kept([&](int k, int first) { weights[k] = load_four(call.weight, first, cols); });
  after_earlier_kernels();
  auto* scratch = reinterpret_cast<float*>(shared_memory());
  const int64_t r = blockIdx.x;
  const float* x = call.x.data + r * call.x.stride;
  float* out = call.out.data + r * call.out.stride;
  const auto count = static_cast<float>(cols);
  const auto sum_of = [&](const auto& term) {
    float sum = 0;
    const auto take = [&](const Four& four, int first) {
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i)
        if (first + i < cols) sum = term(sum, four.at[i]);
    };
    kept([&](int k, int first) { take(values[k], first); });
    for (int first = begin + kKept * kStep; first < cols; first += kStep)
      take(load_four(x, first, cols), first);
    __syncthreads();  // what was read of an earlier sum
    return combine_block<Sum, kNormThreads>(sum, scratch);
  };
  kept([&](int k, int first) { values[k] = load_four(x, first, cols); });
  if (call.added.rows > 0) {
    float* residual = call.added.residual.data + r * call.added.residual.stride;  // x
    for (int i = 0; i < call.added.top_k; ++i) {
      const float* from = expert_row(call.added, r, i);
      Four more[kKept];
      kept([&](int k, int first) { more[k] = load_four(from, first, cols); });
      kept([&](int k, int) { add(values[k], more[k]); });
    }
    kept([&](int k, int first) { store_four(residual, first, cols, values[k]); });
    for (int first = begin + kKept * kStep; first < cols; first += kStep) {
      Four four = load_four(x, first, cols);
      for (int i = 0; i < call.added.top_k; ++i)
        add(four, load_four(expert_row(call.added, r, i), first, cols));
      store_four(residual, first, cols, four);
    }
  }
  const float mean =
      call.bias != nullptr ? sum_of([](float sum, float at) { return sum + at; }) / count : 0.0f;
  const float squares =
      sum_of([&](float sum, float at) { return fmaf(at - mean, at - mean, sum); });
  const float factor = 1.0f / sqrtf(squares / count + call.eps);
  const bool prepares = call.operand.data != nullptr;
  const int end = prepares ? static_cast<int>(call.operand.stride) : cols;
  const auto finish = [&](Four four, const Four& weight, int first) {
    if (first / kOperandSpan * kOperandSpan >= end) return;  // a whole warp
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      four.at[i] = (four.at[i] - mean) * factor * weight.at[i];
      if (call.bias != nullptr && first + i < cols) four.at[i] += call.bias[first + i];
    }
    store_four(out, first, cols, four);
    if (prepares) store_operand(call.operand, r, first / kOperandSpan, four.at);
  };
  kept([&](int k, int first) { finish(values[k], weights[k], first); });
  for (int first = begin + kKept * kStep; first / kOperandSpan * kOperandSpan < end; first += kStep)
    finish(load_four(x, first, cols), load_four(call.weight, first, cols), first);
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
