#include "text/ranked_bpe.h"

#include <algorithm>

#include "base/error.h"
#include "text/bpe.h"

namespace puna {

uint32_t RankedBpe::merged(uint32_t left, uint32_t right) const {
  uint32_t node = trie_.node_of(left);
  const Token& follower = tokens_[right];
  for (uint32_t i = 0; i < follower.length; ++i) {
    const uint8_t byte =
        i < sizeof(follower.first) ? follower.first[i] : bytes_[follower.begin + i];
    node = trie_.child(node, byte);
    if (node == kNone) return kNone;
  }
  return trie_.token_at(node);
}

bool RankedBpe::is_pair(uint32_t left, uint32_t right, uint32_t before) const {
  // Undoes the merges that made the two, the latest first. At each moment the tokens on both sides
  // of the border must not have merged before the merge that is undone next: `before` is its rank,
  // plus one where a merge of equal rank at the border would have come first, being further left.
  for (;;) {
    const uint32_t joint = merged(left, right);
    if (joint != kNone && joint < before) return false;
    const bool undo_left = left > right;
    for (int side = 0;; ++side) {
      if (side == 2) return true;  // both are single bytes
      if (undo_left == (side == 0)) {
        if (tokens_[left].right == left) continue;
        before = left;
        left = tokens_[left].right;
      } else {
        if (tokens_[right].left == right) continue;
        before = right + 1;
        right = tokens_[right].left;
      }
      break;
    }
  }
}

bool RankedBpe::find_parts(const Vocabulary& vocabulary) {
  const size_t size = vocabulary.size();
  MergeTable merges;  // filled when first needed
  for (uint32_t token = 0; token < size; ++token) {
    const std::string_view bytes = vocabulary.ordinary(token);
    if (bytes.empty()) continue;
    if (bytes.size() == 1) {
      if (token >= 256) return false;
      tokens_[token].left = tokens_[token].right = token;
      continue;
    }
    for (uint32_t left = trie_.longest_prefix(token); left != kNone;
         left = trie_.longest_prefix(left)) {
      if (left >= token || !is_reachable(left)) continue;
      const int32_t right = vocabulary.find(bytes.substr(length(left)));
      if (right < 0 || static_cast<uint32_t>(right) >= token ||
          !is_reachable(static_cast<uint32_t>(right)) ||
          !is_pair(left, static_cast<uint32_t>(right), token)) {
        continue;
      }
      tokens_[token].left = left;
      tokens_[token].right = static_cast<uint32_t>(right);
      break;
    }
    if (is_reachable(token)) continue;
    // Merging in the order of ranks does not make it. If it comes about nevertheless, one of its
    // parts has a higher rank.
    all_reachable_ = false;
    if (merges.empty()) add_merges_of_ranks(vocabulary, merges);
    std::vector<int32_t> symbols, ids;
    for (const char byte : bytes) symbols.push_back(vocabulary.find({&byte, 1}));
    merge_pairs(merges, symbols, ids);
    if (ids.size() == 1) return false;
  }
  return true;
}

void RankedBpe::link_reachable() {
  longest_end_.assign(trie_.nodes(), kNone);
  trie_.for_each_by_depth([&](uint32_t node) {
    const uint32_t token = trie_.token_at(node);
    const uint32_t end = longest_end_[trie_.fail(node)];
    if (token == kNone) {
      longest_end_[node] = end;
      return;
    }
    tokens_[token].shorter_end = end;
    longest_end_[node] = is_reachable(token) ? token : end;
    // A token's beginnings are nearer to the root and have theirs by now.
    const uint32_t prefix = trie_.longest_prefix(token);
    tokens_[token].shorter_start =
        prefix == kNone || is_reachable(prefix) ? prefix : shorter_start(prefix);
  });
}

std::optional<RankedBpe> RankedBpe::of(const Vocabulary& vocabulary) {
  RankedBpe bpe;
  const size_t size = vocabulary.size();
  bpe.tokens_.resize(size);
  for (size_t token = 0; token < size; ++token) {
    const std::string_view bytes = vocabulary.ordinary(token);
    Token& entry = bpe.tokens_[token];
    entry.length = static_cast<uint16_t>(bytes.size());
    entry.begin = static_cast<uint32_t>(bpe.bytes_.size());
    std::copy_n(bytes.begin(), std::min(bytes.size(), sizeof(entry.first)), entry.first);
    bpe.bytes_.insert(bpe.bytes_.end(), bytes.begin(), bytes.end());
  }
  std::optional<TokenTrie> trie = TokenTrie::of(vocabulary);
  if (!trie) return std::nullopt;
  bpe.trie_ = *std::move(trie);
  if (!bpe.find_parts(vocabulary)) return std::nullopt;
  bpe.link_reachable();
  return bpe;
}

namespace {

[[noreturn]] void fail_no_encoding(size_t bytes) {
  fail(ErrorCode::kInternal, "[tokenizer] a piece of ", bytes, " bytes has no encoding");
}

// Which places of a piece cannot be followed by an encoding of the rest.
struct DeadWord {
  uint64_t bits = 0;
  bool at(size_t i) const { return bits >> i & 1; }
  void set(size_t i) { bits |= uint64_t{1} << i; }
};
struct DeadWords {
  std::vector<uint64_t>& words;
  bool at(size_t i) const { return words[i / 64] >> (i % 64) & 1; }
  void set(size_t i) { words[i / 64] |= uint64_t{1} << (i % 64); }
};

// Up to here a piece's places are the bits of a word.
constexpr size_t kWordPlaces = 63;
// Bytes looked at for each byte of a piece, and for its beginning, before another way is taken.
// Ordinary text needs two or three, random letters five, a run of blanks more than twenty.
constexpr size_t kStepsPerByte = 12, kFreeSteps = 1024;

// Every beginning has one encoding only, so a place is reached by one sequence of tokens: that no
// token fits after it is found at most once. The work is linear in the length.
template <class Dead>
int32_t* encode_stepping_back(const RankedBpe& bpe, std::string_view bytes, PairMemo& memo,
                              Dead dead, int32_t* out) {
  int32_t* end = out;
  size_t at = 0, steps = 0;
  uint32_t token = bpe.longest_start(bytes, &steps);
  for (;;) {
    if (end != out && token != RankedBpe::kNone) {
      token = bpe.longest_fit(static_cast<uint32_t>(end[-1]), token, memo);
    }
    if (token == RankedBpe::kNone) {
      if (end == out) fail_no_encoding(bytes.size());
      dead.set(at);
      token = static_cast<uint32_t>(*--end);
      at -= bpe.length(token);
      token = bpe.shorter_start(token);
      continue;
    }
    const size_t next = at + bpe.length(token);
    if (dead.at(next)) {
      token = bpe.shorter_start(token);
      continue;
    }
    *end++ = static_cast<int32_t>(token);
    at = next;
    if (at == bytes.size()) return end;
    if (steps > kFreeSteps + kStepsPerByte * at) return nullptr;
    token = bpe.longest_start(bytes.substr(at), &steps);
  }
}

}  // namespace

int32_t* RankedBpe::encode(std::string_view bytes, PairMemo& memo, std::vector<uint64_t>& dead,
                           int32_t* out) const {
  if (bytes.size() <= kWordPlaces) {
    return encode_stepping_back(*this, bytes, memo, DeadWord{}, out);
  }
  dead.assign(bytes.size() / 64 + 1, 0);
  return encode_stepping_back(*this, bytes, memo, DeadWords{dead}, out);
}

}  // namespace puna
