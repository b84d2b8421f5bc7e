// Text to token ids as the text comes, with the ids of the whole text.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text/meta_cut.h"
#include "text/piece_stream.h"
#include "text/tokenizer.h"

namespace puna {

// Keeps a few KiB, however long the text: with Llama 4's vocabulary less than 256 bytes wait for
// their ids at any time. A vocabulary of which a piece's ids depend on the whole piece makes it
// wait for the end of each, and some other may need longer; `max_pending` bounds that.
class StreamEncoder {
 public:
  static constexpr size_t kMaxPending = size_t{1} << 20;

  // The tokenizer must outlive the encoder. `options.threads` is not used.
  explicit StreamEncoder(const Tokenizer& tokenizer, EncodeOptions options = {},
                         size_t max_pending = kMaxPending);

  // Appends the ids that no further text can change. `bytes` may end within a character; those that
  // are not UTF-8 count as U+FFFD. Throws InvalidRequest if more than max_pending bytes wait.
  void feed(std::string_view bytes, IdBuffer& out);
  // Appends the remaining ids. A new text may follow.
  void finish(IdBuffer& out);

  // Bytes of the text whose ids have not been given out.
  size_t pending_bytes() const { return partial_.size() + held_.size() + pieces_.pending(); }
  // Appends what finish() would, and changes nothing.
  void provisional(IdBuffer& out) const;

 private:
  void feed_text(std::string_view text, PieceEncoder& encoder, IdBuffer& out);
  void feed_between_cuts(std::string_view text, bool last, PieceEncoder& encoder, IdBuffer& out);
  void end_part(PieceEncoder& encoder, IdBuffer& out);

  const Tokenizer* tokenizer_;
  EncodeOptions options_;
  size_t max_pending_;
  MetaCutter cutter_;
  PieceStream pieces_;
  std::string partial_;  // of a character: up to three bytes
  std::string held_;     // may become a special token
};

}  // namespace puna
