#include "text/meta_cut.h"

#include "text/unicode_classes.h"

namespace puna {

size_t MetaCutter::before_cut(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    if (characters_ == kCharacters) {
      characters_ = run_ = 0;
      return at;
    }
    int length = 0;
    const uint32_t code = decode_utf8(text, at, &length);
    const CharClass type = class_of(code);
    const bool space =
        type == CharClass::kSpace || type == CharClass::kNewline || (code >= 0x1c && code <= 0x1f);
    if (space != in_space_) run_ = 0;
    in_space_ = space;
    if (run_ == kRun) {
      run_ = 0;
      return at;
    }
    ++run_;
    ++characters_;
    at += static_cast<size_t>(length);
  }
  return text.size();
}

}  // namespace puna
