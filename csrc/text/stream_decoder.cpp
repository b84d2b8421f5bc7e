#include "text/stream_decoder.h"

#include <algorithm>

#include "base/error.h"
#include "text/unicode_classes.h"

namespace puna {

StreamDecoder::StreamDecoder(const Tokenizer& tokenizer, std::vector<std::string> stops,
                             bool skip_special)
    : tokenizer_(&tokenizer), stops_(std::move(stops)), skip_special_(skip_special) {
  for (const std::string& stop : stops_) {
    if (stop.empty())
      fail(ErrorCode::kInvalidRequest, "[stop] a stop string is empty; leave it out");
  }
}

std::string StreamDecoder::push(int32_t id) {
  const std::string_view token = tokenizer_->bytes_of(id);
  if (stopped_) return {};
  if (!skip_special_ || !tokenizer_->is_special(id)) bytes_ += token;
  size_t at = 0;
  while (at < bytes_.size()) {
    const Utf8Unit unit = utf8_unit(bytes_, at);
    if (unit.kind == Utf8Unit::kIncomplete) break;
    text_ += unit.kind == Utf8Unit::kValid ? bytes_.substr(at, unit.length) : "\xef\xbf\xbd";
    at += unit.length;
  }
  bytes_.erase(0, at);
  return release(/*all=*/false);
}

std::string StreamDecoder::finish() {
  if (stopped_) return {};
  text_ += to_valid_utf8(bytes_);
  bytes_.clear();
  return release(/*all=*/true);
}

std::string StreamDecoder::release(bool all) {
  // The earliest stop string in the text, the longest of those at one place. A place at which a
  // longer one may still be completed waits.
  size_t safe = text_.size();  // text before it can be shown
  for (size_t at = 0; at < text_.size() && !stops_.empty(); ++at) {
    const std::string_view rest = std::string_view(text_).substr(at);
    const std::string* met = nullptr;
    bool open = false;
    for (const std::string& stop : stops_) {
      if (rest.starts_with(stop)) {
        if (!met || stop.size() > met->size()) met = &stop;
      } else if (std::string_view(stop).starts_with(rest)) {
        open = true;
      }
    }
    if (open && !all) {
      safe = at;
      break;
    }
    if (met) {
      stopped_ = true;
      stop_ = *met;
      std::string shown = text_.substr(0, at);
      text_.clear();
      bytes_.clear();
      return shown;
    }
  }
  std::string shown = text_.substr(0, safe);
  text_.erase(0, safe);
  return shown;
}

}  // namespace puna
