// Byte-pair encoding of one piece: which pairs merge, in which order.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "text/vocabulary.h"

namespace puna {

// Open-addressed map from a pair of ids to the rank of their merge and the id it makes.
class MergeTable {
 public:
  struct Merge {
    uint32_t rank;  // lower merges first
    int32_t id;
  };

  bool empty() const { return used_ == 0; }
  void reserve(size_t count);
  // The first entry of a pair stays. Throws ModelFormat for more than kMostMerges, and for pairs
  // that were chosen for their hashes.
  void add(int32_t left, int32_t right, Merge merge);
  // Throws ModelFormat if pairs that are not there would be looked for for long.
  void require_short_searches() const;
  // Null if the pair does not merge.
  const Merge* find(int32_t left, int32_t right) const;

  void save(TableWriter& out) const;
  // False if the file holds something else than merges of ids below `ids`.
  bool load(TableReader& in, size_t ids);

 private:
  struct Slot {
    uint64_t key = kEmpty;
    Merge merge{};
  };
  static constexpr uint64_t kEmpty = ~uint64_t{0};
  // Llama 4 has half a million.
  static constexpr size_t kMostMerges = size_t{1} << 24;
  size_t place(uint64_t key) const;

  std::vector<Slot> slots_;
  size_t used_ = 0;
};

// Adds what a list of ranks says: two tokens merge if their joint bytes are a token, whose id is
// the merge's rank.
void add_merges_of_ranks(const Vocabulary& vocabulary, MergeTable& merges);

// Appends to `out` the ids of a piece whose bytes have the ids `symbols` (overwritten). Of all
// pairs that merge, the one with the lowest rank goes first, at ties the leftmost. O(n log n).
void merge_pairs(const MergeTable& merges, std::vector<int32_t>& symbols,
                 std::vector<int32_t>& out);

}  // namespace puna
