// Products with quantised weights, by the number of rows; and those of few rows.
#include "kernels/cuda/few_product.cuh"
#include "kernels/cuda/quantized_weights.cuh"

namespace puna::cuda {
namespace {

// A stage is of a span: its weights; rows of x, their sums by group, and their scales.
template <class Format>
struct QuantizedWeights : Steps<Format> {
  using Of = Steps<Format>;
  using Stage = StagedWeights<Format, kSpan>;
  static constexpr bool kScaled = true;
  static constexpr int kRows = kHalf, kWarps = 8, kResident = 2;
  static constexpr int kStages = Format::kBits > 4 ? 2 : 3;  // 50 KB of a block or more

  static constexpr int kGroups = kSpan / Of::kGroup;  // of a span
  static constexpr int kRowsAt = Stage::kBytes;

  static __host__ __device__ int stage_bytes(int tokens) {
    const int end = kRowsAt + tokens * (kRowBytes + 4 * kGroups + 4);
    return (end + kChunk - 1) / kChunk * kChunk;
  }

  using Part = float[kTilesEach][4];

  struct Lane {
    __device__ Lane(const ProductCall& call, const Share& share, int64_t row, int most_tokens)
        : lane(threadIdx.x % kWarp),
          tokens(share.count),
          limit(static_cast<int>(share.x.stride)),
          spans(static_cast<int>(share.x.spans)),
          groups(static_cast<int>(share.x.groups)),
          sums_at(kRowsAt + most_tokens * kRowBytes),
          scales_at(sums_at + most_tokens * 4 * kGroups),
          half(static_cast<int>(row % kPanel / kHalf)),
          panel(share.weights + row / kPanel * call.panel_bytes),
          rows(static_cast<const uint8_t*>(share.x.data) + share.first * share.x.stride),
          row_sums(share.x.sums + share.first * share.x.groups),
          row_scales(share.x.scales + share.first * share.x.spans) {}

    __device__ __forceinline__ void copy_weights(unsigned char* stage, int span) const {
      Stage::copy(stage, panel, half, span * kSpan, limit);
    }

    __device__ __forceinline__ void copy_activations(unsigned char* stage, int span) const {
      copy_rows<kTileTokens, kWarp>(stage + kRowsAt, lane, rows, tokens, limit, span * kSpan);
#pragma unroll
      for (int first = 0; first < kTileTokens * kGroups; first += kWarp) {
        const int i = first + lane, token = i / kGroups, group = span * kGroups + i % kGroups;
        if (token < tokens && group < groups)
          copy_async<4>(stage + sums_at + 4 * i, row_sums + int64_t{token} * groups + group);
      }
      if (lane < tokens)
        copy_async<4>(stage + scales_at + 4 * lane, row_scales + int64_t{lane} * spans + span);
    }

    __device__ __forceinline__ float scale(const unsigned char* stage) const {
      return *reinterpret_cast<const float*>(stage + scales_at + 4 * lane);
    }

    __device__ __forceinline__ void multiply(const unsigned char* stage, int span,
                                             Part& part) const {
      const int t = lane % 4;
      uint32_t x[2][4];  // of pairs of steps
      const int token = lane % 8 < tokens ? lane % 8 : tokens - 1;
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) load_rows(x[pair], stage + kRowsAt, token, pair);
#pragma unroll
      for (int first = 0; first < kSpan; first += Of::kPieceColumns) {
        if (span * kSpan + first >= limit) break;
        int32_t sums[Of::kGroupsEach][2], dots[Of::kGroupsEach][kTilesEach][4];
#pragma unroll
        for (int each = 0; each < Of::kGroupsEach; ++each)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            sums[each][i] =
                2 * t + i < tokens
                    ? reinterpret_cast<const int32_t*>(
                          stage + sums_at)[(2 * t + i) * kGroups + first / Of::kGroup + each]
                    : 0;
#pragma unroll
        for (int each = 0; each < Of::kGroupsEach; ++each)
#pragma unroll
          for (int j = 0; j < kTilesEach; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) dots[each][j][i] = start_of_sums<Format>(sums[each][i % 2]);
#pragma unroll
        for (int i = 0; i < Of::kStepsEach; ++i) {
          const int step = first / Of::kColumns + i;
          Codes codes;
          Stage::load_codes(codes, stage, step);
          const uint32_t* operand = x[step / 2] + step % 2 * 2;
#pragma unroll
          for (int each = 0; each < Of::kGroupsEach; ++each)
#pragma unroll
            for (int j = 0; j < kTilesEach; ++j)
              multiply_step<Format>(dots[each][j], codes, j, each, operand[0], operand[1],
                                    dots[each][j]);
        }
#pragma unroll
        for (int each = 0; each < Of::kGroupsEach; ++each) {
          const int group = (span * kSpan + first) % Of::kBlock / Of::kGroup + each;  // of a block
          float scales[4], offsets[4] = {};
          Stage::load_factors(scales, offsets, stage, first / Of::kBlock, group);
#pragma unroll
          for (int j = 0; j < kTilesEach; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int r = 2 * j + i / 2;
              part[j][i] = fold<Format>(part[j][i], dots[each][j][i], scales[r], offsets[r],
                                        sums[each][i % 2]);
            }
        }
      }
    }

    __device__ __forceinline__ void store(float* to, const Part& part) const {
      store_half(to, part, lane / 4, lane % 4, tokens);
    }

    int lane, tokens;
    int limit, spans, groups;  // of x: columns, spans, groups
    int sums_at, scales_at;    // of a stage
    int half;
    const uint8_t* panel;
    const uint8_t* rows;
    const int32_t* row_sums;
    const float* row_scales;
  };
};

}  // namespace

int launch_quantized_product(const ProductCall& call, Stream stream) {
  if (is_for_one_row(call)) return launch_quantized_one_row(call, stream);
  switch (size_of(call)) {
    case kFewRows:
      break;
    case kSomeRows:
      return launch_quantized_small_tiles(call, stream);
    case kManyRows:
      return by_warpgroups(call) ? launch_quantized_warpgroups(call, stream)
                                 : launch_quantized_large_tiles(call, stream);
  }
  using Launch = int (*)(const ProductCall&, Stream);
  constexpr Launch kLaunches[] = {
#define PUNA_FORMAT(Traits, name) &launch_few_product<QuantizedWeights<Traits>>,
#include "quant/formats.inc"
#undef PUNA_FORMAT
  };
  return kLaunches[call.format](call, stream);
}

}  // namespace puna::cuda
