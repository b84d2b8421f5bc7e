#include "text/stream_decoder.h"

#include "text/unicode_classes.h"

namespace puna {

StreamDecoder::StreamDecoder(const Tokenizer& tokenizer, std::vector<std::string> stops,
                             SpecialText special, bool include_stop)
    : tokenizer_(&tokenizer),
      stops_(std::make_shared<StopAutomaton>(std::move(stops))),
      special_(special),
      include_stop_(include_stop) {}

const std::string& StreamDecoder::stop() const {
  static const std::string kNone;
  return stopped() ? stops_->stop(stop_) : kNone;
}

std::string StreamDecoder::push(int32_t id) {
  const std::string_view token = tokenizer_->bytes_of(id);
  const bool special = special_ != SpecialText::kShow && tokenizer_->is_special(id);
  event_ = -1;
  std::string shown;
  if (stopped()) return shown;
  if (special) {
    if (special_ == SpecialText::kEvent) {
      flush(shown);
      if (!stopped()) event_ = id;
    }
    ++tokens_;
    return shown;
  }
  std::string joined;
  std::string_view bytes = token;
  if (!partial_.empty()) {
    joined = partial_ + std::string(token);
    bytes = joined;
    partial_.clear();
  }
  for (size_t at = 0; at < bytes.size() && !stopped();) {
    const Utf8Unit unit = utf8_unit(bytes, at);
    const auto length = static_cast<size_t>(unit.length);
    if (unit.kind == Utf8Unit::kIncomplete) {
      partial_ = std::string(bytes.substr(at));
      break;
    }
    take(unit.kind == Utf8Unit::kValid ? bytes.substr(at, length) : "\xef\xbf\xbd", shown);
    at += length;
  }
  ++tokens_;
  return shown;
}

std::string StreamDecoder::finish() {
  std::string shown;
  if (!stopped()) flush(shown);
  return shown;
}

void StreamDecoder::flush(std::string& shown) {
  if (!partial_.empty()) {
    partial_.clear();
    take("\xef\xbf\xbd", shown);
  }
  if (stopped()) return;
  if (met_ >= 0) {
    stop_here(shown);
    return;
  }
  shown += stops_->text(node_);
  node_ = 0;
  held_tokens_.clear();
}

// The held text begins before the stop string that was met.
void StreamDecoder::stop_here(std::string& shown) {
  shown += stops_->text(node_).substr(0, met_at_);
  stop_ = met_;
  stop_token_ = held_tokens_[met_at_];
  if (include_stop_) shown += stop();
}

void StreamDecoder::take(std::string_view bytes, std::string& shown) {
  if (stops_->empty()) {
    shown += bytes;
    return;
  }
  for (const char byte : bytes) {
    const uint32_t next = stops_->step(node_, static_cast<uint8_t>(byte));
    const size_t held = stops_->text(node_).size();
    const size_t released = held + 1 - stops_->text(next).size();
    // What was met counts once nothing that begins at its place or before it can go on.
    if (met_ >= 0 && released > met_at_) {
      stop_here(shown);
      return;
    }
    shown += stops_->text(node_).substr(0, released);
    if (released > held) shown += byte;
    held_tokens_.push_back(tokens_);
    held_tokens_.erase(held_tokens_.begin(), held_tokens_.begin() + static_cast<int64_t>(released));
    met_at_ -= met_ >= 0 ? released : 0;
    node_ = next;
    const int32_t found = stops_->stop_at(node_);
    if (found < 0) continue;
    const size_t at = stops_->text(node_).size() - stops_->stop(found).size();
    if (met_ < 0 || at <= met_at_) {
      met_ = found;
      met_at_ = at;
    }
    if (met_at_ == 0 && !stops_->may_grow(node_)) {
      stop_here(shown);
      return;
    }
  }
}

}  // namespace puna
