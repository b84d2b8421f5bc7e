// The norm of a row by a block, and columns by fours.
#pragma once

#include "kernels/cuda/operand.cuh"

namespace puna::cuda {

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

// A block normalises a row, to which experts may be added before. Warps take spans in turn, in each
// step the same; what a thread has in the first kKept of them stays in registers (6,144 columns),
// so that most rows are read once.
constexpr int kNormThreads = 512, kNormWarps = kNormThreads / kWarp, kKept = 3;
constexpr int kNormStep = kNormWarps * kOperandSpan;

// The first of a thread's four columns in the first step.
__device__ __forceinline__ int first_of_norm() {
  return threadIdx.x / kWarp * kOperandSpan + threadIdx.x % kWarp * kLaneColumns;
}
// each(step, first column)
template <class Each>
__device__ __forceinline__ void for_each_kept(const Each& each) {
#pragma unroll
  for (int k = 0; k < kKept; ++k) each(k, first_of_norm() + k * kNormStep);
}

// The weights of columns that are kept, which no kernel writes.
struct NormWeights {
  Four of[kKept];
  __device__ explicit NormWeights(const NormCall& call) {
    const auto cols = static_cast<int>(call.cols);
    for_each_kept([&](int k, int first) { of[k] = load_four(call.weight, first, cols); });
  }
};

// give(first, four): columns of row r, normalised, of whole spans as far as `end` is in them, 0
// beyond the row. `scratch` is shared memory for a float a warp. All threads have met since this
// was called when it gives the first.
template <class Give>
__device__ __forceinline__ void normalise_row(const NormCall& call, int64_t r,
                                              const NormWeights& weights, int end, float* scratch,
                                              const Give& give) {
  const int others = first_of_norm() + kKept * kNormStep;
  const auto cols = static_cast<int>(call.cols);
  const float* x = call.x.data + r * call.x.stride;
  const auto count = static_cast<float>(cols);
  Four values[kKept];
  const auto sum_of = [&](const auto& term) {
    float sum = 0;
    const auto take = [&](const Four& four, int first) {
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i)
        if (first + i < cols) sum = term(sum, four.at[i]);
    };
    for_each_kept([&](int k, int first) { take(values[k], first); });
    for (int first = others; first < cols; first += kNormStep)
      take(load_four(x, first, cols), first);
    __syncthreads();  // what was read of an earlier sum
    return combine_block<Sum, kNormThreads>(sum, scratch);
  };
  for_each_kept([&](int k, int first) { values[k] = load_four(x, first, cols); });
  if (call.added.rows > 0) {
    float* residual = call.added.residual.data + r * call.added.residual.stride;  // x
    for (int i = 0; i < call.added.top_k; ++i) {
      const float* from = expert_row(call.added, r, i);
      Four more[kKept];
      for_each_kept([&](int k, int first) { more[k] = load_four(from, first, cols); });
      for_each_kept([&](int k, int) { add(values[k], more[k]); });
    }
    for_each_kept([&](int k, int first) { store_four(residual, first, cols, values[k]); });
    for (int first = others; first < cols; first += kNormStep) {
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
  const auto finish = [&](Four four, const Four& weight, int first) {
    if (first / kOperandSpan * kOperandSpan >= end) return;  // a whole warp
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      four.at[i] = (four.at[i] - mean) * factor * weight.at[i];
      if (call.bias != nullptr && first + i < cols) four.at[i] += call.bias[first + i];
    }
    give(first, four);
  };
  for_each_kept([&](int k, int first) { finish(values[k], weights.of[k], first); });
  for (int first = others; first / kOperandSpan * kOperandSpan < end; first += kNormStep)
    finish(load_four(x, first, cols), load_four(call.weight, first, cols), first);
}

}  // namespace puna::cuda
