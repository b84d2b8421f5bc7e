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

void IncrementalBpe::push(std::string_view bytes, PairMemo& memo) {
  for (const char byte : bytes) {
    node_ = bpe_->trie().step(node_, static_cast<uint8_t>(byte));
    const size_t place = last_.size() + 1;
    uint32_t token = bpe_->longest_end(node_);
    for (;; token = bpe_->shorter_end(token)) {
      if (token == RankedBpe::kNone) {
        fail(ErrorCode::kInternal, "[tokenizer] no token ends at byte ", place, " of a piece");
      }
      const size_t length = bpe_->length(token);
      if (length > place) continue;  // it began before what is certain
      const uint32_t left = length == place ? emitted_ : last_[place - length - 1];
      if (left == RankedBpe::kNone || bpe_->is_pair(left, token, memo)) break;
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

void IncrementalBpe::finish(std::vector<int32_t>& out) {
  append_path(last_.size(), out);
  restart();
}

}  // namespace puna
