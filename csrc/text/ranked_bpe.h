// Byte-pair encoding where ranks are ids: two tokens merge if their joint bytes are a token, the
// lowest id first. For such vocabularies an encoding can be built from left to right:
//
// - A sequence of tokens is the encoding of its bytes if and only if each pair of neighbours is the
//   encoding of the two tokens' bytes (is_pair()). Hence every beginning of an encoding is one.
// - So the encoding of a longer text extends that of a shorter one but for its last tokens, and the
//   last token of the encoding of the first n bytes, kept for every n, tells all of them.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "platform/memory.h"
#include "text/token_trie.h"
#include "text/vocabulary.h"

namespace puna {

// Remembers answers of is_pair() and longest_fit(). Of a thread.
class PairMemo {
 public:
  PairMemo() : fits_(kFits, Fit{~uint64_t{0}, 0}), entries_(kEntries, ~uint64_t{0}) {}

 private:
  friend class RankedBpe;
  static constexpr size_t kEntries = 1 << 14, kFits = 1 << 13;
  struct Fit {
    uint64_t key;  // left << 32 | longest
    uint32_t token;
  };
  std::vector<Fit> fits_;
  std::vector<uint64_t> entries_;  // left << 33 | right << 1 | answer
};

class RankedBpe {
 public:
  static constexpr uint32_t kNone = TokenTrie::kNone;

  // Nothing if the vocabulary does not allow to encode from left to right: a single byte's id is
  // not among the first 256, a token is made by merging one of a higher id, the tokens have too
  // many bytes for a TokenTrie, or how they are made takes too long to find out.
  static std::optional<RankedBpe> of(const Vocabulary& vocabulary);

  // Whether merging the joint bytes of two tokens gives these two again.
  // `cannot_merge`: it is known that their joint bytes are no token.
  bool is_pair(uint32_t left, uint32_t right, PairMemo& memo, bool cannot_merge = false) const {
    const uint64_t key = static_cast<uint64_t>(left) << 33 | static_cast<uint64_t>(right) << 1;
    uint64_t& entry = memo.entries_[key * 0x9e3779b97f4a7c15ull >> 50];
    if ((entry | 1) != (key | 1)) {
      const bool is_one = !cannot_merge && merged(left, right) != kNone;
      entry = key | uint64_t{!is_one && stay_apart(left, right)};
    }
    return entry & 1;
  }
  bool is_pair(uint32_t left, uint32_t right) const {
    return merged(left, right) == kNone && stay_apart(left, right);
  }

  // Whether merging can make a token: the others only ever stand for a whole piece.
  bool is_reachable(uint32_t token) const { return tokens_[token].left != kNone; }
  bool all_reachable() const { return all_reachable_; }
  uint32_t length(uint32_t token) const { return tokens_[token].length; }

  // A token, or kNone, and its length.
  struct Start {
    uint32_t token;
    size_t length;
  };
  Start start_of(uint32_t token) const {
    return {token, token == kNone ? size_t{0} : tokens_[token].length};
  }
  // The longest reachable token with which `bytes` begin; they must not be empty. *steps grows by
  // the bytes looked at. The length is known before memory tells which token it is.
  Start longest_start(std::string_view bytes, size_t* steps) const {
    uint32_t node = trie_.root(), found = kNone;
    size_t length = 0, depth = 0;
    for (const char byte : bytes) {
      node = trie_.child(node, static_cast<uint8_t>(byte));
      if (node == kNone) break;
      ++depth;
      if (trie_.has_token(node) && (all_reachable_ || is_reachable(trie_.token_at(node)))) {
        found = node;
        length = depth;
      }
    }
    *steps += depth;
    return {found == kNone ? kNone : trie_.token_at(found), length};
  }
  // Of a token and those that it begins with, the longest that may follow `left`, or kNone.
  // `left_is_longest`: no longer token begins where `left` does in bytes that go on with `token`.
  uint32_t longest_fit(uint32_t left, uint32_t token, PairMemo& memo, bool left_is_longest) const {
    const uint64_t key = static_cast<uint64_t>(left) << 32 | token;
    PairMemo::Fit& fit = memo.fits_[key * 0x9e3779b97f4a7c15ull >> 51];
    if (fit.key != key) {
      const bool cannot_merge = left_is_longest && all_reachable_;
      while (token != kNone && !is_pair(left, token, memo, cannot_merge)) {
        token = shorter_start(token);
      }
      fit = {key, token};
    }
    return fit.token;
  }
  // The next shorter reachable token with which a token begins, or kNone.
  uint32_t shorter_start(uint32_t token) const { return tokens_[token].shorter_start; }
  // The reachable token of a token's bytes and one more, or kNone.
  uint32_t longer(uint32_t token, uint8_t byte) const {
    const uint32_t node = child_of(tokens_[token], byte);
    if (node == kNone) return kNone;
    const uint32_t found = trie_.token_at(node);
    return found != kNone && is_reachable(found) ? found : kNone;
  }
  const TokenTrie& trie() const { return trie_; }

  // The automaton of Aho and Corasick, of which each part is made when it is first needed: most
  // texts need none. All that is told of a node wants one that step() has returned, or that fail()
  // has for such a one.
  //
  // The node of the longest end of (a node's bytes and one more) that is in the trie; `node` may be
  // the root.
  uint32_t step(uint32_t node, uint8_t byte) const;
  // That of the longest proper end of a node's bytes.
  uint32_t fail(uint32_t node) const {
    return static_cast<uint32_t>(link(node).load(std::memory_order_acquire));
  }
  // The longest reachable token with which a node's bytes end, and the next shorter one than such a
  // token, or kNone.
  uint32_t longest_end(uint32_t node) const {
    return static_cast<uint32_t>(link(node).load(std::memory_order_acquire) >> 32);
  }
  uint32_t shorter_end(uint32_t token) const {
    return shorter(token).load(std::memory_order_relaxed);
  }

  // Ids of a piece, by trying the longest token first and stepping back; out has room for an id for
  // each byte. Returns the end of the ids, or null if the piece is one of those, like long runs of
  // blanks, in which many tokens fit everywhere: IncrementalBpe is better at them. `dead` is
  // scratch. `left` is the token before, if the bytes go on with a piece.
  int32_t* encode(std::string_view bytes, PairMemo& memo, std::vector<uint64_t>& dead, int32_t* out,
                  uint32_t left = kNone) const;

  void save(TableWriter& out) const;
  // Nothing if the file holds something else for that vocabulary.
  static std::optional<RankedBpe> load(TableReader& in, const Vocabulary& vocabulary);

 private:
  // The token of joint bytes, or kNone.
  uint32_t merged(uint32_t left, uint32_t right) const;
  // Whether the merges of the joint bytes that come before those of the two into one give the two.
  bool stay_apart(uint32_t left, uint32_t right) const;
  // `look` is told how many bytes are looked at.
  template <class Look>
  bool stay_apart(uint32_t left, uint32_t right, const Look& look) const;
  // The bytes of a token behind another with which it begins.
  std::string_view rest(uint32_t token, uint32_t start) const {
    const Token& whole = tokens_[token];
    return {bytes_ + whole.begin + length(start), whole.length - length(start)};
  }
  // Whether no walk along parts and beginnings leaves the tokens or goes on for ever. Sets
  // all_reachable_. The lengths are the vocabulary's; they become those of reachable tokens.
  bool check(const Vocabulary& vocabulary, std::span<uint16_t> lengths);
  // Room for what is found out later.
  void make_links();
  void look_up_rests(const Vocabulary& vocabulary, std::span<const uint32_t> tokens,
                     std::span<int32_t> found) const;
  bool find_parts(const Vocabulary& vocabulary, std::span<const uint32_t> by_length);

  // Of a node: fail(), and longest_end() in the upper half; 0 if they are not known. Threads that
  // find it out at once find the same.
  std::atomic_ref<uint64_t> link(uint32_t node) const {
    return std::atomic_ref(static_cast<uint64_t*>(links_.data())[node]);
  }
  std::atomic_ref<uint32_t> shorter(uint32_t token) const {
    return std::atomic_ref(static_cast<uint32_t*>(shorter_ends_.data())[token]);
  }

  // What a look-up needs of a token lies in one line of the processor's cache.
  struct alignas(32) Token {
    // Merging makes it of these two last; a single byte is both itself; kNone: no merge makes it.
    uint32_t left = kNone, right = kNone;
    uint32_t shorter_start = kNone;
    uint32_t begin = 0;  // of its bytes within bytes_
    // In the trie: where its node's children are, and by which bytes, their last five bits, it has
    // some. Most tokens that meet are no token together, which these bits tell for the most part.
    uint32_t base = 0, next_bytes = 0;
    uint16_t length = 0;
    uint8_t first[2] = {};  // bytes
    uint32_t unused = 0;    // so that all bytes are known, which are written to files
  };
  static_assert(sizeof(Token) == 32);

  uint32_t child_of(const Token& token, uint8_t byte) const {
    return token.next_bytes >> (byte & 31) & 1 ? trie_.child_at(token.base, byte) : kNone;
  }

  TokenTrie trie_;
  Table<Token> tokens_;
  const char* bytes_ = nullptr;  // the vocabulary's, which lives as long and does not change
  bool all_reachable_ = true;
  Memory links_, shorter_ends_;  // of all nodes and all tokens, zeros at first
};

}  // namespace puna
