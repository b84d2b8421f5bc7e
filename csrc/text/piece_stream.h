// Plain text to ids as the text comes.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text/id_buffer.h"
#include "text/incremental_bpe.h"
#include "text/piece_encoder.h"
#include "text/unicode_classes.h"

namespace puna {

// A piece that has begun and may go on.
class OpenPiece {
 public:
  explicit OpenPiece(const BpeModel& model);

  void restart();
  void push(std::string_view bytes, PieceEncoder& encoder);
  // The same for many bytes; appends ids that have become certain.
  void push_many(std::string_view bytes, PieceEncoder& encoder, std::vector<int32_t>& out);
  // Appends the ids that are certain whatever follows; they are gone from here.
  void drain(std::vector<int32_t>& out);
  // Appends the remaining ids if the piece ends here.
  void complete(PieceEncoder& encoder, std::vector<int32_t>& out) const;
  // Places that are kept.
  size_t pending() const { return bpe_ ? bpe_->pending() : bytes_.size(); }

 private:
  std::optional<IncrementalBpe> bpe_;
  std::string bytes_;  // the whole piece, if its ids depend on it as a whole
};

// Pieces that are the same whatever follows are encoded many at a time. The last few of a text wait
// for more of it as they are; where they are long, they go through the pre-tokeniser as a machine
// that takes a character at a time, and their ids need not wait for their ends. Where the end of a
// piece depends on characters still to come there are at most two possible pasts: the piece goes
// on, or it ended at a certain place and another has begun. Ids on which both agree are given out.
//
// Two cases need this, as what decides may be far away. In a run of white space the blanks after a
// newline belong to its piece if another newline follows ("\n    \n"), and not otherwise. Capitals
// after a letter without case belong to its piece if a small letter follows. All other ends are
// decided within three characters, which are held back.
class PieceStream {
 public:
  explicit PieceStream(const BpeModel& model);

  // Valid UTF-8. The encoder is of the same model.
  void feed(std::string_view text, PieceEncoder& encoder, IdBuffer& out);
  // The text, or its part up to a special token, ends here. A new one may follow.
  void end(PieceEncoder& encoder, IdBuffer& out);
  // Bytes of the text whose ids have not been given out.
  size_t pending() const;

 private:
  enum class State {
    kStart,        // no piece is open
    kPrefix,       // one character that may go before a word: a sign or a blank
    kCapitals,     // [prefix] U+, ...
    kCaseless,     // ... the last of them without case: L+ could be matched up to here
    kSmall,        // [prefix] U*L+
    kContraction,  // a word; `held_` may belong to it
    kNumber,
    kSigns,
    kSignsTail,  // [\r\n/]* after signs
    kBlanks,     // two or more, the last of which is held
    kNewline,    // white space, the last a newline
  };
  enum class Fork { kNone, kCapitals, kBlanks };

  struct Character {
    std::string_view bytes;
    CharClass type;
  };
  // What one call works with.
  struct Call {
    PieceEncoder& encoder;
    IdBuffer& out;
  };

  void feed_part(std::string_view text, const Call& call);
  // Until no piece is open, or the text ends; returns the bytes taken.
  size_t take_while_open(std::string_view text, const Call& call);
  static uint32_t run_classes(State state);
  void take_run(std::string_view run, const Call& call);
  // False if the open piece ends before the character, which is not taken then.
  bool take(const Character& c, const Call& call);
  bool contract(const Character& c, const Call& call);
  void take_held(const Call& call);
  void begin(const Character& c, const Call& call);
  void close(const Call& call);
  void fork(Fork kind, const Character& c, const Call& call);
  void choose(bool longer, const Call& call);
  void settle(const Call& call);
  void give(std::vector<int32_t>& ids, size_t count, const Call& call);

  const BpeModel* model_;
  State state_ = State::kStart;  // of the shorter past, if there are two
  Fork fork_ = Fork::kNone;
  OpenPiece piece_;                             // the one past, or the longer of two
  OpenPiece shorter_;                           // the other
  std::vector<int32_t> ready_, ready_shorter_;  // certain in a past, not yet given out
  std::string held_;                            // belongs to no piece yet
  CharClass prefix_ = CharClass::kOther;        // of kPrefix,
  bool takes_signs_ = false;                    // which may be followed by signs
  int numbers_ = 0;
  std::string waiting_;  // text behind the last piece that is certain, if no piece is open
};

}  // namespace puna
