// Classes of characters that the pre-tokeniser tells apart, and UTF-8 decoding.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace puna {

// General categories of Unicode 16 (why: tools/make_unicode_tables.py), and White_Space.
enum class CharClass : uint8_t {
  kOther,    // punctuation, symbols, controls, unassigned
  kUpper,    // Lu, Lt
  kLower,    // Ll
  kLetter,   // Lm, Lo: letters without case
  kMark,     // Mn, Mc, Me
  kNumber,   // Nd, Nl, No
  kSpace,    // White_Space but carriage return and line feed
  kNewline,  // carriage return, line feed
};

inline bool is_letter(CharClass c) {
  return c == CharClass::kUpper || c == CharClass::kLower || c == CharClass::kLetter;
}

// Two levels: the block of a code point, and the classes of a block, two to a byte.
extern const uint16_t kBlockOfCodePoint[8704];
extern const uint8_t kClassesOfBlock[][64];

constexpr CharClass class_in(const uint16_t* block_of, const uint8_t (*classes)[64],
                             uint32_t code_point) {
  const uint8_t pair = classes[block_of[code_point >> 7]][(code_point & 127) >> 1];
  return static_cast<CharClass>(code_point & 1 ? pair >> 4 : pair & 15);
}
inline CharClass class_of(uint32_t code_point) {
  return class_in(kBlockOfCodePoint, kClassesOfBlock, code_point);
}
// Of the ASCII characters.
extern const std::array<CharClass, 128> kAsciiClasses;

// The code point at text[at], which must be valid UTF-8; *length receives its bytes.
inline uint32_t decode_utf8(std::string_view text, size_t at, int* length) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[at + i]); };
  const uint8_t first = byte(0);
  if (first < 0x80) {
    *length = 1;
    return first;
  }
  if (first < 0xe0) {
    *length = 2;
    return (first & 0x1fu) << 6 | (byte(1) & 0x3fu);
  }
  if (first < 0xf0) {
    *length = 3;
    return (first & 0x0fu) << 12 | (byte(1) & 0x3fu) << 6 | (byte(2) & 0x3fu);
  }
  *length = 4;
  return (first & 0x07u) << 18 | (byte(1) & 0x3fu) << 12 | (byte(2) & 0x3fu) << 6 |
         (byte(3) & 0x3fu);
}

// What lies at text[at]: a whole valid character of `length` bytes, or the longest start of one
// (`length` bytes that can be followed by more), or neither (`length` 1).
struct Utf8Unit {
  enum Kind { kValid, kIncomplete, kInvalid } kind;
  int length;
};
Utf8Unit utf8_unit(std::string_view text, size_t at);

// Valid UTF-8 of any bytes, one U+FFFD for each maximal part of an invalid sequence, as in Python's
// bytes.decode("utf-8", "replace").
std::string to_valid_utf8(std::string_view bytes);

// What a text of characters of one width takes.
struct Utf8Shape {
  size_t characters;
  int unit;  // the least bytes, 1, 2 or 4, in which every code point fits
};
// Nothing if the bytes are not UTF-8.
std::optional<Utf8Shape> utf8_shape(std::string_view bytes);
inline bool is_valid_utf8(std::string_view bytes) { return utf8_shape(bytes).has_value(); }

}  // namespace puna
