// Parts of pages that come to shared memory as they lie in the page, one after the other, for
// attention that takes as long as they take to arrive. Sealed ones stay codes until products need
// them: each value is an operand once, and is unsealed to the register that it is.
//
// A form of parts has
//   kTokens, kBytes      of a part of keys, or of values; of its place
//   kInterleaved         whether the columns of two products take turns, as load_wide() has them
//   copy_keys, copy_values (part, page, place)
//   keys(place), values(place, tile)   right operands, as Chunks
#pragma once

#include "kernels/cuda/page_tiles.cuh"

namespace puna::cuda {

struct PartOfPage {
  const void* page;
  int number, tokens;  // of the part; that the page has
};

template <int kDim>
struct OpenParts {
  using Tiles = OpenTiles<kDim>;
  static constexpr bool kOpen = true, kInterleaved = false;
  static constexpr int kTokens = kTileTokens, kBytes = tile_part_bytes(kDim);

  Tiles tiles;
  __device__ OpenParts(const AttendCall& call, int kv_head) : tiles{call, kv_head} {}

  __device__ void copy_keys(const PartOfPage& of, unsigned char* place) const {
#pragma unroll
    for (int piece = 0; piece < Tiles::kCopies; ++piece)
      tiles.copy_keys(piece, {of.page, of.number, of.tokens}, place);
  }
  __device__ void copy_values(const PartOfPage& of, unsigned char* place) const {
#pragma unroll
    for (int piece = 0; piece < Tiles::kCopies; ++piece)
      tiles.copy_values(piece, {of.page, of.number, of.tokens}, place);
  }
  static __device__ auto keys(unsigned char* place) { return Tiles::keys(place); }
  static __device__ auto values(unsigned char* place, int) { return Tiles::values(place); }
};

// --- sealed pages --------------------------------------------------------------------------------

// A pair of numbers 2 t and 2 t + 1, with t = lane % 4, of the eight of a key's or a value's
// scales, and of their zero points.
struct ScalePair {
  uint32_t scales, zeros;
};
// They come to lie side by side. The zero points are so many bytes behind the scales.
template <int kPairs>
__device__ __forceinline__ void copy_scales(unsigned char* to, const unsigned char* scales,
                                            int zeros) {
  static_assert(2 * kPairs <= kTileThreads);
  const int pair = threadIdx.x % kPairs, which = threadIdx.x / kPairs;
  if (which < 2) copy_async<4>(to + pair * 8 + which * 4, scales + which * zeros + pair * 4);
}
__device__ __forceinline__ ScalePair scale_pair(const unsigned char* from, int octet) {
  const uint2 pair =
      *reinterpret_cast<const uint2*>(from + (4 * octet + threadIdx.x % 4) * sizeof(ScalePair));
  return {pair.x, pair.y};
}
// Of words of codes the lane has numbers 2 t and 2 t + 1, modulo 4: of bytes, or of halves of them,
// the lower ones, or the upper ones once the word is shifted by half_shift(). Its values of two
// words:
__device__ __forceinline__ int half_shift() { return threadIdx.x % 4 / 2 * 4; }
template <int kBits>
__device__ __forceinline__ uint2 own_values(uint32_t first, uint32_t second, const ScalePair& by) {
  const bool even = threadIdx.x % 2 == 0;
  if constexpr (kBits == 8) {
    const uint32_t own = even ? kFirstBytes : kLastBytes;
    return {values_of_bytes(first, own, by.scales, by.zeros),
            values_of_bytes(second, own, by.scales, by.zeros)};
  } else {
    // The first one's in even bytes, the second one's in odd ones.
    const uint32_t codes = __byte_perm(first, second, even ? 0x5140u : 0x7362u) >> half_shift();
    return {values_of_nibbles(codes, by.scales, by.zeros),
            values_of_nibbles(codes >> 8, by.scales, by.zeros)};
  }
}

// Columns [n, n + 8) and [n + 8, n + 16) of two products are rows n, n + 2, ... and n + 1, n + 3,
// ...: a lane loads both at once.
template <int kDim, int kBits>
struct SealedParts {
  static constexpr bool kOpen = false, kInterleaved = true;
  static constexpr int kPlanes = kBits / 4;
  static constexpr int kTokens = kPageTokens / kPlanes;  // as many bytes of either
  static constexpr int kLineTokens = 4 * (8 / kBits);    // of a line of values
  static constexpr int kOctets = kDim / 8, kBlocks = kDim / kLineRows;
  static constexpr int kLines = kTokens / kLineTokens;  // of a block of values
  static constexpr int kPlaneBytes = kTokens * kDim / 2, kCodeBytes = kPlanes * kPlaneBytes;
  static constexpr int kBytes = kCodeBytes + larger(kDim, kTokens) * 4;
  static_assert(kLines * kSealedLine == kTileThreads * 16 &&
                kPlaneBytes % (kTileThreads * 16) == 0);

  const AttendCall& call;
  int kv_head;
  __device__ SealedParts(const AttendCall& call, int kv_head) : call(call), kv_head(kv_head) {}

  __device__ void copy_keys(const PartOfPage& of, unsigned char* place) const {
    const SealedPages& at = call.closed;
    const unsigned char* codes = of_head(of, 0, at.plane_bytes) + of.number * kPlaneBytes;
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane, codes += at.lower)
#pragma unroll
      for (int i = 0; i < kPlaneBytes; i += kTileThreads * 16) {
        const int byte = i + static_cast<int>(threadIdx.x) * 16;
        copy_async<16>(place + plane * kPlaneBytes + byte, codes + byte);
      }
    const unsigned char* scales = of_head(of, at.key_scales, at.key_scale_bytes);
    copy_scales<kDim / 2>(place + kCodeBytes, scales, kDim * 2);
  }
  __device__ void copy_values(const PartOfPage& of, unsigned char* place) const {
    const SealedPages& at = call.closed;
    const int line = threadIdx.x / 8, chunk = threadIdx.x % 8;
    const unsigned char* codes = of_head(of, at.values, at.code_bytes) +
                                 (of.number * kLines + line) * kSealedLine + chunk * 16;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
      copy_async<16>(place + (block * kLines + line) * kSealedLine + (chunk * 16 ^ turned(line)),
                     codes + block * (kPageTokens / kLineTokens) * kSealedLine);
    const unsigned char* scales =
        of_head(of, at.value_scales, at.value_scale_bytes) + of.number * kTokens * 2;
    copy_scales<kTokens / 2>(place + kCodeBytes, scales, kPageTokens * 2);
  }
  // Where the lanes of a load have two lines, their bytes lie in different banks.
  static __device__ int turned(int line) { return kBits == 8 ? line % 2 * (kSealedLine / 2) : 0; }

  // The head's share of a region. Offsets fit 32 bits, whose products take one instruction.
  __device__ const unsigned char* of_head(const PartOfPage& of, int64_t region,
                                          int64_t head_bytes) const {
    return static_cast<const unsigned char*>(of.page) + static_cast<int32_t>(region) +
           kv_head * static_cast<int32_t>(head_bytes);
  }

  struct Keys {
    const unsigned char* place;
    // Products sum over channels, columns are tokens.
    __device__ void load_wide(uint32_t (&b)[4], int k, int n) const {
      const int g = threadIdx.x % kWarp / 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int octet = k / 8 + half;
        const unsigned char* line =
            place + (n / kLineRows * kOctets + octet) * kSealedLine + (n % kLineRows + 2 * g) * 4;
        const auto words = [&](int plane) {
          return *reinterpret_cast<const uint2*>(line + plane * kPlaneBytes);
        };
        const ScalePair by = scale_pair(place + kCodeBytes, octet);
        uint2 codes = words(0);
        if constexpr (kBits == 8) {
          const uint2 lower = words(1);
          const auto join = [](uint32_t high, uint32_t low) {
            return joined_halves(high << (4 - half_shift()), low >> half_shift());
          };
          codes = {join(codes.x, lower.x), join(codes.y, lower.y)};
        }
        const uint2 values = own_values<kBits>(codes.x, codes.y, by);
        b[half] = values.x;
        b[2 + half] = values.y;
      }
    }
  };
  struct Values {
    const unsigned char* place;
    int first;  // octet of tokens
    // Products sum over tokens, columns are channels.
    __device__ void load_wide(uint32_t (&b)[4], int k, int n) const {
      const int g = threadIdx.x % kWarp / 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int octet = first + k / 8 + half;
        const uint2 words = *reinterpret_cast<const uint2*>(at(octet, n + 2 * g));
        const uint2 values = own_values<kBits>(words.x, words.y, scales(octet));
        b[half] = values.x;
        b[2 + half] = values.y;
      }
    }
    __device__ void load_deep(uint32_t (&b)[4], int k, int n) const {
      const int g = threadIdx.x % kWarp / 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int octet = first + k / 8 + i;
        const uint32_t word = *reinterpret_cast<const uint32_t*>(at(octet, n + g));
        b[i] = own_values<kBits>(word, word, scales(octet)).x;
      }
    }

   private:
    __device__ const unsigned char* at(int octet, int channel) const {
      const int t = threadIdx.x % 4, line = kBits == 8 ? octet * 2 + t / 2 : octet;
      return place + (channel / kLineRows * kLines + line) * kSealedLine +
             (channel % kLineRows * 4 ^ turned(line));
    }
    __device__ ScalePair scales(int octet) const { return scale_pair(place + kCodeBytes, octet); }
  };
  static __device__ Keys keys(unsigned char* place) { return {place}; }
  static __device__ Values values(unsigned char* place, int tile) {
    return {place, tile * (kTileTokens / 8)};
  }
};

}  // namespace puna::cuda
