#include "text/wide_text.h"

#include <bit>
#include <cstdint>
#include <cstring>

#include "text/unicode_classes.h"

namespace puna {

namespace {

// Characters that are looked at together: compilers make vector instructions of loops over them.
constexpr size_t kGroup = 16;
constexpr size_t kLongest = 4;  // bytes of a character

// Where the character ends that is written at `out`, or null if it is none. Up to four bytes are
// written.
char* put(uint32_t c, char* out) {
  const auto tail = [](uint32_t bits) { return static_cast<char>(0x80 | (bits & 0x3f)); };
  if (c < 0x800) {
    // Letters of two bytes alternate with blanks and signs: no branch tells them apart.
    const bool two = c >= 0x80;
    out[0] = static_cast<char>(two ? 0xc0 | c >> 6 : c);
    out[1] = tail(c);
    return out + 1 + two;
  }
  if (c < 0x10000) {
    if (c - 0xd800 < 0x800) return nullptr;
    out[0] = static_cast<char>(0xe0 | c >> 12);
    out[1] = tail(c >> 6);
    out[2] = tail(c);
    return out + 3;
  }
  if (c > 0x10ffff) return nullptr;
  out[0] = static_cast<char>(0xf0 | c >> 18);
  out[1] = tail(c >> 12);
  out[2] = tail(c >> 6);
  out[3] = tail(c);
  return out + 4;
}

}  // namespace

template <class Unit>
char* WideText::write_units(char* out, const char* end) {
  const auto* const units = static_cast<const Unit*>(characters_);
  while (at_ < count_) {
    if (count_ - at_ >= kGroup && static_cast<size_t>(end - out) >= kGroup * kLongest) {
      const Unit* const group = units + at_;
      Unit any = 0;
      for (size_t i = 0; i < kGroup; ++i) any |= group[i];
      if (any < 0x80) {
        for (size_t i = 0; i < kGroup; ++i) out[i] = static_cast<char>(group[i]);
        out += kGroup;
        at_ += kGroup;
        continue;
      }
      for (size_t i = 0; i < kGroup; ++i) {
        char* const next = put(group[i], out);
        if (!next) {
          stopped_ = true;
          return out;
        }
        out = next;
        ++at_;
      }
      continue;
    }
    char bytes[kLongest];
    const char* const written = put(units[at_], bytes);
    if (!written) {
      stopped_ = true;
      return out;
    }
    if (end - out < written - bytes) return out;
    for (const char* byte = bytes; byte != written; ++byte) *out++ = *byte;
    ++at_;
  }
  return out;
}

size_t WideText::write(char* out, size_t room) {
  const char* const end = out + room;
  char* const written = unit_ == 1   ? write_units<uint8_t>(out, end)
                        : unit_ == 2 ? write_units<uint16_t>(out, end)
                                     : write_units<uint32_t>(out, end);
  return static_cast<size_t>(written - out);
}

namespace {

// The code point at `bytes`, of which four can be read; *length receives its bytes. Lengths mix in
// runs of emoji and signs: no branch tells them apart.
uint32_t decode_any(const char* bytes, size_t* length) {
  const auto byte = [&](size_t i) { return static_cast<uint32_t>(static_cast<uint8_t>(bytes[i])); };
  // By the upper half of the first byte, a digit each.
  *length = 0x4322'0000'1111'1111 >> (byte(0) >> 4 << 2) & 7;
  constexpr uint8_t kFirst[] = {0, 0x7f, 0x1f, 0x0f, 0x07}, kUnused[] = {0, 18, 12, 6, 0};
  const uint32_t all = (byte(0) & kFirst[*length]) << 18 | (byte(1) & 0x3f) << 12 |
                       (byte(2) & 0x3f) << 6 | (byte(3) & 0x3f);
  return all >> kUnused[*length];
}

// The characters at the beginning of a text, and beyond: each step writes more of them than it may
// take, which the next one overwrites, so that words need no step for each of their letters.
template <class Unit>
void write_wide_units(std::string_view utf8, Unit* out) {
  const char* at = utf8.data();
  const char* const end = at + utf8.size();
  constexpr ptrdiff_t kMostWritten = 8;
  // So many characters are left at least.
  while (end - at >= kMostWritten * static_cast<ptrdiff_t>(kLongest)) {
    uint64_t word;
    std::memcpy(&word, at, sizeof(word));
    const uint64_t not_ascii = word & 0x8080808080808080;
    // Letters of two bytes, as words of Cyrillic, Greek, Hebrew or Arabic have them.
    const uint64_t not_two = (word & 0xc0e0c0e0c0e0c0e0) ^ 0x80c080c080c080c0;
    if (!(not_ascii & 0x80)) {
      for (int i = 0; i < 8; ++i) out[i] = static_cast<uint8_t>(at[i]);
      const int count = not_ascii ? std::countr_zero(not_ascii) / 8 : 8;
      out += count;
      at += count;
    } else if (!(not_two & 0xffff)) {
      for (int i = 0; i < 4; ++i, word >>= 16) {
        out[i] = static_cast<Unit>((word & 0x1f) << 6 | (word >> 8 & 0x3f));
      }
      const int count = not_two ? std::countr_zero(not_two) / 16 : 4;
      out += count;
      at += 2 * count;
    } else if ((word & 0xc0c0f0c0c0f0) == 0x8080e08080e0) {
      // Two of three bytes, as Chinese, Japanese, Korean and Indic texts have them.
      for (int i = 0; i < 2; ++i, word >>= 24) {
        *out++ =
            static_cast<Unit>((word & 0x0f) << 12 | (word >> 8 & 0x3f) << 6 | (word >> 16 & 0x3f));
      }
      at += 6;
    } else {
      size_t length = 0;
      *out++ = static_cast<Unit>(decode_any(at, &length));
      at += length;
    }
  }
  for (int length = 0; at < end; at += length) {
    *out++ = static_cast<Unit>(decode_utf8({at, end}, 0, &length));
  }
}

}  // namespace

void write_wide(std::string_view utf8, int unit, void* out) {
  if (unit == 1) return write_wide_units(utf8, static_cast<uint8_t*>(out));
  if (unit == 2) return write_wide_units(utf8, static_cast<uint16_t*>(out));
  write_wide_units(utf8, static_cast<uint32_t*>(out));
}

}  // namespace puna
