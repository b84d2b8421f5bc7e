#include "text/ranked_bpe.h"

#include <algorithm>

#include "base/error.h"
#include "text/bpe.h"

namespace puna {

namespace {

// Tokens whose parts are asked for ahead of their turn.
constexpr uint32_t kLookAhead = 12;

}  // namespace

uint32_t RankedBpe::merged(uint32_t left, uint32_t right) const {
  const Token& follower = tokens_[right];
  uint32_t node = child_of(tokens_[left], follower.first[0]);
  for (uint32_t i = 1; node != kNone && i < follower.length; ++i) {
    node = trie_.child(node, i == 1 ? follower.first[1] : bytes_[follower.begin + i]);
  }
  return node == kNone ? kNone : trie_.token_at(node);
}

bool RankedBpe::stay_apart(uint32_t left, uint32_t right) const {
  // Undoes the merges that made the two, the latest first. At each moment the tokens on both sides
  // of the border must not have merged before the merge that is undone next: `before` is its rank,
  // plus one where a merge of equal rank at the border would have come first, being further left.
  for (;;) {
    const uint32_t last_of_left = tokens_[left].right, first_of_right = tokens_[right].left;
    const bool left_is_byte = last_of_left == left, right_is_byte = first_of_right == right;
    if (left_is_byte && right_is_byte) return true;
    uint32_t before;
    if (right_is_byte || (left > right && !left_is_byte)) {
      before = left;
      left = last_of_left;
    } else {
      before = right + 1;
      right = first_of_right;
    }
    const uint32_t joint = merged(left, right);
    if (joint != kNone && joint < before) return false;
  }
}

bool RankedBpe::find_parts(const Vocabulary& vocabulary) {
  const auto size = static_cast<uint32_t>(tokens_.size());
  MergeTable merges;           // filled when first needed
  std::vector<uint32_t> ends;  // of a token, the longest first
  for (uint32_t token = 0; token < size; ++token) {
    if (token + kLookAhead < size) {
      const Token& soon = tokens_[token + kLookAhead];
      if (soon.shorter_start != kNone) __builtin_prefetch(&tokens_[soon.shorter_start]);
      if (soon.shorter_end != kNone) __builtin_prefetch(&tokens_[soon.shorter_end]);
    }
    const uint32_t whole = length(token);
    if (whole == 0) continue;
    if (whole == 1) {
      if (token >= 256) return false;
      tokens_[token].left = tokens_[token].right = token;
      continue;
    }
    // A beginning and an end that are tokens and meet. There is at most one such pair that is the
    // encoding by the merges of lower ranks.
    ends.clear();
    for (uint32_t end = shorter_end(token); end != kNone; end = shorter_end(end)) {
      ends.push_back(end);
    }
    for (uint32_t left = shorter_start(token); left != kNone && !ends.empty();) {
      const uint32_t right = ends.back(), joint = length(left) + length(right);
      if (joint == whole && left < token && right < token && is_reachable(left) &&
          is_reachable(right) && stay_apart(left, right)) {
        tokens_[token].left = left;
        tokens_[token].right = right;
        break;
      }
      if (joint >= whole) left = shorter_start(left);
      if (joint <= whole) ends.pop_back();
    }
    if (is_reachable(token)) continue;
    // Merging in the order of ranks does not make it. If it comes about nevertheless, one of its
    // parts has a higher rank.
    all_reachable_ = false;
    if (merges.empty()) add_merges_of_ranks(vocabulary, merges);
    std::vector<int32_t> symbols, ids;
    for (const char byte : vocabulary.ordinary(token))
      symbols.push_back(vocabulary.find({&byte, 1}));
    merge_pairs(merges, symbols, ids);
    if (ids.size() == 1) return false;
  }
  return true;
}

// By all tokens, or by those that are reachable if all_reachable_ is false.
void RankedBpe::link(const TokenTrie::Built& built) {
  const auto counts = [&](uint32_t token) { return all_reachable_ || is_reachable(token); };
  longest_end_.assign(trie_.nodes(), kNone);
  for (const uint32_t node : built.by_depth) {
    const uint32_t token = trie_.token_at(node);
    const uint32_t end = longest_end_[trie_.fail(node)];
    if (token == kNone) {
      longest_end_[node] = end;
      continue;
    }
    tokens_[token].shorter_end = end;
    longest_end_[node] = counts(token) ? token : end;
    // A token's beginnings are nearer to the root and have theirs by now.
    const uint32_t prefix = built.of_tokens[token].longest_prefix;
    tokens_[token].shorter_start =
        prefix == kNone || counts(prefix) ? prefix : shorter_start(prefix);
  }
}

std::optional<RankedBpe> RankedBpe::of(const Vocabulary& vocabulary) {
  std::optional<TokenTrie::Built> built = TokenTrie::of(vocabulary);
  if (!built) return std::nullopt;
  RankedBpe bpe;
  bpe.trie_ = std::move(built->trie);
  const size_t size = vocabulary.size();
  bpe.tokens_.resize(size);
  bpe.bytes_.reserve(vocabulary.bytes());
  for (uint32_t id = 0; id < size; ++id) {
    const std::string_view bytes = vocabulary.ordinary(id);
    if (bytes.empty()) continue;
    Token& token = bpe.tokens_[id];
    token.length = static_cast<uint16_t>(bytes.size());
    token.begin = static_cast<uint32_t>(bpe.bytes_.size());
    std::copy_n(bytes.begin(), std::min(bytes.size(), sizeof(token.first)), token.first);
    bpe.bytes_.insert(bpe.bytes_.end(), bytes.begin(), bytes.end());
    token.base = bpe.trie_.base(built->of_tokens[id].node);
    token.next_bytes = built->of_tokens[id].next_bytes;
  }
  bpe.link(*built);
  if (!bpe.find_parts(vocabulary)) return std::nullopt;
  if (!bpe.all_reachable_) bpe.link(*built);
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
                              Dead dead, int32_t* out, uint32_t left) {
  int32_t* end = out;
  size_t at = 0, steps = 0;
  uint32_t token = bpe.longest_start(bytes, &steps);
  for (;;) {
    const uint32_t before = end != out ? static_cast<uint32_t>(end[-1]) : left;
    if (before != RankedBpe::kNone && token != RankedBpe::kNone) {
      token = bpe.longest_fit(before, token, memo);
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
                           int32_t* out, uint32_t left) const {
  if (bytes.size() <= kWordPlaces) {
    return encode_stepping_back(*this, bytes, memo, DeadWord{}, out, left);
  }
  dead.assign(bytes.size() / 64 + 1, 0);
  return encode_stepping_back(*this, bytes, memo, DeadWords{dead}, out, left);
}

}  // namespace puna
