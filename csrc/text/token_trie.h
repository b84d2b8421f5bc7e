// All tokens as a trie in a double array, with the failure links of Aho and Corasick.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "text/vocabulary.h"

namespace puna {

class TokenTrie {
 public:
  static constexpr uint32_t kNone = 0xffffffff;

  TokenTrie() = default;
  // Of the ordinary tokens, all 256 single bytes among them.
  explicit TokenTrie(const Vocabulary& vocabulary);

  uint32_t root() const { return kRoot; }
  // The node of a node's bytes and one more, or kNone.
  uint32_t child(uint32_t node, uint8_t byte) const {
    const uint32_t next = nodes_[node].base ^ byte;
    return nodes_[next].parent == node ? next : kNone;
  }
  // The node of the longest end of (a node's bytes and one more) that is in the trie.
  uint32_t step(uint32_t node, uint8_t byte) const {
    uint32_t next = child(node, byte);
    while (next == kNone) {
      node = nodes_[node].fail;
      next = child(node, byte);
    }
    return next;
  }
  // The token that a node's bytes are, or kNone.
  uint32_t token_at(uint32_t node) const { return nodes_[node].token; }
  uint32_t node_of(uint32_t token) const { return node_of_[token]; }
  // The longest proper end of a node's bytes that is in the trie.
  uint32_t fail(uint32_t node) const { return nodes_[node].fail; }
  bool has_children(uint32_t node) const { return nodes_[node].base != 0; }
  uint32_t depth(uint32_t node) const { return depths_[node]; }
  // The longest token that a token begins with, other than itself, or kNone.
  uint32_t longest_prefix(uint32_t token) const { return longest_prefix_[token]; }
  // Nodes have numbers below this.
  size_t nodes() const { return nodes_.size(); }
  // Calls visit(node) for all nodes but the root, the shorter before the longer.
  template <class Visit>
  void for_each_by_depth(const Visit& visit) const {
    for (const uint32_t node : by_depth_) visit(node);
  }

 private:
  struct Node {
    uint32_t base = 0;  // the children are at base ^ byte; 0: a leaf
    uint32_t parent = kNone;
    uint32_t token = kNone;
    uint32_t fail = 0;
  };
  // Children of the root are at 256 ^ byte, so that no base is 0.
  static constexpr uint32_t kRoot = 0;
  struct Builder;
  void link();

  std::vector<Node> nodes_;
  std::vector<uint16_t> depths_;
  std::vector<uint32_t> by_depth_;
  std::vector<uint32_t> node_of_;
  std::vector<uint32_t> longest_prefix_;
};

}  // namespace puna
