// Products of many rows with quantised weights, by warpgroups.
#include "kernels/cuda/quantized_tiles.cuh"
#include "kernels/cuda/warpgroup_product.cuh"

namespace puna::cuda {
namespace {

template <class Format>
struct QuantizedWarpgroups : QuantizedStages<Format, WarpgroupShape> {
  using Stages = QuantizedStages<Format, WarpgroupShape>;
  using typename Stages::Layout, typename Stages::Of;
  static constexpr int kParts = WarpgroupShape::kParts;
  static constexpr int kPartTiles = kWarpgroupColumns / kTileTokens;
  static_assert(Of::kGroupsEach == 1, "products of warpgroups have no half steps");

  // Whether the products of one part are carried out while the sums of the other are scaled. With
  // offsets for each step, there are not the registers.
  static constexpr bool kTogether = !Format::kOffset || Of::kGroup > Of::kColumns;

  using Stages::Stages;

#if PUNA_WARPGROUPS
  __device__ __forceinline__ void add(const WarpgroupPlace& place, const unsigned char* stage,
                                      int column) {
    float span[kParts][kWarpgroupSums] = {};
#pragma unroll
    for (int piece = 0; piece < kSpan / Of::kPieceColumns; ++piece) {
      if (piece > 0 && column + piece * Of::kPieceColumns >= Stages::limit) break;
      add_piece(span, place, stage, piece, column);
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int n = 0; n < kPartTiles; ++n) {
        const float2 scale =
            *reinterpret_cast<const float2*>(stage + Stages::kScalesAt + token(place, part, n) * 4);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sums[part][4 * n + i] =
              fmaf(span[part][4 * n + i], i % 2 == 0 ? scale.x : scale.y, sums[part][4 * n + i]);
      }
  }

  // The first of the two tokens of a lane among 8.
  static __device__ __forceinline__ int token(const WarpgroupPlace& place, int part, int n) {
    return part * kWarpgroupColumns + n * kTileTokens + 2 * place.t;
  }

  __device__ __forceinline__ void add_piece(float (&span)[kParts][kWarpgroupSums],
                                            const WarpgroupPlace& place, const unsigned char* stage,
                                            int piece, int column) const {
    const int first = piece * Of::kPieceColumns;  // column of the stage
    const unsigned char* block =
        stage + place.panel * Stages::kPanelBytes + first / Of::kBlock * Stages::kBlockBytes;
    const unsigned char* sums_of_group =
        stage + Stages::kSumsAt + first / Of::kGroup * Stages::kTokens * 4;
    const auto activations = [&](int part, int n) {
      return *reinterpret_cast<const uint2*>(sums_of_group + token(place, part, n) * 4);
    };
    uint32_t weights[Of::kStepsEach][4];
#pragma unroll
    for (int step = 0; step < Of::kStepsEach; ++step)
      load_weights(weights[step], place, block, first, step);

    int32_t dots[kParts][kWarpgroupSums];
    const int own = (column % Of::kBlock + first % Of::kBlock) / Of::kGroup;
    float scales[2], offsets[2] = {};
    load_two<0>(scales, place, block, own);
    if constexpr (Format::kOffset) load_two<1>(offsets, place, block, own);
    const auto fold_part = [&](int part) {
#pragma unroll
      for (int n = 0; n < kPartTiles; ++n) {
        const uint2 of = activations(part, n);
        // What sums would start from is added now: registers that other instructions write before
        // the products make these wait.
        const int32_t token_sums[2] = {static_cast<int32_t>(of.x), static_cast<int32_t>(of.y)};
#pragma unroll
        for (int i = 0; i < 4; ++i)
          span[part][4 * n + i] =
              fold<Format>(span[part][4 * n + i],
                           dots[part][4 * n + i] + start_of_sums<Format>(token_sums[i % 2]),
                           scales[i / 2], offsets[i / 2], token_sums[i % 2]);
      }
    };
    const auto multiply = [&](int part) {
      const SharedOperand rows =
          shared_operand(stage + Stages::kRowsAt + part * kWarpgroupColumns * kRowBytes);
#pragma unroll
      for (int step = 0; step < Of::kStepsEach; ++step) {
        const SharedOperand operand = rows.after(first / Of::kColumns + step);
        if (step == 0)
          warpgroup_mma_u8s8<false>(dots[part], weights[step], operand);
        else
          warpgroup_mma_u8s8<true>(dots[part], weights[step], operand);
      }
      commit_products();
    };
    static_assert(kParts == 2);
    if constexpr (kTogether) {
      fence_products();  // of both: between them it would wait for the first
      multiply(0);
      multiply(1);
      wait_for_products<1>(dots[0]);
      fold_part(0);
    } else {
      fence_products();
      multiply(0);
      wait_for_products<0>(dots[0]);
      fold_part(0);
      fence_products();
      multiply(1);
    }
    wait_for_products<0>(dots[1]);
    fold_part(1);
  }

  // The left operand of step `step` of the piece.
  static __device__ __forceinline__ void load_weights(uint32_t (&to)[4],
                                                      const WarpgroupPlace& place,
                                                      const unsigned char* block, int first,
                                                      int step) {
    const unsigned char* slab = block + Layout::kCodes +
                                (first % Of::kBlock / Of::kColumns + step) * Of::kStepBytes +
                                place.row / 16 * Layout::kSlab + place.row % 4 * 4;
    LaneCodes<Format::kBits> loaded;
    loaded.load(
        [&](int plane) {  // two rows
          const auto two =
              *reinterpret_cast<const uint2*>(slab + Of::place(4 * plane + place.g % 4) * kChunk);
          return uint4{two.x, two.y, 0, 0};
        },
        place.t);
    Codes codes;
    unpack<Format>(codes, loaded, place.t);
    to[0] = codes.low[0];
    to[1] = codes.low[1];
    to[2] = codes.high[0];
    to[3] = codes.high[1];
  }

  // The scales, or the offsets (kOffsets), of the lane's two rows of the four that lie together.
  template <int kOffsets>
  static __device__ __forceinline__ void load_two(float (&to)[2], const WarpgroupPlace& place,
                                                  const unsigned char* block, int group) {
    const int first = place.row / 4 * 4;
    float four[4];
    load_scales<Format, kPanel>(
        four, block + (kOffsets ? Layout::kOffsets : Layout::kScale) + 2 * first,
        block + Layout::kSub + first, kOffsets * static_cast<int>(Layout::kGroups) + group);
#pragma unroll
    for (int i = 0; i < 2; ++i) to[i] = place.row % 4 == 0 ? four[i] : four[2 + i];
  }
#endif

  WarpgroupSums sums = {};
};

// Null where there are none: groups of 16 are half of what a product sums up.
using Launch = int (*)(const ProductCall&, Stream);
template <class Format>
constexpr Launch launch_of() {
  if constexpr (Steps<Format>::kGroupsEach == 1)
    return &launch_warpgroup_product<QuantizedWarpgroups<Format>>;
  else
    return nullptr;
}
constexpr Launch kLaunches[] = {
#define PUNA_FORMAT(Traits, name) launch_of<Traits>(),
#include "quant/formats.inc"
#undef PUNA_FORMAT
};

}  // namespace

int launch_quantized_warpgroups(const ProductCall& call, Stream stream) {
  const Launch own = kLaunches[call.format];
  return own != nullptr ? own(call, stream) : launch_quantized_large_tiles(call, stream);
}

}  // namespace puna::cuda
