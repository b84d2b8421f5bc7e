#include "text/incremental_bpe.h"

#include <algorithm>

#include "base/error.h"

namespace puna {

namespace {

// Room for the places of Llama 4's vocabulary, which keeps less than 256 of them.
constexpr size_t kUsualPlaces = 512;

}  // namespace

IncrementalBpe::IncrementalBpe(const RankedBpe& bpe) : bpe_(&bpe) {
  last_.reserve(kUsualPlaces);
  restart();
}

void IncrementalBpe::restart() {
  node_ = bpe_->trie().root();
  emitted_ = RankedBpe::kNone;
  last_.clear();
}

bool IncrementalBpe::fits(uint32_t token, PairMemo& memo) const {
  const size_t place = last_.size() + 1, length = bpe_->length(token);
  if (length > place) return false;  // it began before what is certain
  const uint32_t left = length == place ? emitted_ : last_[place - length - 1];
  return left == RankedBpe::kNone || bpe_->is_pair(left, token, memo);
}

void IncrementalBpe::push(std::string_view bytes, PairMemo& memo) {
  for (const char byte : bytes) {
    node_ = bpe_->trie().step(node_, static_cast<uint8_t>(byte));
    // One of the tokens that end here is the last of the encoding. The first guess is the last
    // token before, made longer: right all along a run of one character.
    uint32_t token = last_.empty() ? emitted_ : last_.back();
    if (token != RankedBpe::kNone) token = bpe_->longer(token, static_cast<uint8_t>(byte));
    if (token == RankedBpe::kNone || !fits(token, memo)) {
      token = bpe_->longest_end(node_);
      while (token != RankedBpe::kNone && !fits(token, memo)) token = bpe_->shorter_end(token);
      if (token == RankedBpe::kNone) {
        fail(ErrorCode::kInternal, "[tokenizer] no token ends at byte ", last_.size() + 1,
             " of a piece");
      }
    }
    last_.push_back(token);
  }
}

void IncrementalBpe::append_path(size_t end, std::vector<int32_t>& out) const {
  const size_t begin = out.size();
  for (size_t place = end; place > 0; place = before(place)) {
    out.push_back(static_cast<int32_t>(last_[place - 1]));
  }
  std::reverse(out.begin() + static_cast<int64_t>(begin), out.end());
}

void IncrementalBpe::drain(std::vector<int32_t>& out) {
  const TokenTrie& trie = bpe_->trie();
  // The next token begins here, or at an earlier place from which the bytes since then are the
  // proper beginning of a token.
  size_t common = last_.size();
  for (uint32_t node = node_; node != trie.root() && common > 0; node = trie.fail(node)) {
    if (!trie.has_children(node)) continue;
    size_t place = last_.size() - trie.depth(node);
    while (common != place) {
      if (common > place) {
        common = before(common);
      } else {
        place = before(place);
      }
    }
  }
  if (common == 0) return;
  append_path(common, out);
  emitted_ = last_[common - 1];
  last_.erase(last_.begin(), last_.begin() + static_cast<int64_t>(common));
}

}  // namespace puna
