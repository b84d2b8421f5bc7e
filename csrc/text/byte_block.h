// 64 bytes at once: which of them are equal to something, as bits.
//
// With what every processor of the architecture has (SSE2, NEON): classifying a block takes a small
// part of the time that its tokens take, so that wider vectors and a table of kernels gain nothing.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace puna {

class ByteBlock {
 public:
  static constexpr size_t kBytes = 64;

#if defined(__SSE2__)
  explicit ByteBlock(const char* bytes) {
    for (int i = 0; i < 4; ++i) {
      part_[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 16 * i));
    }
  }
  // Bit i: byte i is `value`.
  uint64_t equal(char value) const {
    const __m128i wanted = _mm_set1_epi8(value);
    return bits([&](__m128i part) { return _mm_cmpeq_epi8(part, wanted); });
  }
  // Bit i: byte i, signed, is in [low, high], which begin behind -128 and end before 127; bytes of
  // 0x80 and above are negative.
  uint64_t between(char low, char high) const {
    const __m128i below = _mm_set1_epi8(static_cast<char>(low - 1));
    const __m128i above = _mm_set1_epi8(static_cast<char>(high + 1));
    return bits([&](__m128i part) {
      return _mm_and_si128(_mm_cmpgt_epi8(part, below), _mm_cmplt_epi8(part, above));
    });
  }
  // Bit i: byte i, signed, is at most `high` < 127.
  uint64_t at_most(char high) const {
    const __m128i above = _mm_set1_epi8(static_cast<char>(high + 1));
    return bits([&](__m128i part) { return _mm_cmplt_epi8(part, above); });
  }
  // Bit i: byte i is no ASCII.
  uint64_t beyond_ascii() const {
    return bits([](__m128i part) { return part; });
  }

 private:
  template <class Compare>
  uint64_t bits(const Compare& compare) const {
    uint64_t found[4];
    for (int i = 0; i < 4; ++i) {
      found[i] = static_cast<uint32_t>(_mm_movemask_epi8(compare(part_[i])));
    }
    return found[0] | found[1] << 16 | found[2] << 32 | found[3] << 48;
  }
  __m128i part_[4];
#elif defined(__aarch64__)
  explicit ByteBlock(const char* bytes) {
    for (int i = 0; i < 4; ++i) {
      part_[i] = vld1q_s8(reinterpret_cast<const int8_t*>(bytes + 16 * i));
    }
  }
  uint64_t equal(char value) const {
    const int8x16_t wanted = vdupq_n_s8(static_cast<int8_t>(value));
    return bits([&](int8x16_t part) { return vceqq_s8(part, wanted); });
  }
  uint64_t between(char low, char high) const {
    const int8x16_t least = vdupq_n_s8(static_cast<int8_t>(low));
    const int8x16_t most = vdupq_n_s8(static_cast<int8_t>(high));
    return bits(
        [&](int8x16_t part) { return vandq_u8(vcgeq_s8(part, least), vcleq_s8(part, most)); });
  }
  uint64_t at_most(char high) const {
    const int8x16_t most = vdupq_n_s8(static_cast<int8_t>(high));
    return bits([&](int8x16_t part) { return vcleq_s8(part, most); });
  }
  uint64_t beyond_ascii() const {
    return bits([](int8x16_t part) { return vcltzq_s8(part); });
  }

 private:
  template <class Compare>
  uint64_t bits(const Compare& compare) const {
    // Each byte keeps the bit of its place in eight; sums of neighbours gather them.
    const uint8x16_t weights = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint8x16_t low =
        vpaddq_u8(vandq_u8(compare(part_[0]), weights), vandq_u8(compare(part_[1]), weights));
    const uint8x16_t high =
        vpaddq_u8(vandq_u8(compare(part_[2]), weights), vandq_u8(compare(part_[3]), weights));
    const uint8x16_t sums = vpaddq_u8(low, high);
    return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(sums, sums)), 0);
  }
  int8x16_t part_[4];
#else
  explicit ByteBlock(const char* bytes) { std::memcpy(bytes_, bytes, kBytes); }
  uint64_t equal(char value) const {
    return bits([&](int8_t byte) { return byte == static_cast<int8_t>(value); });
  }
  uint64_t between(char low, char high) const {
    return bits([&](int8_t byte) {
      return byte >= static_cast<int8_t>(low) && byte <= static_cast<int8_t>(high);
    });
  }
  uint64_t at_most(char high) const {
    return bits([&](int8_t byte) { return byte <= static_cast<int8_t>(high); });
  }
  uint64_t beyond_ascii() const {
    return bits([](int8_t byte) { return byte < 0; });
  }

 private:
  template <class Compare>
  uint64_t bits(const Compare& compare) const {
    uint64_t found = 0;
    for (size_t i = 0; i < kBytes; ++i) found |= uint64_t{compare(bytes_[i])} << i;
    return found;
  }
  int8_t bytes_[kBytes];
#endif
};

}  // namespace puna
