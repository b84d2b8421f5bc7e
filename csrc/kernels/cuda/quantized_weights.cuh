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

// kTable16 of the codes in the lower halves of a word's bytes, and of those in the upper ones.
__device__ __forceinline__ void look_up(uint32_t codes, uint32_t& low, uint32_t& high) {
  constexpr auto word = [](int i) {
    return static_cast<uint32_t>(kTable16[i]) | static_cast<uint32_t>(kTable16[i + 1]) << 8 |
           static_cast<uint32_t>(kTable16[i + 2]) << 16 |
           static_cast<uint32_t>(kTable16[i + 3]) << 24;
  };
  constexpr uint32_t kWords[4] = {word(0), word(4), word(8), word(12)};
  // An instruction picks four of eight bytes by the lowest three bits of nibbles, as codes are; the
  // highest bit of a code picks one of the two that were found in the halves of the table.
  const uint32_t at = codes & 0x77777777u, half = (codes >> 1 & 0x44444444u) | 0x32103210u;
  const auto of_two_bytes = [&](int shift) {
    const uint32_t lower = __byte_perm(kWords[0], kWords[1], at >> shift);
    const uint32_t upper = __byte_perm(kWords[2], kWords[3], at >> shift);
    return __byte_perm(lower, upper, half >> shift);
  };
  const uint32_t first = of_two_bytes(0), last = of_two_bytes(16);
  low = __byte_perm(first, last, 0x6420);
  high = __byte_perm(first, last, 0x7531);
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
  static __device__ __forceinline__ unsigned place(unsigned chunk) {
    return Format::kBits % 4 == 0 ? chunk ^ (chunk >> 2 & 2) : chunk;
  }
};

// kTable16 of them where the format has it.
template <class Format>
__device__ __forceinline__ void unpack(Codes& codes, const LaneCodes<Format::kBits>& loaded,
                                       int t) {
  if constexpr (Format::kTable) {
    static_assert(Format::kBits == 4);
#pragma unroll
    for (int row = 0; row < 4; ++row)
      look_up(loaded.row_of(loaded.words[0], row), codes.low[row], codes.high[row]);
  } else {
    loaded.unpack(codes, t);
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
__device__ __forceinline__ float fold(float part, float sum, float scale, float offset,
                                      int32_t activations) {
  part = fmaf(sum, scale, part);
  if constexpr (Format::kOffset) part = fmaf(offset, static_cast<float>(activations), part);
  return part;
}
template <class Format>
__device__ __forceinline__ float fold(float part, int32_t sums, float scale, float offset,
                                      int32_t activations) {
  return fold<Format>(part, float_of_sums(sums), scale, offset, activations);
}

// The weights of a stage in shared memory, of kStageColumns columns of a half of a panel: codes
// [step][2 slabs]; of each block the scales and offsets; all small numbers of the block.
template <class Format, int kStageColumns>
struct StagedWeights {
  using Of = Steps<Format>;
  using Layout = PanelLayout<Format>;
  static constexpr int kBlocks = Of::kBlock < kStageColumns ? kStageColumns / Of::kBlock : 1;
  static constexpr int kStepBytes = 2 * static_cast<int>(Layout::kSlab);
  static constexpr int kFactorBytes = 2 * kHalf, kNumberBytes = kHalf;
  static constexpr int kSubPlanes = static_cast<int>(Layout::kSubPlanes);
  static constexpr int kScalesAt = kStageColumns / Of::kColumns * kStepBytes;
  static constexpr int kOffsetsAt = kScalesAt + kBlocks * kFactorBytes;
  static constexpr int kNumbersAt = kOffsetsAt + (Format::kOffset ? kBlocks * kFactorBytes : 0);
  static constexpr int kBytes = kNumbersAt + kSubPlanes * kNumberBytes;
  static_assert(kSubPlanes == 0 || kBlocks == 1);

  // Of kParts parts, as far as these are there, kBytesEach bytes from `from` and `apart` on.
  template <int kParts, int kBytesEach, bool kAll>
  static __device__ __forceinline__ void copy_parts(unsigned char* to, const uint8_t* from,
                                                    int apart, int there) {
    constexpr unsigned kEach = kBytesEach / kChunk;
#pragma unroll
    for (unsigned first = 0; first < kParts * kEach; first += kWarp) {
      const unsigned i = first + threadIdx.x % kWarp, part = i / kEach;
      if (i < kParts * kEach && (kAll || static_cast<int>(part) < there))
        copy_async<kChunk>(to + i * kChunk, from + part * apart + i % kEach * kChunk);
    }
  }
  template <bool kAll>
  static __device__ __forceinline__ void copy_columns(unsigned char* stage, const uint8_t* panel,
                                                      int half, int column, int limit) {
    const int within = column % Of::kBlock;
    const uint8_t* block = panel + static_cast<int64_t>(column / Of::kBlock) * Layout::kBytes;
    // A step is a part of what lies in memory, a block has some of them.
    constexpr unsigned kBlockSteps =
        (Of::kBlock < kStageColumns ? Of::kBlock : kStageColumns) / Of::kColumns;
    constexpr unsigned kChunks = kStepBytes / kChunk;  // of a step
    static_assert(kScalesAt / kChunk % kWarp == 0);
    const unsigned lane = threadIdx.x % kWarp;
    unsigned char* const place = stage + Of::place(lane) * kChunk;  // the same for each turn
    const uint8_t* codes =
        block + Layout::kCodes + within / Of::kColumns * Of::kStepBytes + half * kStepBytes;
#pragma unroll
    for (unsigned first = 0; first < kScalesAt / kChunk; first += kWarp) {
      const unsigned i = first + lane, step = i / kChunks, chunk = i % kChunks;
      if (!kAll && column + static_cast<int>(step) * Of::kColumns >= limit) continue;
      copy_async<kChunk>(place + first * kChunk,
                         codes + step / kBlockSteps * static_cast<unsigned>(Layout::kBytes) +
                             step % kBlockSteps * Of::kStepBytes + chunk * kChunk);
    }
    constexpr int kApart = static_cast<int>(Layout::kBytes);
    const int blocks = (limit - column + Of::kBlock - 1) / Of::kBlock;  // that there are
    copy_parts<kBlocks, kFactorBytes, kAll>(
        stage + kScalesAt, block + Layout::kScale + half * kFactorBytes, kApart, blocks);
    if constexpr (Format::kOffset)
      copy_parts<kBlocks, kFactorBytes, kAll>(
          stage + kOffsetsAt, block + Layout::kOffsets + half * kFactorBytes, kApart, blocks);
    if constexpr (kSubPlanes > 0)
      copy_parts<kSubPlanes, kNumberBytes, true>(
          stage + kNumbersAt, block + Layout::kSub + half * kNumberBytes, kPanel, kSubPlanes);
  }
  // Columns from `column` on, below `limit`, of half `half`; by a warp.
  static __device__ __forceinline__ void copy(unsigned char* stage, const uint8_t* panel, int half,
                                              int column, int limit) {
    if (column + kStageColumns <= limit)
      copy_columns<true>(stage, panel, half, column, limit);
    else
      copy_columns<false>(stage, panel, half, column, limit);
  }

  // A lane's codes of a step.
  static __device__ __forceinline__ void load_codes(Codes& codes, const unsigned char* stage,
                                                    int step) {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    const unsigned char* slab = stage + step * kStepBytes + g / 4 * static_cast<int>(Layout::kSlab);
    LaneCodes<Format::kBits> loaded;
    loaded.load(
        [&](int plane) {
          return *reinterpret_cast<const uint4*>(slab + Of::place(4 * plane + g % 4) * kChunk);
        },
        t);
    unpack<Format>(codes, loaded, t);
  }
  // The scales, and the offsets if there are any, of a lane's four rows in group `group` of block
  // `block` of the stage.
  static __device__ __forceinline__ void load_factors(float (&scales)[4], float (&offsets)[4],
                                                      const unsigned char* stage, int block,
                                                      int group) {
    const int g = threadIdx.x % kWarp / 4;
    const int factors = block * kFactorBytes + 8 * g;
    const unsigned char* numbers = stage + kNumbersAt + 4 * g;
    load_scales<Format, kNumberBytes>(scales, stage + kScalesAt + factors, numbers, group);
    if constexpr (Format::kOffset)
      load_scales<Format, kNumberBytes>(offsets, stage + kOffsetsAt + factors, numbers,
                                        static_cast<int>(Layout::kGroups) + group);
  }
};

}  // namespace puna::cuda
