// Products with quantised weights on the integer tensor cores; codes go in as they lie in memory
// (quant/panel.h), without sign, and what that adds is taken off by the sums of the activations.
#include "kernels/cuda/product.cuh"
#include "quant/panel.h"

namespace puna::cuda {
namespace {

// A lane's codes of 32 columns and 4 rows, a word of 4 columns each: `low` columns 4 t .. 4 t + 3,
// `high` columns 16 + 4 t ...
struct Codes {
  uint32_t low[4], high[4];
};

template <int kMask>
__device__ __forceinline__ uint32_t bits_at(uint32_t word, int shift) {
  return word >> shift & kMask * 0x01010101u;
}

// What a lane loads of a slab (32 columns, 16 rows, kBits planes of 64 bytes): 16 bytes of each
// plane that it has codes in.
template <int kBits>
struct Planes {
  static constexpr int kLow = kBits == 3 ? 2 : 4;  // of formats with two kinds of planes
  static constexpr bool kSplit = kBits == 3 || kBits == 5 || kBits == 6;
};

template <int kBits, bool kSplit = Planes<kBits>::kSplit>
struct LaneCodes;

template <int kBits>
struct LaneCodes<kBits, false> {
  // 8 bits: vectors t and t + 4; 4: plane t has both; 2: planes 0 and 1 have four vectors each; 1:
  // all in one plane.
  static constexpr int kLoads = kBits == 8 || kBits == 2 ? 2 : 1;
  uint4 words[kLoads];

  __device__ __forceinline__ void load(const uint8_t* at, int t) {
    const int first = kBits >= 4 ? t : 0, step = kBits == 8 ? 4 : 1;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) words[i] = load_streaming(at + 64 * (first + step * i));
  }
  __device__ __forceinline__ void unpack(Codes& codes, int t) const {
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      const uint32_t first = row_of(words[0], row), last = row_of(words[kLoads - 1], row);
      if constexpr (kBits == 8) {
        codes.low[row] = first;
        codes.high[row] = last;
      } else if constexpr (kBits == 4) {
        codes.low[row] = bits_at<15>(first, 0);
        codes.high[row] = bits_at<15>(first, 4);
      } else if constexpr (kBits == 2) {
        codes.low[row] = bits_at<3>(first, 2 * t);
        codes.high[row] = bits_at<3>(last, 2 * t);
      } else {
        codes.low[row] = bits_at<1>(first, t);
        codes.high[row] = bits_at<1>(first, t + 4);
      }
    }
  }
  static __device__ __forceinline__ uint32_t row_of(const uint4& words, int row) {
    return row == 0 ? words.x : row == 1 ? words.y : row == 2 ? words.z : words.w;
  }
};

template <int kBits>
struct LaneCodes<kBits, true> {
  static constexpr int kLow = Planes<kBits>::kLow;
  LaneCodes<kLow> low;
  LaneCodes<kBits - kLow> high;

  __device__ __forceinline__ void load(const uint8_t* at, int t) {
    low.load(at, t);
    high.load(at + 64 * kLow, t);
  }
  __device__ __forceinline__ void unpack(Codes& codes, int t) const {
    Codes upper;
    low.unpack(codes, t);
    high.unpack(upper, t);
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      codes.low[row] |= upper.low[row] << kLow;
      codes.high[row] |= upper.high[row] << kLow;
    }
  }
};

// kTable16 of four codes.
__device__ __forceinline__ uint32_t look_up(uint32_t codes) {
  constexpr auto word = [](int i) {
    return static_cast<uint32_t>(kTable16[i]) | static_cast<uint32_t>(kTable16[i + 1]) << 8 |
           static_cast<uint32_t>(kTable16[i + 2]) << 16 |
           static_cast<uint32_t>(kTable16[i + 3]) << 24;
  };
  constexpr uint32_t kWords[4] = {word(0), word(4), word(8), word(12)};
  // A nibble for each code, with the top bit of the code, which chooses the half of the table,
  // apart.
  const uint32_t low = codes & 0x07070707u, upper = (codes >> 3 & 0x01010101u) * 0xffu;
  const uint32_t selector =
      (low & 7u) | (low >> 4 & 0x70u) | (low >> 8 & 0x700u) | (low >> 12 & 0x7000u);
  const uint32_t first = __byte_perm(kWords[0], kWords[1], selector);
  const uint32_t second = __byte_perm(kWords[2], kWords[3], selector);
  return (first & ~upper) | (second & upper);
}

template <class Format>
struct QuantizedWeights {
  static constexpr bool kScaled = true;
  using Layout = PanelLayout<Format>;
  static constexpr int kColumns = static_cast<int>(kSlabCols);  // of a step
  static constexpr int kGroup = static_cast<int>(Format::kGroup);
  static constexpr int kBlock = static_cast<int>(Format::kBlock);
  // Groups of 16 columns are the halves of a step, others are steps.
  static constexpr int kGroupsEach = kGroup < kColumns ? kColumns / kGroup : 1;
  static constexpr int kStepsEach = kGroup < kColumns ? 1 : kGroup / kColumns;

  template <int kTokenTiles>
  using Dots = int32_t[kHalves][kTilesEach][kTokenTiles][4];

  // The scales, or offsets, of a lane's rows in a group: factors fp16 of the block, times small
  // whole numbers of the group if there are any.
  template <class Small>
  static __device__ __forceinline__ void read_scales(float (&scales)[4], const uint8_t* factors,
                                                     const uint8_t* numbers) {
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      const float factor = float_of_f16(reinterpret_cast<const uint16_t*>(factors)[row]);
      scales[row] = Format::kSubScales
                        ? factor * static_cast<float>(reinterpret_cast<const Small*>(numbers)[row])
                        : factor;
    }
  }

  template <int kTokenTiles>
  static __device__ void span(float* part, const uint8_t* panel, const ProductCall& call, int span,
                              const Tokens& tokens) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    Sums<kTokenTiles> sums = {};
    const int begin = span * kSpan;
    const int padded = static_cast<int>(call.x.stride);
    const int end = begin + kSpan < padded ? begin + kSpan : padded;
    for (int column = begin; column < end; column += kStepsEach * kColumns) {
      const uint8_t* block = panel + static_cast<int64_t>(column / kBlock) * Layout::kBytes;
      const int within = column % kBlock;
      Dots<kTokenTiles> dots[kGroupsEach] = {};
      LaneCodes<Format::kBits> loaded[kStepsEach][kHalves];
#pragma unroll
      for (int step = 0; step < kStepsEach; ++step)
#pragma unroll
        for (int h = 0; h < kHalves; ++h) {
          // Rows 4 g .. 4 g + 3 of a half are a quarter of slab g / 4 of its two.
          const int slab = (within / kColumns + step) * (kPanel / 16) + 2 * h + g / 4;
          loaded[step][h].load(block + Layout::kCodes + slab * Layout::kSlab + 16 * (g % 4), t);
        }
#pragma unroll
      for (int step = 0; step < kStepsEach; ++step)
        multiply<kTokenTiles>(dots, loaded[step], call, column + step * kColumns, tokens);
#pragma unroll
      for (int each = 0; each < kGroupsEach; ++each)
        scale<kTokenTiles>(sums, dots[each], block, within / kGroup + each, call,
                           column / kGroup + each, tokens);
    }
    store_sums(part, sums);
  }

  template <int kTokenTiles>
  static __device__ __forceinline__ void multiply(Dots<kTokenTiles> (&dots)[kGroupsEach],
                                                  const LaneCodes<Format::kBits> (&loaded)[kHalves],
                                                  const ProductCall& call, int column,
                                                  const Tokens& tokens) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    Codes codes[kHalves];
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      loaded[h].unpack(codes[h], t);
      if constexpr (Format::kTable) {
#pragma unroll
        for (int row = 0; row < 4; ++row) {
          codes[h].low[row] = look_up(codes[h].low[row]);
          codes[h].high[row] = look_up(codes[h].high[row]);
        }
      }
    }
    const auto* x = static_cast<const uint8_t*>(call.x.data);
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const int token = n * kTileTokens + g;
      uint32_t b[2] = {0, 0};
      if (token < tokens.count) {
        const uint8_t* at = x + (tokens.first + token) * call.x.stride + column + 4 * t;
        b[0] = *reinterpret_cast<const uint32_t*>(at);
        b[1] = *reinterpret_cast<const uint32_t*>(at + kColumns / 2);
      }
#pragma unroll
      for (int h = 0; h < kHalves; ++h)
#pragma unroll
        for (int j = 0; j < kTilesEach; ++j) {
          const uint32_t *low = codes[h].low + 2 * j, *high = codes[h].high + 2 * j;
          if constexpr (kGroupsEach == 2) {
            mma_u8s8_half(dots[0][h][j][n], low[0], low[1], b[0]);
            mma_u8s8_half(dots[1][h][j][n], high[0], high[1], b[1]);
          } else {
            mma_u8s8(dots[0][h][j][n], {low[0], low[1], high[0], high[1]}, b[0], b[1]);
          }
        }
    }
  }

  // sums += scale * dot + offset * sum of the activations, for a group: number `group` of the
  // matrix, `own` of the block.
  template <int kTokenTiles>
  static __device__ __forceinline__ void scale(Sums<kTokenTiles>& sums,
                                               const Dots<kTokenTiles>& dots, const uint8_t* block,
                                               int own, const ProductCall& call, int group,
                                               const Tokens& tokens) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    float scales[kHalves][4], offsets[kHalves][4];
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const int row = 32 * h + 4 * g;
      read_scales<int8_t>(scales[h], block + Layout::kScale + 2 * row,
                          block + Layout::kSubScale + own * kPanel + row);
      if constexpr (Format::kOffset)
        read_scales<uint8_t>(offsets[h], block + Layout::kOffsets + 2 * row,
                             block + Layout::kSubOffset + own * kPanel + row);
    }
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n)
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int token = n * kTileTokens + 2 * t + column;
        const int32_t sum =
            token < tokens.count ? call.x.sums[(tokens.first + token) * call.x.groups + group] : 0;
#pragma unroll
        for (int h = 0; h < kHalves; ++h)
#pragma unroll
          for (int row = 0; row < 4; ++row) {
            const int i = row % 2 * 2 + column;
            float& to = sums.value[h][row / 2][n][i];
            const int32_t dot = dots[h][row / 2][n][i] - Format::kZero * sum;
            to = fmaf(static_cast<float>(dot), scales[h][row], to);
            if constexpr (Format::kOffset) to = fmaf(offsets[h][row], static_cast<float>(sum), to);
          }
      }
  }
};

}  // namespace

int launch_quantized_product(const ProductCall& call, Stream stream) {
  using Launch = int (*)(const ProductCall&, Stream);
  constexpr Launch kLaunches[] = {
#define PUNA_FORMAT(Traits, name) &launch_product_of<QuantizedWeights<Traits>>,
#include "quant/formats.inc"
#undef PUNA_FORMAT
  };
  return kLaunches[call.format](call, stream);
}

}  // namespace puna::cuda
