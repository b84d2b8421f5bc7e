#include "text/unicode_classes.h"

#include <cstring>

namespace puna {

#include "text/unicode_tables.inc"

namespace {

constexpr std::string_view kReplacement = "\xef\xbf\xbd";

constexpr std::array<CharClass, 128> ascii_classes() {
  std::array<CharClass, 128> classes{};
  for (uint32_t code = 0; code < 128; ++code) {
    classes[code] = class_in(kBlockOfCodePoint, kClassesOfBlock, code);
  }
  return classes;
}

}  // namespace

constinit const std::array<CharClass, 128> kAsciiClasses = ascii_classes();

Utf8Unit utf8_unit(std::string_view text, size_t at) {
  const auto first = static_cast<uint8_t>(text[at]);
  if (first < 0x80) return {Utf8Unit::kValid, 1};
  int length = 0;
  uint8_t low = 0x80, high = 0xbf;  // bounds of the second byte: no overlong forms, no surrogates
  if (first >= 0xc2 && first <= 0xdf) {
    length = 2;
  } else if (first >= 0xe0 && first <= 0xef) {
    length = 3;
    if (first == 0xe0) low = 0xa0;
    if (first == 0xed) high = 0x9f;
  } else if (first >= 0xf0 && first <= 0xf4) {
    length = 4;
    if (first == 0xf0) low = 0x90;
    if (first == 0xf4) high = 0x8f;
  } else {
    return {Utf8Unit::kInvalid, 1};
  }
  for (int i = 1; i < length; ++i) {
    if (at + i >= text.size()) return {Utf8Unit::kIncomplete, i};
    const auto byte = static_cast<uint8_t>(text[at + i]);
    if (byte < low || byte > high) return {Utf8Unit::kInvalid, i};
    low = 0x80;
    high = 0xbf;
  }
  return {Utf8Unit::kValid, length};
}

std::string to_valid_utf8(std::string_view bytes) {
  std::string text;
  text.reserve(bytes.size());
  for (size_t at = 0; at < bytes.size();) {
    const Utf8Unit unit = utf8_unit(bytes, at);
    text += unit.kind == Utf8Unit::kValid ? bytes.substr(at, unit.length) : kReplacement;
    at += unit.length;
  }
  return text;
}

bool is_valid_utf8(std::string_view bytes) {
  const auto is_tail = [&](size_t at) { return (bytes[at] & 0xc0) == 0x80; };
  for (size_t at = 0; at < bytes.size();) {
    const size_t left = bytes.size() - at;
    const auto first = static_cast<uint8_t>(bytes[at]);
    if (first < 0x80) {
      uint64_t ascii = 0;
      if (left >= sizeof(ascii)) std::memcpy(&ascii, bytes.data() + at, sizeof(ascii));
      at += left >= sizeof(ascii) && !(ascii & 0x8080808080808080) ? sizeof(ascii) : 1;
    } else if (first < 0xe0) {
      if (first < 0xc2 || left < 2 || !is_tail(at + 1)) return false;
      at += 2;
    } else if (first < 0xf0) {
      if (left < 3 || !is_tail(at + 1) || !is_tail(at + 2)) return false;
      int length = 0;
      const uint32_t code = decode_utf8(bytes, at, &length);
      if (code < 0x800 || (code >= 0xd800 && code < 0xe000)) return false;
      at += 3;
    } else {
      if (first > 0xf4 || left < 4) return false;
      if (!is_tail(at + 1) || !is_tail(at + 2) || !is_tail(at + 3)) return false;
      int length = 0;
      const uint32_t code = decode_utf8(bytes, at, &length);
      if (code < 0x10000 || code > 0x10ffff) return false;
      at += 4;
    }
  }
  return true;
}

}  // namespace puna
