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
  static __device__ Keys keys(unsigned char* part) { return {part}; }
  static __device__ Values values(unsigned char* part) { return {part}; }

  const AttendCall& call;
  int kv_head;

  // Of all threads' copies, the first few of a tile are of keys, the others of values.
  static constexpr int kCopies = kTileTokens * kDim / 8 / kTileThreads;  // of either
  static constexpr int kPieces = 2 * kCopies;

  __device__ void copy_keys(int piece, const TileOfPage& of, unsigned char* part) const {
    // Warps take 16 channels of a block of keys, 512 bytes in a row; eight threads take the same
    // half of neighbouring channels.
    static_assert(kKeyBlock == 16 && kDim % 32 == 0);
    constexpr int kParts = kDim / 16, kBlocks = kTileWarps / kParts;  // of a block; at a time
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int block = warp / kParts + piece * kBlocks, half = lane / 8 % 2;
    const int channel = warp % kParts * 16 + lane % 8 + lane / 16 * 8;
    copy_async(keys(part).at(channel, 2 * block + half),
               start(of) + (block * kDim + channel) * 32 + half * 16, true);
  }
  // Values that zero weights will multiply must be numbers: those of tokens not there become zeros.
  __device__ void copy_values(int piece, const TileOfPage& of, unsigned char* part) const {
    constexpr int kOctets = kDim / 8, kTokens = kTileThreads / kOctets;  // of a token; at a time
    const int token = threadIdx.x / kOctets + piece * kTokens, octet = threadIdx.x % kOctets;
    copy_async(values(part).at(token, octet),
               start(of) + call.open.part_bytes + (token * kOctets + octet) * 16,
               of.number * kTileTokens + token < of.tokens);
  }
  // One of kPieces that a tile is requested in.
  __device__ void request(int piece, const TileOfPage& of, StagedTile<kDim>& tile) const {
    if (piece < kCopies)
      copy_keys(piece, of, tile.keys);
    else
      copy_values(piece - kCopies, of, tile.values);
    if (piece + 1 == kPieces) commit_copies();
  }
  __device__ void deliver_keys(const TileOfPage&, unsigned char*) {}
  __device__ void deliver_values(const TileOfPage&, unsigned char*) {}
  // All but what the last `kLeft` calls requested.
  template <int kLeft>
  static __device__ void wait_for_all_but() {
    wait_for_copies<kLeft>();
  }

 private:
  __device__ const unsigned char* start(const TileOfPage& of) const {
    return static_cast<const unsigned char*>(of.page) + kv_head * call.open.head_bytes +
           of.number * kTileTokens * kDim * 2;
  }
};

// Two values, scale * code + zero, of codes of 4 bits, the last ones of the halves of the word.
__device__ __forceinline__ uint32_t values_of_nibbles(uint32_t codes, uint32_t scales,
                                                      uint32_t zeros) {
  constexpr uint32_t kMask = 0x000f000fu, k128 = 0x43004300u;  // 128 + n has n in its last bits
  constexpr uint32_t kMinus128 = 0xc300c300u, k1 = 0x3f803f80u;
  const uint32_t code = fma_bf16_pair(masked_or(codes, kMask, k128), k1, kMinus128);  // exact
  return fma_bf16_pair(code, scales, zeros);
}
// The same of codes of 8 bits, the bytes of the word that the selector numbers: kFirstBytes,
// kLastBytes.
constexpr uint32_t kFirstBytes = 0x4140u, kLastBytes = 0x4342u;
__device__ __forceinline__ uint32_t values_of_bytes(uint32_t word, uint32_t selector,
                                                    uint32_t scales, uint32_t zeros) {
  // Behind the byte 0x43 a code n below 128 makes 128 + n, and any other 2 n. Twice the code is
  // that less what it lacks of 256, if it does.
  const uint32_t folded = __byte_perm(word, 0x43434343u, selector);
  constexpr uint32_t kMinusHalf = 0xbf00bf00u, k128 = 0x43004300u, kSigns = 0x80008000u;
  const uint32_t lacking = fma_relu_bf16_pair(folded, kMinusHalf, k128);
  const uint32_t minus_code = fma_bf16_pair(folded, kMinusHalf, lacking);  // exact
  return fma_bf16_pair(minus_code, scales ^ kSigns, zeros);
}
// The bits of `a` where the upper halves of bytes are, and those of `b` where the lower ones are.
__device__ __forceinline__ uint32_t joined_halves(uint32_t a, uint32_t b) {
  return select_bits(0xf0f0f0f0u, a, b);
}
// Eight values of a word of codes, which lie as in kv_layout.h: numbers 0 .. 3 in the lower halves
// of the bytes, 4 .. 7 in the upper ones.
__device__ __forceinline__ uint4 values_of_nibble_word(uint32_t word, const uint4& scale,
                                                       const uint4& zero) {
  constexpr uint32_t kNeighbours = 0x3120u;  // bytes 0 and 1, 2 and 3 come to lie 16 bits apart
  word = __byte_perm(word, 0, kNeighbours);
  return {values_of_nibbles(word, scale.x, zero.x), values_of_nibbles(word >> 8, scale.y, zero.y),
          values_of_nibbles(word >> 4, scale.z, zero.z),
          values_of_nibbles(word >> 12, scale.w, zero.w)};
}
// Eight values of two words of bytes.
__device__ __forceinline__ uint4 values_of_byte_words(uint32_t first, uint32_t second,
                                                      const uint4& scale, const uint4& zero) {
  return {values_of_bytes(first, kFirstBytes, scale.x, zero.x),
          values_of_bytes(first, kLastBytes, scale.y, zero.y),
          values_of_bytes(second, kFirstBytes, scale.z, zero.z),
          values_of_bytes(second, kLastBytes, scale.w, zero.w)};
}

// A thread takes the words of a token's keys, and of a channel's values.
template <int kDim, int kBits>
struct SealedTiles {
  using Keys = Chunks<kTileTokens, false>;
  using Values = Chunks<kDim, false>;
  static __device__ Keys keys(unsigned char* part) { return {part}; }
  static __device__ Values values(unsigned char* part) { return {part}; }

  static constexpr int kOctets = kDim / 8;  // of channels; warps take every eighth
  static constexpr int kEach = kOctets / kTileWarps;
  static constexpr int kHalves = kTileTokens / kLineRows, kBlocks = kDim / kLineRows;
  static constexpr int kLineTokens = 4 * (8 / kBits);  // of a line of values
  static constexpr int kPlanes = kBits / 4;            // words of eight codes
  static_assert(kOctets % kTileWarps == 0 && kTileTokens / 8 == kTileWarps);

  const AttendCall& call;
  int kv_head;
  uint32_t key[kEach][kHalves][kPlanes], value[kBlocks][kPlanes];
  uint4 value_scales, value_zeros;  // of eight tokens

  __device__ SealedTiles(const AttendCall& call, int kv_head) : call(call), kv_head(kv_head) {}

  static __device__ const unsigned char* bytes(const TileOfPage& of, int64_t offset) {
    return static_cast<const unsigned char*>(of.page) + offset;
  }

  template <int kLeft>
  static __device__ void wait_for_all_but() {}
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
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane)
        value[block][plane] =
            load_word(line + (block * (kPageTokens / kLineTokens) + plane) * kSealedLine);
    const int64_t offset = call.closed.value_scales + kv_head * call.closed.value_scale_bytes;
    const unsigned char* scales = bytes(of, offset) + (of.number * kTileTokens + warp * 8) * 2;
    value_scales = load_words(scales);
    value_zeros = load_words(scales + kPageTokens * 2);
  }

  static constexpr int kPieces = 2;
  __device__ void request(int piece, const TileOfPage& of, StagedTile<kDim>& tile) {
    if (piece == 0) request_keys(of, tile.keys);
    if (piece == 1) request_values(of, tile.values);
  }

  __device__ void deliver_keys(const TileOfPage& of, unsigned char* part) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int64_t offset = call.closed.key_scales + kv_head * call.closed.key_scale_bytes;
    const unsigned char* scales = bytes(of, offset);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int octet = i * kTileWarps + warp;
      const uint4 scale = load_words(scales + octet * 16),
                  zero = load_words(scales + (kOctets + octet) * 16);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const uint32_t upper = key[i][half][0], lower = key[i][half][kPlanes - 1];
        *reinterpret_cast<uint4*>(keys(part).at(half * kLineRows + lane, octet)) =
            kBits == 8 ? values_of_byte_words(joined_halves(upper << 4, lower),
                                              joined_halves(upper, lower >> 4), scale, zero)
                       : values_of_nibble_word(upper, scale, zero);
      }
    }
  }
  __device__ void deliver_values(const TileOfPage&, unsigned char* part) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
      *reinterpret_cast<uint4*>(values(part).at(block * kLineRows + lane, warp)) =
          kBits == 8 ? values_of_byte_words(value[block][0], value[block][kPlanes - 1],
                                            value_scales, value_zeros)
                     : values_of_nibble_word(value[block][0], value_scales, value_zeros);
  }
};

}  // namespace puna::cuda
