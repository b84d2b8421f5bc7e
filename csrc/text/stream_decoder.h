// Token ids to text as they come: whole characters only, and nothing that may still become part of
// a stop string.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "text/tokenizer.h"

namespace puna {

class StreamDecoder {
 public:
  // The tokenizer must outlive the decoder. Throws InvalidRequest for an empty stop string.
  explicit StreamDecoder(const Tokenizer& tokenizer, std::vector<std::string> stops = {},
                         bool skip_special = true);

  // Text that can be shown after this id: valid UTF-8, with one U+FFFD for each maximal part of an
  // invalid sequence. The texts of all calls and of finish(), joined, are the decoding of all ids,
  // cut before the earliest stop string (the longest of those that begin at the same place). Empty
  // once stopped().
  std::string push(int32_t id);
  // What was held back: an incomplete character becomes U+FFFD.
  std::string finish();

  bool stopped() const { return stopped_; }
  const std::string& stop() const { return stop_; }  // the one that was met, or empty

 private:
  std::string release(bool all);

  const Tokenizer* tokenizer_;
  std::vector<std::string> stops_;
  bool skip_special_;
  std::string bytes_;  // not yet characters: an incomplete tail of at most 3 bytes between calls
  std::string text_;   // characters that may begin a stop string
  bool stopped_ = false;
  std::string stop_;
};

}  // namespace puna
