// Quantised weights as the integer tensor cores take them: codes go in as they lie in memory
// (quant/panel.h), without sign, and what that adds is taken off by the sums of the activations.
#pragma once

#include "kernels/cuda/product.cuh"
#include "quant/panel.h"

namespace puna::cuda {

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
template <int kBits, bool kSplit = kTwoPlanes<kBits>>
struct LaneCodes;

template <int kBits>
struct LaneCodes<kBits, false> {
  // 8 bits: vectors t and t + 4; 4: plane t has both; 2: planes 0 and 1 have four vectors each; 1:
  // all in one plane.
  static constexpr int kLoads = kBits == 8 || kBits == 2 ? 2 : 1;
  uint4 words[kLoads];

  // read(plane) are its 16 bytes of a plane.
  template <class Read>
  __device__ __forceinline__ void load(const Read& read, int t) {
    const int first = kBits >= 4 ? t : 0, step = kBits == 8 ? 4 : 1;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) words[i] = read(first + step * i);
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
  static constexpr int kLow = kLowBits<kBits>;
  LaneCodes<kLow> low;
  LaneCodes<kBits - kLow> high;

  template <class Read>
  __device__ __forceinline__ void load(const Read& read, int t) {
    low.load(read, t);
    high.load([&](int plane) { return read(kLow + plane); }, t);
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

// How groups of columns, which have a scale of their own, and the products' steps of 32 columns fit
// together.
template <class Format>
struct Steps {
  using Layout = PanelLayout<Format>;
  static constexpr int kColumns = static_cast<int>(kSlabCols);  // of a step
  static constexpr int kGroup = static_cast<int>(Format::kGroup);
  static constexpr int kBlock = static_cast<int>(Format::kBlock);
  // Groups of 16 columns are the halves of a step, others are steps. A piece is either.
  static constexpr int kGroupsEach = kGroup < kColumns ? kColumns / kGroup : 1;
  static constexpr int kStepsEach = kGroup < kColumns ? 1 : kGroup / kColumns;
  static constexpr int kPieceColumns = kStepsEach * kColumns;
  static constexpr int kStepBytes = static_cast<int>(kPanelRows / kSlabRows * Layout::kSlab);

  // Where chunk `chunk` of 16 bytes of slabs lies in shared memory. Lanes of one g load from planes
  // of 64 bytes at a time: of every other pair of planes, pairs of chunks change places, so that
  // planes 128 bytes apart do not meet in a bank.
  static __device__ __forceinline__ int place(int chunk) {
    return Format::kBits % 4 == 0 ? chunk ^ (chunk >> 2 & 2) : chunk;
  }
};

// kTable16 where the format has it.
template <class Format>
__device__ __forceinline__ void unpack(Codes& codes, const LaneCodes<Format::kBits>& loaded,
                                       int t) {
  loaded.unpack(codes, t);
  if constexpr (Format::kTable) {
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      codes.low[row] = look_up(codes.low[row]);
      codes.high[row] = look_up(codes.high[row]);
    }
  }
}

// sums = c + codes * x, for tile j of a half and group `each` of a step (both halves of a step if
// there is one).
template <class Format>
__device__ __forceinline__ void multiply_step(int32_t (&sums)[4], const Codes& codes, int j,
                                              int each, uint32_t low, uint32_t high,
                                              const int32_t (&c)[4]) {
  const uint32_t *first = codes.low + 2 * j, *last = codes.high + 2 * j;
  if constexpr (Steps<Format>::kGroupsEach == 1)
    mma_u8s8(sums, {first[0], first[1], last[0], last[1]}, low, high, c);
  else if (each == 0)
    mma_u8s8_half(sums, first[0], first[1], low, c);
  else
    mma_u8s8_half(sums, last[0], last[1], high, c);
}

// Sums of products start from what stands for 0 as the bits of a float, less what the zero point
// adds: then their bits are 1.5 * 2^23 more than the sum, which is exact as a float.
constexpr uint32_t kZeroBits = 0x4b400000u;
template <class Format>
__device__ __forceinline__ int32_t start_of_sums(int32_t activations) {
  constexpr int kMostCode = Format::kTable ? 255 : (1 << Format::kBits) - 1;
  constexpr int kMost =
      Format::kZero > kMostCode - Format::kZero ? Format::kZero : kMostCode - Format::kZero;
  static_assert(kMost * 127 * Format::kGroup < 1 << 22, "a sum that is not exact");
  return static_cast<int32_t>(kZeroBits - static_cast<uint32_t>(Format::kZero) *
                                              static_cast<uint32_t>(activations));
}
__device__ __forceinline__ float float_of_sums(int32_t sums) {
  return __uint_as_float(static_cast<uint32_t>(sums)) - 0x1.8p23f;
}

// Number n of a block for a lane's four rows, a byte each; planes are `Apart` bytes from each
// other.
template <class Format, int Bits, int Apart>
__device__ __forceinline__ uint32_t load_numbers(const unsigned char* planes, int n) {
  if constexpr (kTwoPlanes<Bits>) {
    constexpr int kLow = kLowBits<Bits>;
    const unsigned char* high = planes + kNumberPlanes<Format, kLow> * Apart;
    return load_numbers<Format, kLow, Apart>(planes, n) |
           load_numbers<Format, Bits - kLow, Apart>(high, n) << kLow;
  } else {
    const auto* word = planes + number_plane<Format, Bits>(n) * Apart;
    return bits_at<(1 << Bits) - 1>(*reinterpret_cast<const uint32_t*>(word),
                                    number_shift<Format, Bits>(n));
  }
}

// The scales or offsets of a lane's four rows in a group: four fp16 at `factors`, times number n if
// there are any.
template <class Format, int Apart>
__device__ __forceinline__ void load_scales(float (&scales)[4], const unsigned char* factors,
                                            const unsigned char* planes, int n) {
  using Number = std::conditional_t<Format::kSubBits == 8, int8_t, uint8_t>;
  const auto pairs = *reinterpret_cast<const uint2*>(factors);
  uint32_t numbers = 0;
  if constexpr (Format::kSubBits > 0)
    numbers = load_numbers<Format, Format::kSubBits, Apart>(planes, n);
#pragma unroll
  for (int row = 0; row < 4; ++row) {
    const uint32_t pair = row < 2 ? pairs.x : pairs.y;
    scales[row] = float_of_f16(static_cast<uint16_t>(pair >> 16 * (row % 2)));
    if constexpr (Format::kSubBits > 0)
      scales[row] *= static_cast<float>(static_cast<Number>(numbers >> 8 * row) -
                                        PanelLayout<Format>::kSubZero);
  }
}

// part += scale * sum of the group, then + offset * sum of the activations, for row `row` of a
// lane's four.
template <class Format>
__device__ __forceinline__ float fold(float part, int32_t sums, float scale, float offset,
                                      int32_t activations) {
  part = fmaf(float_of_sums(sums), scale, part);
  if constexpr (Format::kOffset) part = fmaf(offset, static_cast<float>(activations), part);
  return part;
}

}  // namespace puna::cuda
