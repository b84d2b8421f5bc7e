// Byte-pair encoding of one piece whose end is not known yet.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text/ranked_bpe.h"

namespace puna {

// For each place the last token of the encoding up to there: all encodings of beginnings form a
// tree. Whatever follows, the encoding goes through the common ancestor of the places from which a
// token may still go on; up to there the ids are certain, and nothing before it is kept.
class IncrementalBpe {
 public:
  explicit IncrementalBpe(const RankedBpe& bpe);

  // For a new piece.
  void restart();
  void push(std::string_view bytes, PairMemo& memo);
  // The same for many bytes, and appends ids that have become certain. They are those of
  // RankedBpe::encode(), which is faster, up to a place behind which push() confirms them. `dead`
  // is scratch.
  void push_many(std::string_view bytes, PairMemo& memo, std::vector<uint64_t>& dead,
                 std::vector<int32_t>& out);
  // Appends the ids that have become certain.
  void drain(std::vector<int32_t>& out);
  // Appends the remaining ids if the piece is complete, and leaves it as it is.
  void complete(std::vector<int32_t>& out) const { append_path(last_.size(), out); }

  // Bytes whose ids have not been given out.
  size_t pending() const { return last_.size(); }

 private:
  // Whether the encoding up to the next place may end with a token whose bytes end there.
  bool fits(uint32_t token, PairMemo& memo) const;
  // The same where a place may have no encoding from place 0 on, for which kNone stands; false if
  // one has none.
  bool push_or_miss(std::string_view bytes, PairMemo& memo);
  void push_in_parts(std::string_view bytes, PairMemo& memo, std::vector<int32_t>& out);
  void start_behind(uint32_t token);
  // Whether all places from which a token may go on are reached through place 0.
  bool all_open_are_reached() const;
  // Appends the ids of the encoding up to place `end`.
  void append_path(size_t end, std::vector<int32_t>& out) const;
  size_t before(size_t place) const { return place - bpe_->length(last_[place - 1]); }

  const RankedBpe* bpe_;
  uint32_t node_;               // the longest end of the piece that is in the trie
  uint32_t emitted_;            // the token before place 0, or none
  bool dense_;                  // whether encode() is slow at the piece
  std::vector<uint32_t> last_;  // [i]: the last token up to place i + 1
  std::string bytes_;           // of the places
};

}  // namespace puna
