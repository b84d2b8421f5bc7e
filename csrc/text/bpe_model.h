// Ordinary tokens and how pieces become them: byte-level BPE of either file format.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "text/bpe.h"
#include "text/ranked_bpe.h"
#include "text/vocabulary.h"

namespace puna {

class BpeModel {
 public:
  // `tokens` by id, of which the `added` ones take no part. Two of the others merge if their joint
  // bytes are one, that of the lowest id first. A piece that is a token is not merged.
  static BpeModel of_ranks(ByteStrings tokens, std::vector<bool> added);
  // The two sides of each merge in turn; the first merges first. `whole_first`: a piece that is a
  // token is not merged. Throws ModelFormat if sides, or what they become, are no tokens.
  static BpeModel of_merges(ByteStrings tokens, std::vector<bool> added, const ByteStrings& sides,
                            bool whole_first);

  // Its find() knows the tokens that a piece of their bytes becomes.
  const Vocabulary& vocabulary() const { return vocabulary_; }
  // Null if pieces can be encoded by merging only.
  const RankedBpe* ranked() const { return ranked_ ? &*ranked_ : nullptr; }
  // The same, but null also if a piece may be a token that merging does not make: then ids are
  // known only when the piece is.
  const RankedBpe* incremental() const { return incremental_ ? ranked() : nullptr; }

  // All but which tokens are added.
  void save(TableWriter& out) const;
  // Nothing if the file holds something else.
  static std::optional<BpeModel> load(TableReader& in, std::span<const uint32_t> added);

  // Appends the ids of a piece that is no token; `symbols` is scratch.
  void merge(std::string_view piece, std::vector<int32_t>& symbols,
             std::vector<int32_t>& out) const;

 private:
  BpeModel() = default;
  BpeModel(ByteStrings tokens, std::vector<bool> added);
  // Sets byte_ids_; the first byte that is no token, or nothing.
  std::optional<size_t> find_bytes();

  Vocabulary vocabulary_;
  std::array<int32_t, 256> byte_ids_{};
  std::optional<RankedBpe> ranked_;
  bool incremental_ = false;
  MergeTable merges_;  // empty where ranked_ does its work
};

}  // namespace puna
