// Text whose characters take one, two or four bytes each, as Python keeps it, into UTF-8 and back.
#pragma once

#include <cstddef>
#include <string_view>

namespace puna {

// Reads from front to back. The characters must outlive it.
class WideText {
 public:
  // `unit` is the bytes of a character: 1 (Latin-1), 2 or 4 (code points).
  WideText(const void* characters, size_t count, int unit)
      : characters_(characters), count_(count), unit_(unit) {}

  // Writes the next characters as UTF-8, as many as there is room for, and returns their bytes.
  // Stops at what is no character: half of a surrogate pair.
  size_t write(char* out, size_t room);
  // Whether all is written; if not though there was room, it has stopped.
  bool done() const { return at_ == count_; }
  bool stopped() const { return stopped_; }

  // Room for all that is not yet written.
  size_t most_bytes() const { return (count_ - at_) * (unit_ == 1 ? 2 : unit_ == 2 ? 3 : 4); }

 private:
  template <class Unit>
  char* write_units(char* out, const char* end);

  const void* characters_;
  size_t count_;
  int unit_;
  size_t at_ = 0;
  bool stopped_ = false;
};

// Writes valid UTF-8 as characters of `unit` bytes, which hold them all (utf8_shape()).
void write_wide(std::string_view utf8, int unit, void* out);

}  // namespace puna
