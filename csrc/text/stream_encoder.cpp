#include "text/stream_encoder.h"

#include <algorithm>

#include "base/error.h"
#include "text/unicode_classes.h"

namespace puna {

namespace {

// How many of the last bytes are the beginning of a character that may still be completed.
size_t partial_tail(std::string_view bytes) {
  for (size_t length = 1; length <= std::min<size_t>(3, bytes.size()); ++length) {
    const size_t at = bytes.size() - length;
    if ((bytes[at] & 0xc0) == 0x80) continue;
    return utf8_unit(bytes, at).kind == Utf8Unit::kIncomplete ? length : 0;
  }
  return 0;
}

}  // namespace

StreamEncoder::StreamEncoder(const Tokenizer& tokenizer, EncodeOptions options, size_t max_pending)
    : tokenizer_(&tokenizer),
      options_(std::move(options)),
      max_pending_(max_pending),
      pieces_(tokenizer.model()) {}

void StreamEncoder::feed(std::string_view bytes, IdBuffer& out) {
  const auto lease = tokenizer_->lease();
  PieceEncoder& encoder = lease.encoder();
  std::string joined;
  if (!partial_.empty()) {
    joined = std::move(partial_);
    partial_.clear();
    joined += bytes;
    bytes = joined;
  }
  const size_t tail = partial_tail(bytes);
  partial_ = bytes.substr(bytes.size() - tail);
  bytes.remove_suffix(tail);
  if (options_.is_valid_utf8 || is_valid_utf8(bytes)) {
    feed_text(bytes, encoder, out);
  } else {
    feed_text(to_valid_utf8(bytes), encoder, out);
  }
  if (pending_bytes() > max_pending_) {
    fail(ErrorCode::kInvalidRequest, "[tokenizer] ", pending_bytes(),
         " bytes of text wait for their ids, and max_pending is ", max_pending_,
         ": the text has a word that is longer, and the ids of this vocabulary are known only at a "
         "word's end; raise max_pending or use cut=\"meta\"");
  }
}

void StreamEncoder::finish(IdBuffer& out) {
  const auto lease = tokenizer_->lease();
  if (!partial_.empty()) feed_text(to_valid_utf8(partial_), lease.encoder(), out);
  partial_.clear();
  end_part(lease.encoder(), out);
  cutter_ = MetaCutter();
}

void StreamEncoder::provisional(IdBuffer& out) const {
  StreamEncoder copy = *this;
  copy.finish(out);
}

void StreamEncoder::feed_text(std::string_view text, PieceEncoder& encoder, IdBuffer& out) {
  if (options_.cut == Cut::kMeta) {
    for (size_t end; (end = cutter_.before_cut(text)) < text.size();) {
      feed_between_cuts(text.substr(0, end), /*last=*/false, encoder, out);
      end_part(encoder, out);
      text.remove_prefix(end);
    }
  }
  feed_between_cuts(text, /*last=*/false, encoder, out);
}

void StreamEncoder::end_part(PieceEncoder& encoder, IdBuffer& out) {
  feed_between_cuts({}, /*last=*/true, encoder, out);
  pieces_.end(encoder, out);
}

void StreamEncoder::feed_between_cuts(std::string_view text, bool last, PieceEncoder& encoder,
                                      IdBuffer& out) {
  if (!options_.special.all && options_.special.names.empty()) {
    pieces_.feed(text, encoder, out);
    return;
  }
  std::string joined;
  if (!held_.empty()) {
    joined = std::move(held_);
    held_.clear();
    joined += text;
    text = joined;
  }
  size_t start = 0;  // of the plain text before the next special token
  for (size_t at = 0; (at = tokenizer_->find_added(text, at)) < text.size();) {
    bool may_grow = false;
    const Tokenizer::AddedToken* found =
        tokenizer_->added_at(text, at, options_.special, &may_grow);
    if (may_grow && !last) {
      held_ = text.substr(at);
      text = text.substr(0, at);
      break;
    }
    if (!found) {
      ++at;
      continue;
    }
    pieces_.feed(text.substr(start, at - start), encoder, out);
    pieces_.end(encoder, out);
    out.add(found->id);
    start = at += found->name.size();
  }
  pieces_.feed(text.substr(start), encoder, out);
}

}  // namespace puna
