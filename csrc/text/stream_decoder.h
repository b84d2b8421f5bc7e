// Token ids to text as they come: whole characters only, and nothing that may still become part of
// a stop string.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "text/stop_automaton.h"
#include "text/tokenizer.h"

namespace puna {

// What becomes of special tokens.
enum class SpecialText {
  kSkip,   // nothing: the text goes on behind them
  kShow,   // their names are text
  kEvent,  // as kSkip, but the text before them ends there, and event() tells
};

// A copy costs nothing that grows with the text: one can be kept to go back to.
class StreamDecoder {
 public:
  // The tokenizer must outlive the decoder. Throws InvalidRequest for an empty stop string.
  explicit StreamDecoder(const Tokenizer& tokenizer, std::vector<std::string> stops = {},
                         SpecialText special = SpecialText::kSkip, bool include_stop = false);

  // Text that can be shown after this id: valid UTF-8, with one U+FFFD for each maximal part of an
  // invalid sequence. The texts of all calls and of finish(), joined, are the decoding of all ids,
  // cut before the earliest stop string, or with include_stop behind it (the longest of those that
  // begin at the same place). Empty once stopped().
  std::string push(int32_t id);
  // What was held back: an incomplete character becomes U+FFFD.
  std::string finish();

  bool stopped() const { return stop_ >= 0; }
  // The stop string that was met, or empty.
  const std::string& stop() const;
  // How many ids came before the one in which the stop string began; -1 without.
  int64_t stop_token() const { return stop_token_; }
  // With SpecialText::kEvent, the special token that the last push() was given, or -1.
  int32_t event() const { return event_; }

 private:
  // What the characters `bytes` release.
  void take(std::string_view bytes, std::string& shown);
  void stop_here(std::string& shown);
  // Ends the text: what is held back can become part of nothing.
  void flush(std::string& shown);

  const Tokenizer* tokenizer_;
  std::shared_ptr<const StopAutomaton> stops_;
  SpecialText special_;
  bool include_stop_;
  int64_t tokens_ = 0;   // pushed so far
  std::string partial_;  // of a character, up to three bytes
  // Held back is the text of the automaton's node; and for each of its bytes, its token.
  uint32_t node_ = 0;
  std::vector<int64_t> held_tokens_;
  // A stop string that was met, but not before all that begin at its place or earlier, -1: none;
  // and where in the held text it begins.
  int32_t met_ = -1;
  size_t met_at_ = 0;
  int32_t stop_ = -1;
  int64_t stop_token_ = -1;
  int32_t event_ = -1;
};

}  // namespace puna
