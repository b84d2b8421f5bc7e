// Products, by the kind of weights; and those with fp32 and fp8, without the tensor cores.
#include "kernels/cuda/few_product.cuh"
#include "quant/fp8.h"

namespace puna::cuda {
namespace {

// value(code) of e4m3.
__device__ __forceinline__ float float_of_code(uint32_t code) {
  const uint32_t sign = (code & 0x80u) << 24, exponent = code >> 3 & 15u, mantissa = code & 7u;
  if (exponent != 0) return __uint_as_float(sign | (exponent + 120) << 23 | mantissa << 20);
  const float subnormal = static_cast<float>(mantissa) * 0x1p-9f;
  return sign != 0 ? -subnormal : subnormal;
}

// A lane's rows of a column, in kBytes of it.
struct F32Column {
  static constexpr int kRows = 2, kBytes = 8;
  static constexpr int64_t kHeader = 0;
  static __device__ float value(const unsigned char* at, int row) {
    return reinterpret_cast<const float*>(at)[row];
  }
  static __device__ float factor(const uint8_t*, int64_t) { return 1; }
};
struct FP8Column {
  static constexpr int kRows = 4, kBytes = 4;
  static constexpr int64_t kHeader = kFp8ScaleBytes;
  static __device__ float value(const unsigned char* at, int row) { return float_of_code(at[row]); }
  static __device__ float factor(const uint8_t* panel, int64_t row) {
    return reinterpret_cast<const float*>(panel)[row];
  }
};

// Weights of some rows, [column][kPanel], without the tensor cores. A block has as many rows as 32
// bytes of a column, what memory hands out at once, so that a matrix of a few rows, as routers
// are, still has several blocks. Lanes take columns in turn.
template <class Column>
struct PlainWeights {
  static constexpr bool kScaled = false;
  static constexpr int kColumnBytes = 32, kLanes = kColumnBytes / Column::kBytes;  // of a column
  static constexpr int kRows = kLanes * Column::kRows, kWarps = 5, kStages = 2, kResident = 1;
  static constexpr int kRowsAt = kSpan * kColumnBytes, kFloatRowBytes = kSpan * 4;  // of x
  static constexpr int kTurns = kSpan * kLanes / kWarp;  // columns of a span that a lane has
  static __host__ __device__ int stage_bytes(int tokens) {
    return kRowsAt + tokens * kFloatRowBytes;
  }
  using Part = float[kTileTokens][Column::kRows];

  struct Lane {
    __device__ Lane(const ProductCall& call, const Share& share, int64_t row, int)
        : lane(threadIdx.x % kWarp),
          tokens(share.count),
          cols(static_cast<int>(call.cols)),
          first_row(row % kPanel),
          panel(share.weights + row / kPanel * call.panel_bytes),
          x(static_cast<const float*>(share.x.data) + share.first * share.x.stride),
          stride(share.x.stride) {}

    __device__ __forceinline__ void copy_weights(unsigned char* stage, int span) const {
      constexpr int kElement = kColumnBytes / kRows;
#pragma unroll
      for (int first = 0; first < kSpan * kColumnBytes / kChunk; first += kWarp) {
        const int i = first + lane;
        const int column = i * kChunk / kColumnBytes, chunk = i % (kColumnBytes / kChunk);
        if (span * kSpan + column < cols)
          copy_async<kChunk>(
              stage + i * kChunk,
              panel + Column::kHeader +
                  (static_cast<int64_t>(span * kSpan + column) * kPanel + first_row) * kElement +
                  chunk * kChunk);
      }
    }
    // Rows of x need not be aligned to more than their elements.
    __device__ __forceinline__ void copy_activations(unsigned char* stage, int span) const {
      for (int token = 0; token < tokens; ++token)
#pragma unroll
        for (int first = 0; first < kSpan; first += kWarp) {
          const int column = span * kSpan + first + lane;
          if (column < cols)
            copy_async<4>(stage + kRowsAt + token * kFloatRowBytes + 4 * (first + lane),
                          x + token * stride + column);
        }
    }
    __device__ __forceinline__ void multiply(const unsigned char* stage, int span,
                                             Part& part) const {
      const auto* rows = reinterpret_cast<const float*>(stage + kRowsAt);
#pragma unroll 4
      for (int i = 0; i < kTurns; ++i) {
        const int own = i * (kWarp / kLanes) + lane / kLanes;
        if (span * kSpan + own >= cols) break;
        const unsigned char* at = stage + own * kColumnBytes + lane % kLanes * Column::kBytes;
#pragma unroll
        for (int token = 0; token < kTileTokens; ++token) {
          if (token >= tokens) break;
          const float value = rows[token * kSpan + own];
#pragma unroll
          for (int row = 0; row < Column::kRows; ++row)
            part[token][row] = fmaf(value, Column::value(at, row), part[token][row]);
        }
      }
    }
    __device__ __forceinline__ void store(float* to, const Part& part) const {
#pragma unroll
      for (int token = 0; token < kTileTokens; ++token) {
        if (token >= tokens) break;
#pragma unroll
        for (int row = 0; row < Column::kRows; ++row) {
          float sum = part[token][row];
          // Over the lanes that have the same rows.
#pragma unroll
          for (int mask = kLanes; mask < kWarp; mask *= 2)
            sum += __shfl_xor_sync(kAllLanes, sum, mask);
          const int at = lane % kLanes * Column::kRows + row;
          if (lane < kLanes) to[token * kRows + at] = sum * Column::factor(panel, first_row + at);
        }
      }
    }

    int lane, tokens, cols;
    int64_t first_row;
    const uint8_t* panel;
    const float* x;
    int64_t stride;
  };
};

}  // namespace

int launch_product(const ProductCall& call, Stream stream) {
  switch (call.kind) {
    case kWeightsF32:
      return launch_few_product<PlainWeights<F32Column>>(call, stream);
    case kWeightsBF16:
      return launch_bf16_product(call, stream);
    case kWeightsFP8:
      return launch_few_product<PlainWeights<FP8Column>>(call, stream);
    default:
      return launch_quantized_product(call, stream);
  }
}

}  // namespace puna::cuda
