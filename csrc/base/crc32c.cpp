#include "base/crc32c.h"

#include <array>
#include <bit>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <sys/auxv.h>
#endif

namespace puna {
namespace {

static_assert(std::endian::native == std::endian::little);

constexpr uint32_t kPolynomial = 0x82f63b78;  // bits reversed

using Table = std::array<uint32_t, 256>;

// kTables[k][b]: the remainder of byte b followed by k zero bytes.
constexpr std::array<Table, 8> make_tables() {
  std::array<Table, 8> tables{};
  for (uint32_t b = 0; b < 256; ++b) {
    uint32_t crc = b;
    for (int bit = 0; bit < 8; ++bit) crc = crc & 1 ? crc >> 1 ^ kPolynomial : crc >> 1;
    tables[0][b] = crc;
  }
  for (size_t k = 1; k < 8; ++k)
    for (uint32_t b = 0; b < 256; ++b)
      tables[k][b] = tables[k - 1][b] >> 8 ^ tables[0][tables[k - 1][b] & 255];
  return tables;
}
constexpr std::array<Table, 8> kTables = make_tables();

// The instruction takes one word per cycle but has its result three cycles later, so three runs of
// kRun bytes are summed at once and joined: the sum of a run is carried over the bytes of the next
// by kShift.
constexpr size_t kRun = 1024;

// kShift[k][b]: what byte k of a sum, being b, becomes after kRun zero bytes.
constexpr std::array<Table, 4> make_shift() {
  // The effect of one bit; that of a byte is the sum of its bits'.
  std::array<uint32_t, 32> bits{};
  for (size_t i = 0; i < 32; ++i) {
    uint32_t crc = uint32_t{1} << i;
    for (size_t zero = 0; zero < kRun; ++zero) crc = crc >> 8 ^ kTables[0][crc & 255];
    bits[i] = crc;
  }
  std::array<Table, 4> shift{};
  for (size_t k = 0; k < 4; ++k)
    for (uint32_t b = 0; b < 256; ++b)
      for (size_t bit = 0; bit < 8; ++bit)
        if (b >> bit & 1) shift[k][b] ^= bits[8 * k + bit];
  return shift;
}
constexpr std::array<Table, 4> kShift = make_shift();

[[maybe_unused]] uint32_t over_a_run(uint32_t crc) {
  return kShift[0][crc & 255] ^ kShift[1][crc >> 8 & 255] ^ kShift[2][crc >> 16 & 255] ^
         kShift[3][crc >> 24];
}

uint64_t word_at(const uint8_t* data) {
  uint64_t word;
  std::memcpy(&word, data, sizeof word);
  return word;
}

// Compiled for processors with the instruction and called on those alone. It calls no function that
// another file could have a copy of.
#if defined(__x86_64__)
#define PUNA_CRC_TARGET __attribute__((target("sse4.2")))
PUNA_CRC_TARGET inline uint32_t add_word(uint32_t crc, uint64_t word) {
  return static_cast<uint32_t>(_mm_crc32_u64(crc, word));
}
PUNA_CRC_TARGET inline uint32_t add_byte(uint32_t crc, uint8_t byte) {
  return _mm_crc32_u8(crc, byte);
}
bool has_instruction() { return __builtin_cpu_supports("sse4.2"); }
#elif defined(__aarch64__)
#define PUNA_CRC_TARGET __attribute__((target("+crc")))
PUNA_CRC_TARGET inline uint32_t add_word(uint32_t crc, uint64_t word) {
  return __crc32cd(crc, word);
}
PUNA_CRC_TARGET inline uint32_t add_byte(uint32_t crc, uint8_t byte) {
  return __crc32cb(crc, byte);
}
bool has_instruction() { return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0; }
#endif

#ifdef PUNA_CRC_TARGET
PUNA_CRC_TARGET uint32_t by_instruction(const uint8_t* data, size_t bytes, uint32_t crc) {
  crc = ~crc;
  for (; bytes >= 3 * kRun; data += 3 * kRun, bytes -= 3 * kRun) {
    uint32_t second = 0, third = 0;
    for (size_t i = 0; i < kRun; i += 8) {
      crc = add_word(crc, word_at(data + i));
      second = add_word(second, word_at(data + kRun + i));
      third = add_word(third, word_at(data + 2 * kRun + i));
    }
    crc = over_a_run(over_a_run(crc) ^ second) ^ third;
  }
  for (; bytes >= 8; data += 8, bytes -= 8) crc = add_word(crc, word_at(data));
  for (; bytes > 0; ++data, --bytes) crc = add_byte(crc, *data);
  return ~crc;
}
#endif

}  // namespace

uint32_t crc32c_by_table(const void* data, size_t bytes, uint32_t crc) {
  const auto* from = static_cast<const uint8_t*>(data);
  crc = ~crc;
  for (; bytes >= 8; from += 8, bytes -= 8) {
    const uint64_t word = word_at(from) ^ crc;
    crc = 0;
    for (size_t k = 0; k < 8; ++k) crc ^= kTables[7 - k][word >> 8 * k & 255];
  }
  for (; bytes > 0; ++from, --bytes) crc = crc >> 8 ^ kTables[0][(crc ^ *from) & 255];
  return ~crc;
}

uint32_t crc32c(const void* data, size_t bytes, uint32_t crc) {
#ifdef PUNA_CRC_TARGET
  static const bool instruction = has_instruction();
  if (instruction) return by_instruction(static_cast<const uint8_t*>(data), bytes, crc);
#endif
  return crc32c_by_table(data, bytes, crc);
}

}  // namespace puna
