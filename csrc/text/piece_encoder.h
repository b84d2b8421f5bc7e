// Encoding of plain text: pieces, looked up many at a time, and merged where they are no token.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "platform/memory.h"
#include "text/bpe_model.h"
#include "text/id_buffer.h"
#include "text/pretokenizer.h"

namespace puna {

// Works for one thread at a time. Keeps what it has found out about pieces, within a bound.
class PieceEncoder {
 public:
  explicit PieceEncoder(const BpeModel& model);

  // Appends the ids of a whole text without special tokens; it is valid UTF-8.
  void encode(std::string_view text, IdBuffer& out) { encode_but(0, text, out); }
  // The same for those pieces of a text that are the same whatever follows it; returns their bytes.
  // Nearly all of a text, but for its last pieces.
  size_t encode_certain(std::string_view text, IdBuffer& out) {
    return encode_but(kPiecesAhead, text, out);
  }
  // Of one piece.
  void encode_piece(std::string_view piece, IdBuffer& out);

  PairMemo& memo() { return memo_; }
  // Scratch of RankedBpe::encode().
  std::vector<uint64_t>& dead() { return dead_; }
  // Scratch for a short text made of two.
  std::string& joined() { return joined_; }
  const BpeModel& model() const { return *model_; }

 private:
  // Pieces of up to 31 bytes that are no token, with their ids, of which there are up to seven: a
  // line of the processor's cache each. A piece has one place, where it replaces what was there.
  static constexpr size_t kLineBytes = 31, kLineIds = 7, kLines = 1 << 15;
  using LineKey = std::array<uint64_t, 4>;  // the bytes, and their number in the last
  struct alignas(64) Line {
    LineKey key;  // 0: nothing yet
    int32_t count;
    int32_t ids[kLineIds];
  };

  // Tokens of up to three bytes, which numbers and signs are made of: as many as the processor's
  // nearest cache holds, so that a batch of such pieces needs neither hashes nor memory ahead.
  static constexpr size_t kTinyBytes = 3;
  static constexpr int kTinyBits = 11;
  struct Tiny {
    uint32_t key;  // the bytes, and their number in the last; 0: nothing yet
    int32_t id;
  };

  static LineKey line_key(std::string_view piece);

  struct Batch;

  // All pieces of the text but the last `spared`; returns their bytes.
  size_t encode_but(size_t spared, std::string_view text, IdBuffer& out);
  // The tokens of pieces.
  void find_tiny_tokens(Batch& batch);
  void find_tokens(Batch& batch) const;
  // The ids of pieces whose tokens were looked for.
  void append(const Batch& batch, IdBuffer& out);
  // The token of a piece of a text that ends at `end`, or kNone; then `hash` receives
  // Vocabulary::hash_of() it.
  int32_t find_tiny(std::string_view piece, const char* end, uint64_t& hash);
  // Of pieces that are no token; `hash` is Vocabulary::hash_of() them. There is room for an id for
  // each byte, and kLineIds more.
  int32_t* encode_unknown(std::string_view piece, uint64_t hash, int32_t* out);
  int32_t* merge(std::string_view piece, int32_t* out);

  const BpeModel* model_;
  Table<Line> lines_;
  std::vector<Tiny> tiny_;
  PairMemo memo_;
  std::vector<uint64_t> dead_;
  std::vector<int32_t> symbols_, merged_;
  std::string joined_;
};

}  // namespace puna
