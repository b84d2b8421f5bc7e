#include "quant/repack.h"

#include <cstring>

#include "base/error.h"
#include "quant/format.h"

namespace puna {
namespace {

// Both sides keep a weight's bits in planes, in another order: 32 bits (four columns) at a time can
// be moved as they are, or after fields of a few words have changed places.
constexpr int64_t kPlane = 64;  // bytes from one plane of a slab to the next

uint32_t word_at(const uint8_t* bytes) {
  uint32_t word;
  std::memcpy(&word, bytes, sizeof(word));
  return word;
}
void put_word(uint8_t* at, uint32_t word) { std::memcpy(at, &word, sizeof(word)); }

// Where the parts of a row's block lie in a block of a panel.
template <class Format>
struct Place {
  uint8_t* block;
  int64_t row;

  uint8_t* slab(int64_t index) const { return block + slab_row<Format>(row, index * kSlabCols); }
  void put_scale(const uint8_t* half) const {
    std::memcpy(block + PanelLayout<Format>::kScale + 2 * row, half, 2);
  }
  void put_offset(const uint8_t* half) const {
    std::memcpy(block + PanelLayout<Format>::kOffsets + 2 * row, half, 2);
  }
  // The offset -m of a stored minimum m: the sign bit turned.
  void put_minimum(const uint8_t* half) const {
    const uint8_t negated[2] = {half[0], static_cast<uint8_t>(half[1] ^ 0x80u)};
    put_offset(negated);
  }
  // Planes of the small whole numbers, from `plane` on.
  void put_numbers(int plane, const uint8_t* bytes, int count) const {
    uint8_t* to = block + PanelLayout<Format>::kSub + plane * kPanelRows + row;
    for (int i = 0; i < count; ++i) to[i * kPanelRows] = bytes[i];
  }
};

// 16 bytes whose lower halves are columns 0 to 15 and whose upper ones columns 16 to 31: as in a
// slab, word for word.
void put_nibbles(uint8_t* slab, const uint8_t* bytes) {
  for (int plane = 0; plane < 4; ++plane)
    put_word(slab + plane * kPlane, word_at(bytes + 4 * plane));
}

// 32 bytes whose lower halves are the columns of one slab and whose upper ones those of another.
void put_halves(uint8_t* lower, uint8_t* upper, const uint8_t* bytes) {
  constexpr uint32_t kLow = 0x0f0f0f0fu;
  for (int plane = 0; plane < 4; ++plane) {
    const uint32_t first = word_at(bytes + 4 * plane), last = word_at(bytes + 16 + 4 * plane);
    put_word(lower + plane * kPlane, (first & kLow) | (last & kLow) << 4);
    put_word(upper + plane * kPlane, (first >> 4 & kLow) | (last & ~kLow));
  }
}

// Field k (of Bits bits) of the bytes of word i changes places with field i of word k.
template <int Bits>
void exchange(uint32_t (&words)[8 / Bits]) {
  constexpr int kWords = 8 / Bits;
  for (int distance = kWords / 2; distance > 0; distance /= 2) {
    const int shift = distance * Bits;
    const uint32_t mask = shift == 4 ? 0x0f0f0f0fu : shift == 2 ? 0x33333333u : 0x55555555u;
    for (int i = 0; i < kWords; ++i) {
      if (i & distance) continue;
      const uint32_t moved = (words[i] >> shift ^ words[i + distance]) & mask;
      words[i + distance] ^= moved;
      words[i] ^= moved << shift;
    }
  }
}

// 32 bytes, each with a field of the same column of 8 / Bits slabs: one plane of a slab has the
// fields of four columns of as many words. `plane` is that of the first of these planes.
template <int Bits, class Format>
void put_fields(const Place<Format>& place, int64_t first_slab, int plane, const uint8_t* bytes) {
  constexpr int kWords = 8 / Bits;
  for (int p = 0; p < Bits; ++p) {
    uint32_t words[kWords];
    for (int i = 0; i < kWords; ++i) words[i] = word_at(bytes + 4 * (p * kWords + i));
    exchange<Bits>(words);
    for (int i = 0; i < kWords; ++i)
      put_word(place.slab(first_slab + i) + (plane + p) * kPlane, words[i]);
  }
}

// Bit 4 s + j of 32 to bit 8 j + s: the high bits of Q5_0 and Q5_1 into their plane.
uint32_t by_column_of_four(uint32_t bits) {
  const auto swap = [&](int shift, uint32_t mask) {
    const uint32_t moved = (bits >> shift ^ bits) & mask;
    bits ^= moved ^ moved << shift;
  };
  for (int round = 0; round < 2; ++round) {
    // Bits of even places to the lower half, of odd ones to the upper.
    swap(1, 0x22222222u);
    swap(2, 0x0c0c0c0cu);
    swap(4, 0x00f000f0u);
    swap(8, 0x0000ff00u);
  }
  return bits;
}

// The six-bit scales and minima of Q4_K and Q5_K, in 12 bytes.
template <class Format>
void put_scales_k4(const Place<Format>& place, const uint8_t* bytes) {
  constexpr uint32_t kLow = 0x0f0f0f0fu;
  const uint32_t first = word_at(bytes), second = word_at(bytes + 4);
  const uint32_t planes[3] = {(first & kLow) | (second & kLow) << 4, word_at(bytes + 8),
                              (first >> 4 & kLow) | (second & ~kLow)};
  uint8_t numbers[12];
  std::memcpy(numbers, planes, sizeof(numbers));
  place.put_numbers(0, numbers, 12);
}

// --- one block of a row, by type; blocks.cpp says what each is made of --------------------------

template <DType Type>
struct Block;

// A scale, perhaps an offset, perhaps the fifth bits, and nibbles.
template <class Traits>
struct OneSlab {
  using Format = Traits;
  static void put(const Place<Format>& place, const uint8_t* block) {
    place.put_scale(block);
    block += 2;
    if constexpr (Format::kOffset) {
      place.put_offset(block);
      block += 2;
    }
    if constexpr (Format::kBits == 5) {
      put_word(place.slab(0) + 4 * kPlane, by_column_of_four(word_at(block)));
      block += 4;
    }
    put_nibbles(place.slab(0), block);
  }
};
template <>
struct Block<DType::kQ4_0> : OneSlab<Int4G32> {};
template <>
struct Block<DType::kQ4_1> : OneSlab<Int4MinG32> {};
template <>
struct Block<DType::kQ5_0> : OneSlab<Int5G32> {};
template <>
struct Block<DType::kQ5_1> : OneSlab<Int5MinG32> {};
template <>
struct Block<DType::kIQ4_NL> : OneSlab<Table4G32> {};

template <>
struct Block<DType::kQ8_0> {
  using Format = Int8G32;
  static void put(const Place<Format>& place, const uint8_t* block) {
    place.put_scale(block);
    for (int s = 0; s < kSlabVectors; ++s)
      put_word(place.slab(0) + s * kPlane, word_at(block + 2 + 4 * s) ^ 0x80808080u);
  }
};

template <>
struct Block<DType::kQ2_K> {
  using Format = Int2K;
  static void put(const Place<Format>& place, const uint8_t* block) {
    place.put_scale(block + 80);
    place.put_minimum(block + 82);
    place.put_numbers(0, block, 16);
    for (int half = 0; half < 2; ++half) put_fields<2>(place, 4 * half, 0, block + 16 + 32 * half);
  }
};

template <>
struct Block<DType::kQ3_K> {
  using Format = Int3K;
  static void put(const Place<Format>& place, const uint8_t* block) {
    place.put_scale(block + 108);
    place.put_numbers(0, block + 96, 12);
    for (int half = 0; half < 2; ++half) put_fields<2>(place, 4 * half, 0, block + 32 + 32 * half);
    put_fields<1>(place, 0, 2, block);
  }
};

template <>
struct Block<DType::kQ4_K> {
  using Format = Int4K;
  static void put(const Place<Format>& place, const uint8_t* block) {
    place.put_scale(block);
    place.put_minimum(block + 2);
    put_scales_k4(place, block + 4);
    for (int pair = 0; pair < 4; ++pair)
      put_halves(place.slab(2 * pair), place.slab(2 * pair + 1), block + 16 + 32 * pair);
  }
};

template <>
struct Block<DType::kQ5_K> {
  using Format = Int5K;
  static void put(const Place<Format>& place, const uint8_t* block) {
    place.put_scale(block);
    place.put_minimum(block + 2);
    put_scales_k4(place, block + 4);
    for (int pair = 0; pair < 4; ++pair)
      put_halves(place.slab(2 * pair), place.slab(2 * pair + 1), block + 48 + 32 * pair);
    put_fields<1>(place, 0, 4, block + 16);
  }
};

template <>
struct Block<DType::kQ6_K> {
  using Format = Int6K;
  static void put(const Place<Format>& place, const uint8_t* block) {
    place.put_scale(block + 208);
    place.put_numbers(0, block + 192, 16);
    for (int half = 0; half < 2; ++half) {
      for (int slab = 4 * half; slab < 4 * half + 2; ++slab)
        put_halves(place.slab(slab), place.slab(slab + 2),
                   block + 64 * half + 32 * (slab - 4 * half));
      put_fields<2>(place, 4 * half, 4, block + 128 + 32 * half);
    }
  }
};

template <>
struct Block<DType::kIQ4_XS> {
  using Format = Table4K;
  static void put(const Place<Format>& place, const uint8_t* block) {
    place.put_scale(block);
    uint8_t planes[6] = {};  // four of the lower bits, two of the upper ones
    const unsigned high = block[2] | block[3] << 8;
    for (int g = 0; g < 8; ++g) {
      const unsigned low = block[4 + g / 2] >> 4 * (g % 2) & 15u;
      planes[g % 4] = static_cast<uint8_t>(planes[g % 4] | low << 4 * (g / 4));
      planes[4 + g % 2] =
          static_cast<uint8_t>(planes[4 + g % 2] | (high >> 2 * g & 3u) << 2 * (g / 2));
    }
    place.put_numbers(0, planes, 6);
    for (int slab = 0; slab < 8; ++slab) put_nibbles(place.slab(slab), block + 8 + 16 * slab);
  }
};

template <DType Type>
void repack(const void* blocks, int64_t count, int64_t row, uint8_t* panel) {
  using Format = typename Block<Type>::Format;
  const auto* from = static_cast<const uint8_t*>(blocks);
  const int64_t bytes = info_of(Type).block_bytes;
  for (int64_t b = 0; b < count; ++b, from += bytes, panel += PanelLayout<Format>::kBytes)
    Block<Type>::put({panel, row}, from);
}

}  // namespace

void repack_blocks(DType dtype, const void* blocks, int64_t count, int64_t row, uint8_t* panel) {
  switch (dtype) {
#define PUNA_REPACK(Type) \
  case DType::k##Type:    \
    return repack<DType::k##Type>(blocks, count, row, panel);
    PUNA_REPACK(Q4_0)
    PUNA_REPACK(Q4_1)
    PUNA_REPACK(Q5_0)
    PUNA_REPACK(Q5_1)
    PUNA_REPACK(Q8_0)
    PUNA_REPACK(Q2_K)
    PUNA_REPACK(Q3_K)
    PUNA_REPACK(Q4_K)
    PUNA_REPACK(Q5_K)
    PUNA_REPACK(Q6_K)
    PUNA_REPACK(IQ4_NL)
    PUNA_REPACK(IQ4_XS)
#undef PUNA_REPACK
    default:
      fail(ErrorCode::kInternal, "[quant] ", name_of(dtype), " has no blocks");
  }
}

}  // namespace puna
