#include "text/ranked_bpe.h"

#include <algorithm>
#include <array>

#include "base/error.h"
#include "text/bpe.h"
#include "text/table_file.h"

namespace puna {

namespace {

// Tokens that are looked up together.
constexpr size_t kTogether = 256;
// Bytes looked at for each byte of a vocabulary, and for its beginning, before merging is left to
// find out at each word. Llama 4's needs 1.
constexpr size_t kLooksPerByte = 64, kFreeLooks = size_t{1} << 20;

}  // namespace

uint32_t RankedBpe::merged(uint32_t left, uint32_t right) const {
  const Token& follower = tokens_[right];
  uint32_t node = child_of(tokens_[left], follower.first[0]);
  for (uint32_t i = 1; node != kNone && i < follower.length; ++i) {
    node = trie_.child(
        node, i == 1 ? follower.first[1] : static_cast<uint8_t>(bytes_[follower.begin + i]));
  }
  return node == kNone ? kNone : trie_.token_at(node);
}

template <class Look>
bool RankedBpe::stay_apart(uint32_t left, uint32_t right, const Look& look) const {
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
    look(length(right));
    const uint32_t joint = merged(left, right);
    if (joint != kNone && joint < before) return false;
  }
}

bool RankedBpe::stay_apart(uint32_t left, uint32_t right) const {
  return stay_apart(left, right, [](size_t) {});
}

// What the rest of each token behind the longest that it begins with is in the vocabulary. One loop
// for each step, so that memory is asked for long before it is needed.
void RankedBpe::look_up_rests(const Vocabulary& vocabulary, std::span<const uint32_t> tokens,
                              std::span<int32_t> found) const {
  std::array<uint64_t, kTogether> hashes;
  const auto for_each = [&](const auto& work) {
    for (size_t i = 0; i < tokens.size(); ++i) {
      const uint32_t start = shorter_start(tokens[i]);
      if (start != kNone) work(i, tokens[i], start);
    }
  };
  for (const uint32_t token : tokens) __builtin_prefetch(&tokens_[token]);
  for_each([&](size_t, uint32_t token, uint32_t start) {
    __builtin_prefetch(&tokens_[start]);
    __builtin_prefetch(&bytes_[tokens_[token].begin]);
  });
  for_each([&](size_t i, uint32_t token, uint32_t start) {
    hashes[i] = Vocabulary::hash_of(rest(token, start));
    vocabulary.prefetch(hashes[i]);
  });
  for_each([&](size_t i, uint32_t, uint32_t) {
    vocabulary.prefetch_key(vocabulary.candidate(hashes[i]));
  });
  for_each([&](size_t i, uint32_t token, uint32_t start) {
    found[i] = vocabulary.find(rest(token, start), hashes[i]);
    if (found[i] != Vocabulary::kNone) __builtin_prefetch(&tokens_[found[i]]);
  });
}

// Parts are shorter than what they make, and neighbours in this order begin with the same ones.
bool RankedBpe::find_parts(const Vocabulary& vocabulary, std::span<const uint32_t> by_length) {
  MergeTable merges;  // filled when first needed
  size_t looked = 0;
  const size_t most = kFreeLooks + kLooksPerByte * vocabulary.joined_bytes().size();
  std::array<int32_t, kTogether> rests;
  for (; !by_length.empty(); by_length = by_length.subspan(std::min(kTogether, by_length.size()))) {
    const auto tokens = by_length.first(std::min(kTogether, by_length.size()));
    look_up_rests(vocabulary, tokens, rests);
    for (size_t i = 0; i < tokens.size(); ++i) {
      const uint32_t token = tokens[i];
      if (length(token) == 1) {
        if (token >= 256) return false;
        tokens_[token].left = tokens_[token].right = token;
        continue;
      }
      // A beginning and the rest that are tokens. There is at most one such pair that is the
      // encoding by the merges of lower ranks.
      const uint32_t longest = shorter_start(token);
      for (uint32_t left = longest; left != kNone; left = shorter_start(left)) {
        if (left > token || !is_reachable(left)) continue;
        const int32_t found = left == longest ? rests[i] : vocabulary.find(rest(token, left));
        if (found == Vocabulary::kNone) continue;
        const auto right = static_cast<uint32_t>(found);
        if (looked > most) return false;
        if (right < token && is_reachable(right) &&
            stay_apart(left, right, [&](size_t bytes) { looked += bytes; })) {
          tokens_[token].left = left;
          tokens_[token].right = right;
          break;
        }
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
  }
  return true;
}

void RankedBpe::make_links() {
  links_ = Memory(trie_.nodes() * sizeof(uint64_t));
  shorter_ends_ = Memory(tokens_.size() * sizeof(uint32_t));
}

std::optional<RankedBpe> RankedBpe::of(const Vocabulary& vocabulary) {
  std::optional<TokenTrie::Built> built = TokenTrie::of(vocabulary);
  if (!built) return std::nullopt;
  RankedBpe bpe;
  bpe.trie_ = std::move(built->trie);
  const size_t size = vocabulary.size();
  bpe.bytes_ = vocabulary.joined_bytes().data();
  bpe.tokens_.reserve(size);
  for (size_t id = 0; id < size; ++id) {
    const std::string_view bytes = vocabulary.ordinary(id);
    Token token;
    if (!bytes.empty()) {
      token.length = static_cast<uint16_t>(bytes.size());
      token.begin = static_cast<uint32_t>(bytes.data() - bpe.bytes_);
      std::copy_n(bytes.begin(), std::min(bytes.size(), sizeof(token.first)), token.first);
      const auto [base, next_bytes, longest_prefix] = built->of_tokens[id];
      token.base = base;
      token.next_bytes = next_bytes;
      token.shorter_start = longest_prefix;
    }
    bpe.tokens_.push_back(token);
  }
  if (!bpe.find_parts(vocabulary, built->by_length)) return std::nullopt;
  if (!bpe.all_reachable_) {
    for (Token& token : bpe.tokens_) {
      uint32_t& start = token.shorter_start;
      while (start != kNone && !bpe.is_reachable(start)) start = bpe.shorter_start(start);
    }
  }
  bpe.make_links();
  return bpe;
}

void RankedBpe::save(TableWriter& out) const {
  trie_.save(out);
  out.table(tokens_);
}

std::optional<RankedBpe> RankedBpe::load(TableReader& in, const Vocabulary& vocabulary) {
  RankedBpe bpe;
  bpe.bytes_ = vocabulary.joined_bytes().data();
  Table<uint16_t> lengths = vocabulary.ordinary_lengths();
  if (!bpe.trie_.load(in, lengths) || !in.table(bpe.tokens_) || !bpe.check(vocabulary, lengths)) {
    return std::nullopt;
  }
  bpe.make_links();
  return bpe;
}

bool RankedBpe::check(const Vocabulary& vocabulary, std::span<uint16_t> lengths) {
  const size_t size = tokens_.size(), bytes = vocabulary.joined_bytes().size();
  if (size != lengths.size()) return false;
  for (uint32_t id = 0; id < size; ++id) {
    const Token& token = tokens_[id];
    if (token.length != lengths[id] || token.begin > bytes - token.length ||
        token.base >= trie_.nodes()) {
      return false;
    }
    all_reachable_ &= is_reachable(id) || lengths[id] == 0;
    if (!is_reachable(id)) lengths[id] = 0;
  }
  const auto length_of = [&](uint32_t id) -> size_t { return id < size ? lengths[id] : 0; };
  for (uint32_t id = 0; id < size; ++id) {
    const Token& token = tokens_[id];
    // Parts are shorter than the whole, starts than the token: every walk along them ends.
    const size_t left = length_of(token.left), right = length_of(token.right);
    const bool is_byte = token.length == 1 && token.left == id && token.right == id;
    const bool is_merged = left != 0 && right != 0 && left + right == token.length;
    const bool is_unreachable = token.length != 1 && token.left == kNone && token.right == kNone;
    if (!is_byte && !is_merged && !is_unreachable) return false;
    const size_t start = length_of(token.shorter_start);
    if (token.shorter_start != kNone && (start == 0 || start >= token.length)) return false;
  }
  return true;
}

uint32_t RankedBpe::step(uint32_t node, uint8_t byte) const {
  uint32_t next = trie_.child(node, byte);
  while (next == kNone) {  // the root has all children
    node = fail(node);
    next = trie_.child(node, byte);
  }
  const std::atomic_ref<uint64_t> known = link(next);
  if (known.load(std::memory_order_acquire) == 0) {
    const bool is_byte = node == trie_.root();
    const uint32_t end = is_byte ? trie_.root() : step(fail(node), byte);
    const uint32_t shorter_token = is_byte ? kNone : longest_end(end);
    uint32_t token = trie_.token_at(next);
    if (token == kNone || !is_reachable(token)) {
      token = shorter_token;
    } else {
      shorter(token).store(shorter_token, std::memory_order_relaxed);
    }
    known.store(uint64_t{token} << 32 | end, std::memory_order_release);
  }
  return next;
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
  RankedBpe::Start next = bpe.longest_start(bytes, &steps);
  // Whether no longer token begins where `next` does, and the token before it.
  bool next_is_longest = true, before_is_longest = false;
  for (;;) {
    const uint32_t before = end != out ? static_cast<uint32_t>(end[-1]) : left;
    if (before != RankedBpe::kNone && next.token != RankedBpe::kNone) {
      const uint32_t fit = bpe.longest_fit(before, next.token, memo, before_is_longest);
      // Mostly it is this one: then what follows need not wait for its entry.
      if (fit != next.token) {
        next = bpe.start_of(fit);
        next_is_longest = false;
      }
    }
    if (next.token == RankedBpe::kNone) {
      if (end == out) fail_no_encoding(bytes.size());
      dead.set(at);
      const auto last = static_cast<uint32_t>(*--end);
      at -= bpe.length(last);
      next = bpe.start_of(bpe.shorter_start(last));
      next_is_longest = before_is_longest = false;
      continue;
    }
    if (dead.at(at + next.length)) {
      next = bpe.start_of(bpe.shorter_start(next.token));
      next_is_longest = false;
      continue;
    }
    *end++ = static_cast<int32_t>(next.token);
    at += next.length;
    if (at == bytes.size()) return end;
    if (steps > kFreeSteps + kStepsPerByte * at) return nullptr;
    before_is_longest = next_is_longest;
    next = bpe.longest_start(bytes.substr(at), &steps);
    next_is_longest = true;
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
