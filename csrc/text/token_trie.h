// All tokens as a trie in a double array.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "text/vocabulary.h"

namespace puna {

class TokenTrie {
 public:
  static constexpr uint32_t kNone = 0xffffffff;

  // What is known of a token when the trie has been built, and not needed later.
  struct Place {
    uint32_t base = 0;                // of its node
    uint32_t next_bytes = 0;          // of its node's children: bit (byte & 31) for each
    uint32_t longest_prefix = kNone;  // the longest other token that it begins with
  };
  struct Built;

  TokenTrie() = default;
  // Of the ordinary tokens, all 256 single bytes among them; nothing if they need kMostPlaces.
  static std::optional<Built> of(const Vocabulary& vocabulary);

  uint32_t root() const { return kRoot; }
  // Stands for a node's children; 0: there are none.
  uint32_t base(uint32_t node) const { return places_[node] >> kBaseBit; }
  // The child by a byte of the node that has this base, or kNone.
  uint32_t child_at(uint32_t base, uint8_t byte) const {
    const uint32_t next = base ^ byte;
    return label(next) == byte ? next : kNone;
  }
  // The node of a node's bytes and one more, or kNone.
  uint32_t child(uint32_t node, uint8_t byte) const { return child_at(base(node), byte); }
  // The token that a node's bytes are, or kNone.
  uint32_t token_at(uint32_t node) const { return tokens_[node]; }
  bool has_token(uint32_t node) const { return places_[node] & kHasToken; }
  bool has_children(uint32_t node) const { return base(node) != 0; }
  uint32_t depth(uint32_t node) const { return depths_[node]; }
  // The length of the longest token.
  uint32_t deepest() const { return deepest_; }
  // Nodes have numbers below this.
  size_t nodes() const { return places_.size(); }

  void save(TableWriter& out) const;
  // False if the file holds no trie of tokens of these lengths.
  bool load(TableReader& in, std::span<const uint16_t> lengths);

 private:
  // A place of the double array, in 32 bits, so that the processor's caches hold many: from above,
  // the base, at base ^ byte of which the node's children are (0: a leaf); the byte that leads to
  // the node; whether a token ends here. No two nodes have one base, so that the byte tells whose
  // child a node is; the byte of a free place is one that leads to it from no base.
  static constexpr int kBaseBit = 10, kLabelBit = 2;
  static constexpr uint32_t kHasToken = 1;
  static constexpr size_t kMostPlaces = size_t{1} << (32 - kBaseBit);
  static constexpr uint32_t kRoot = 0;
  class PlaceSet;
  class Builder;

  uint32_t label(uint32_t node) const { return places_[node] >> kLabelBit & 0xff; }
  bool check(std::span<const uint16_t> lengths);

  Table<uint32_t> places_, tokens_;
  Table<uint16_t> depths_;
  uint32_t deepest_ = 0;
};

struct TokenTrie::Built {
  TokenTrie trie;
  Table<Place> of_tokens;
  Table<uint32_t> by_length;  // all tokens; of equal length in the order of their bytes
};

}  // namespace puna
