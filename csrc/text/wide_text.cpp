#include "text/wide_text.h"

#include <cstdint>

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

}  // namespace puna
