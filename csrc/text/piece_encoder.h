// Encoding of plain text: pieces, looked up many at a time, and merged where they are no token.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "text/bpe_model.h"
#include "text/id_buffer.h"

namespace puna {

// Works for one thread at a time. Keeps what it has found out about pieces, within a bound.
class PieceEncoder {
 public:
  explicit PieceEncoder(const BpeModel& model);

  // Appends the ids of a whole text without special tokens; it is valid UTF-8.
  void encode(std::string_view text, IdBuffer& out);
  // Of one piece.
  void encode_piece(std::string_view piece, IdBuffer& out);

  PairMemo& memo() { return memo_; }
  const BpeModel& model() const { return *model_; }

 private:
  // Pieces of up to 31 bytes that are no token, with their ids, of which there are up to seven: a
  // line of the processor's cache each. A piece has one place, where it replaces what was there.
  static constexpr size_t kLineBytes = 31, kLineIds = 7, kLines = 1 << 15;
  struct alignas(64) Line {
    uint64_t key[4];  // the bytes, and their number in the last; 0: nothing yet
    int32_t count;
    int32_t ids[kLineIds];
  };

  // Of pieces that are no token. There is room for an id for each byte, and kLineIds more.
  int32_t* encode_unknown(std::string_view piece, int32_t* out);
  int32_t* merge(std::string_view piece, int32_t* out);

  const BpeModel* model_;
  std::vector<Line> lines_;
  PairMemo memo_;
  std::vector<uint64_t> dead_;
  std::vector<int32_t> symbols_, merged_;
};

}  // namespace puna
