// Tiles of keys and values from the pages of the KV cache.
#pragma once

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/tile_products.cuh"

namespace puna::cuda {

constexpr int kPageTiles = kPageTokens / kTileTokens;

struct TileOfPage {
  const void* page;
  int number, tokens;  // of the tile; that the page has
};
constexpr int tiles_of(int tokens) { return (tokens + kTileTokens - 1) / kTileTokens; }

// Forms of pages: what is requested of a tile is on its way until it is delivered, to shared
// memory; the threads, which all call these, have to meet before they read it.

template <int kDim>
struct OpenTiles {
  using Keys = Chunks<kDim, true>;
  using Values = Chunks<kTileTokens, true>;
  static __device__ Keys keys(unsigned char* tile) { return {tile}; }
  static __device__ Values values(unsigned char* tile) { return {tile + tile_part_bytes(kDim)}; }

  const AttendCall& call;
  int kv_head;

  __device__ void request_keys(const TileOfPage& of, unsigned char* tile) {
    // Warps take 16 channels of a block of keys, 512 bytes in a row; eight threads take the same
    // half of neighbouring channels.
    static_assert(kKeyBlock == 16 && kDim % 32 == 0);
    constexpr int kPieces = kDim / 16, kBlocks = kTileWarps / kPieces;  // of a block; at a time
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int block = warp / kPieces, half = lane / 8 % 2;
    const int channel = warp % kPieces * 16 + lane % 8 + lane / 16 * 8;
    const unsigned char* key = start(of) + (block * kDim + channel) * 32 + half * 16;
    unsigned char* to = keys(tile).at(channel, 2 * block + half);
#pragma unroll
    for (int i = 0; i < kTileTokens / kKeyBlock; i += kBlocks)
      copy_async(to + i * 2 * Keys::kColumn, key + i * kDim * 32, true);
    commit_copies();
  }
  // Values that zero weights will multiply must be numbers: those of tokens not there become zeros.
  __device__ void request_values(const TileOfPage& of, unsigned char* tile) {
    constexpr int kOctets = kDim / 8, kTokens = kTileThreads / kOctets;  // of a token; at a time
    const int token = threadIdx.x / kOctets, left = of.tokens - of.number * kTileTokens - token;
    const unsigned char* value = start(of) + call.open.part_bytes + threadIdx.x * 16;
    unsigned char* to = values(tile).at(token, threadIdx.x % kOctets);
#pragma unroll
    for (int i = 0; i < kTileTokens; i += kTokens)
      copy_async(to + i * 16, value + i * kDim * 2, i < left);
    commit_copies();
  }
  __device__ void deliver_keys(const TileOfPage&, unsigned char*) {}
  __device__ void deliver_values(const TileOfPage&, unsigned char*) { wait_for_copies<0>(); }

 private:
  __device__ const unsigned char* start(const TileOfPage& of) const {
    return static_cast<const unsigned char*>(of.page) + kv_head * call.open.head_bytes +
           of.number * kTileTokens * kDim * 2;
  }
};

// Eight values, scale * code + zero, of the upper and lower four bits of their codes, which lie as
// in kv_layout.h: numbers 0 .. 3 in the lower halves of the bytes, 4 .. 7 in the upper ones.
template <int kBits>
__device__ __forceinline__ uint4 values_of_codes(uint32_t upper, uint32_t lower, const uint4& scale,
                                                 const uint4& zero) {
  constexpr uint32_t kMask = 0x000f000fu, k128 = 0x43004300u;  // 128 + n has n in its last bits
  constexpr uint32_t kMinus128 = 0xc300c300u, k1 = 0x3f803f80u;
  constexpr uint32_t k16 = 0x41804180u, kMinus2176 = 0xc508c508u;  // -(16 * 128 + 128)
  constexpr uint32_t kNeighbours = 0x3120u;  // bytes 0 and 1, 2 and 3 come to lie 16 bits apart
  upper = __byte_perm(upper, 0, kNeighbours);
  lower = __byte_perm(lower, 0, kNeighbours);
  const auto pair = [&](int shift, uint32_t scales, uint32_t zeros) {
    const uint32_t high = masked_or(upper >> shift, kMask, k128);
    const uint32_t low = kBits == 8 ? masked_or(lower >> shift, kMask, k128) : 0;
    const uint32_t code = kBits == 8 ? fma_bf16_pair(fma_bf16_pair(high, k16, kMinus2176), k1, low)
                                     : fma_bf16_pair(high, k1, kMinus128);  // exact
    return fma_bf16_pair(code, scales, zeros);
  };
  return {pair(0, scale.x, zero.x), pair(8, scale.y, zero.y), pair(4, scale.z, zero.z),
          pair(12, scale.w, zero.w)};
}

// A thread takes the words of a token's keys, and of a channel's values.
template <int kDim, int kBits>
struct SealedTiles {
  using Keys = Chunks<kTileTokens, false>;
  using Values = Chunks<kDim, false>;
  static __device__ Keys keys(unsigned char* tile) { return {tile}; }
  static __device__ Values values(unsigned char* tile) { return {tile + tile_part_bytes(kDim)}; }

  static constexpr int kOctets = kDim / 8;  // of channels; warps take every eighth
  static constexpr int kEach = kOctets / kTileWarps;
  static constexpr int kHalves = kTileTokens / kLineRows, kParts = kDim / kLineRows;
  static constexpr int kLineTokens = 4 * (8 / kBits);  // of a line of values
  static constexpr int kPlanes = kBits / 4;            // words of eight codes
  static_assert(kOctets % kTileWarps == 0 && kTileTokens / 8 == kTileWarps);

  const AttendCall& call;
  int kv_head;
  uint32_t key[kEach][kHalves][kPlanes] = {}, value[kParts][kPlanes] = {};
  uint4 value_scales = {}, value_zeros = {};  // of eight tokens

  static __device__ const unsigned char* bytes(const TileOfPage& of, int64_t offset) {
    return static_cast<const unsigned char*>(of.page) + offset;
  }

  __device__ void request_keys(const TileOfPage& of, unsigned char*) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const unsigned char* line = bytes(of, kv_head * call.closed.plane_bytes) +
                                (of.number * kHalves * kOctets + warp) * kSealedLine + lane * 4;
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane, line += call.closed.lower)
#pragma unroll
      for (int i = 0; i < kEach; ++i)
#pragma unroll
        for (int half = 0; half < kHalves; ++half)
          key[i][half][plane] = load_word(line + (half * kOctets + i * kTileWarps) * kSealedLine);
  }
  __device__ void request_values(const TileOfPage& of, unsigned char*) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const unsigned char* line = bytes(of, call.closed.values + kv_head * call.closed.code_bytes) +
                                (of.number * kTileTokens + warp * 8) / kLineTokens * kSealedLine +
                                lane * 4;
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane)
        value[part][plane] =
            load_word(line + (part * (kPageTokens / kLineTokens) + plane) * kSealedLine);
    const int64_t offset = call.closed.value_scales + kv_head * call.closed.value_scale_bytes;
    const unsigned char* scales = bytes(of, offset) + (of.number * kTileTokens + warp * 8) * 2;
    value_scales = load_words(scales);
    value_zeros = load_words(scales + kPageTokens * 2);
  }

  __device__ void deliver_keys(const TileOfPage& of, unsigned char* tile) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int64_t offset = call.closed.key_scales + kv_head * call.closed.key_scale_bytes;
    const unsigned char* scales = bytes(of, offset);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int octet = i * kTileWarps + warp;
      const uint4 scale = load_words(scales + octet * 16),
                  zero = load_words(scales + (kOctets + octet) * 16);
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
        *reinterpret_cast<uint4*>(keys(tile).at(half * kLineRows + lane, octet)) =
            values_of_codes<kBits>(key[i][half][0], key[i][half][kPlanes - 1], scale, zero);
    }
  }
  __device__ void deliver_values(const TileOfPage&, unsigned char* tile) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      uint32_t upper = value[part][0], lower = 0;
      if constexpr (kBits == 8) {  // whole bytes of four tokens, then of four more
        constexpr uint32_t kLow = 0x0f0f0f0fu;
        lower = (upper & kLow) | (value[part][1] & kLow) << 4;
        upper = (upper >> 4 & kLow) | (value[part][1] & ~kLow);
      }
      *reinterpret_cast<uint4*>(values(tile).at(part * kLineRows + lane, warp)) =
          values_of_codes<kBits>(upper, lower, value_scales, value_zeros);
    }
  }
};

}  // namespace puna::cuda
