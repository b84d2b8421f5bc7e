// Products with weights that are floats: bfloat16 on the tensor cores, fp32 and fp8 without.
#include "kernels/cuda/product.cuh"
#include "quant/fp8.h"

namespace puna::cuda {
namespace {

// A panel of bfloat16 is words [pair of columns][kPanel].
struct BF16Weights {
  static constexpr bool kScaled = false;

  template <int kTokenTiles>
  static __device__ void span(float* part, const uint8_t* panel, const ProductCall& call, int span,
                              const Tokens& tokens) {
    constexpr int kStepPairs = 8;  // of a product of 16 columns
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const int pairs = static_cast<int>((call.cols + 1) / 2);
    const auto* x = static_cast<const uint16_t*>(call.x.data);
    Sums<kTokenTiles> sums = {};
    const int begin = span * kSpan / 2;
    const int end = begin + kSpan / 2 < pairs ? begin + kSpan / 2 : pairs;
#pragma unroll 4
    for (int pair = begin; pair < end; pair += kStepPairs) {
      uint4 words[kHalves][2];  // rows 4 g .. 4 g + 3 at pairs t and t + 4
#pragma unroll
      for (int h = 0; h < kHalves; ++h)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = pair + t + 4 * i;
          words[h][i] = at < end ? load_streaming(panel + 4 * (at * kPanel + 32 * h + 4 * g))
                                 : uint4{0, 0, 0, 0};
        }
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        const int token = n * kTileTokens + g;
        uint32_t b[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = pair + t + 4 * i;
          b[i] = at < end && token < tokens.count
                     ? *reinterpret_cast<const uint32_t*>(
                           x + (tokens.first + token) * call.x.stride + 2 * at)
                     : 0;
        }
#pragma unroll
        for (int h = 0; h < kHalves; ++h) {
          const uint4 low = words[h][0], high = words[h][1];
          mma_bf16(sums.value[h][0][n], {low.x, low.y, high.x, high.y}, b[0], b[1]);
          mma_bf16(sums.value[h][1][n], {low.z, low.w, high.z, high.w}, b[0], b[1]);
        }
      }
    }
    store_sums(part, sums);
  }
};

// value(code) of two codes of e4m3, in the lower bytes.
__device__ __forceinline__ float float_of_code(uint32_t code) {
  const uint32_t sign = (code & 0x80u) << 24, exponent = code >> 3 & 15u, mantissa = code & 7u;
  if (exponent != 0) return __uint_as_float(sign | (exponent + 120) << 23 | mantissa << 20);
  const float subnormal = static_cast<float>(mantissa) * 0x1p-9f;
  return sign != 0 ? -subnormal : subnormal;
}

// Weights of two rows, without the tensor cores: lane l has rows 2 l and 2 l + 1.
struct F32Weights {
  static constexpr bool kScaled = false;
  static __device__ float2 load(const uint8_t* panel, int64_t column, int lane) {
    return *reinterpret_cast<const float2*>(panel + (column * kPanel + 2 * lane) * 4);
  }
  static __device__ float2 factors(const uint8_t*, int) { return {1, 1}; }

  template <int kTokenTiles>
  static __device__ void span(float* part, const uint8_t* panel, const ProductCall& call, int span,
                              const Tokens& tokens);
};

struct FP8Weights {
  static constexpr bool kScaled = false;
  static __device__ float2 load(const uint8_t* panel, int64_t column, int lane) {
    const uint32_t codes =
        *reinterpret_cast<const uint16_t*>(panel + kFp8ScaleBytes + column * kPanel + 2 * lane);
    return {float_of_code(codes & 255u), float_of_code(codes >> 8)};
  }
  static __device__ float2 factors(const uint8_t* panel, int lane) {
    return reinterpret_cast<const float2*>(panel)[lane];
  }

  template <int kTokenTiles>
  static __device__ void span(float* part, const uint8_t* panel, const ProductCall& call, int span,
                              const Tokens& tokens);
};

template <class Weights, int kTokenTiles>
__device__ __forceinline__ void plain_span(float* part, const uint8_t* panel,
                                           const ProductCall& call, int span,
                                           const Tokens& tokens) {
  constexpr int kTokens = kTokenTiles * kTileTokens;
  const int lane = threadIdx.x % kWarp;
  const auto* x = static_cast<const float*>(call.x.data);
  float2 sums[kTokens] = {};
  const int64_t begin = static_cast<int64_t>(span) * kSpan;
  const int64_t end = begin + kSpan < call.cols ? begin + kSpan : call.cols;
#pragma unroll 4
  for (int64_t column = begin; column < end; ++column) {
    const float2 weight = Weights::load(panel, column, lane);
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      if (token >= tokens.count) break;
      const float value = x[(tokens.first + token) * call.x.stride + column];
      sums[token].x = fmaf(value, weight.x, sums[token].x);
      sums[token].y = fmaf(value, weight.y, sums[token].y);
    }
  }
  const float2 factor = Weights::factors(panel, lane);
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    part[token * kPanel + 2 * lane] = sums[token].x * factor.x;
    part[token * kPanel + 2 * lane + 1] = sums[token].y * factor.y;
  }
}

template <int kTokenTiles>
__device__ void F32Weights::span(float* part, const uint8_t* panel, const ProductCall& call,
                                 int span, const Tokens& tokens) {
  plain_span<F32Weights, kTokenTiles>(part, panel, call, span, tokens);
}
template <int kTokenTiles>
__device__ void FP8Weights::span(float* part, const uint8_t* panel, const ProductCall& call,
                                 int span, const Tokens& tokens) {
  plain_span<FP8Weights, kTokenTiles>(part, panel, call, span, tokens);
}

}  // namespace

int launch_product(const ProductCall& call, Stream stream) {
  switch (call.kind) {
    case kWeightsF32:
      return launch_product_of<F32Weights>(call, stream);
    case kWeightsBF16:
      return launch_product_of<BF16Weights>(call, stream);
    case kWeightsFP8:
      return launch_product_of<FP8Weights>(call, stream);
    default:
      return launch_quantized_product(call, stream);
  }
}

}  // namespace puna::cuda
