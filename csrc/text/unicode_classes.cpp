#include "text/unicode_classes.h"

#include <array>
#include <bit>
#include <cstring>
#include <utility>

#include "text/byte_block.h"

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

namespace {

// Blocks of a text one after the other. Bit i of a word speaks of byte i of a block, so that
// `x << 1` are the bytes after those of x.
class Utf8Scan {
 public:
  // False if no UTF-8 has these bytes after those before.
  bool take(const ByteBlock& block) {
    const uint64_t foreign = block.beyond_ascii();
    if ((foreign | due_) == 0) return true;
    const uint64_t first = block.between('\xc0', '\xff'), tails = foreign & ~first;
    const uint64_t three = block.between('\xe0', '\xef'), four = block.between('\xf0', '\xf4');
    const uint64_t longer = three | four;
    const uint64_t tails_due = due_ | first << 1 | longer << 2 | four << 3;
    const bool ends_are_right =
        tails == tails_due && first == (block.between('\xc2', '\xdf') | longer);
    due_ = first >> 63 | longer >> 62 | four >> 61;

    // Second bytes: no overlong forms, no surrogates, nothing beyond U+10FFFF.
    const uint64_t from_90 = block.between('\x90', '\xbf'), from_a0 = block.between('\xa0', '\xbf');
    const uint64_t wrong =
        (after(0, block.equal('\xe0')) & ~from_a0) | (after(1, block.equal('\xed')) & from_a0) |
        (after(2, block.equal('\xf0')) & ~from_90) | (after(3, block.equal('\xf4')) & from_90);
    tails_ += static_cast<size_t>(std::popcount(tails));
    beyond_latin_1_ |= block.between('\xc4', '\xf4');
    beyond_two_bytes_ |= four;
    return ends_are_right && wrong == 0;
  }
  bool is_complete() const { return due_ == 0; }
  size_t tails() const { return tails_; }
  int unit() const { return beyond_two_bytes_ ? 4 : beyond_latin_1_ ? 2 : 1; }

 private:
  uint64_t after(int which, uint64_t bytes) {
    const uint64_t carried = std::exchange(last_[which], bytes >> 63);
    return bytes << 1 | carried;
  }

  uint64_t due_ = 0;  // of the next block, the bytes that belong to the last character
  std::array<uint64_t, 4> last_{};
  size_t tails_ = 0;
  uint64_t beyond_latin_1_ = 0, beyond_two_bytes_ = 0;
};

}  // namespace

std::optional<Utf8Shape> utf8_shape(std::string_view bytes) {
  Utf8Scan scan;
  size_t at = 0;
  for (; bytes.size() - at >= ByteBlock::kBytes; at += ByteBlock::kBytes) {
    if (!scan.take(ByteBlock(bytes.data() + at))) return std::nullopt;
  }
  if (at < bytes.size()) {
    char padded[ByteBlock::kBytes] = {};
    std::memcpy(padded, bytes.data() + at, bytes.size() - at);
    if (!scan.take(ByteBlock(padded))) return std::nullopt;
  }
  if (!scan.is_complete()) return std::nullopt;
  return Utf8Shape{bytes.size() - scan.tails(), scan.unit()};
}

}  // namespace puna
