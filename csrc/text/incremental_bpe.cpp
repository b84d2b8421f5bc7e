#include "text/incremental_bpe.h"

#include <algorithm>
#include <memory>

#include "base/error.h"

namespace puna {

namespace {

// Room for the places of Llama 4's vocabulary, which keeps less than 256 of them.
constexpr size_t kUsualPlaces = 512;
// From how many bytes on encode() is worth its confirmation.
constexpr size_t kMany = 96;
// How far from the end a place is looked for through which all encodings go. Mostly it is nearer
// than the first.
constexpr size_t kMargins[] = {32, 64, 128};

}  // namespace

IncrementalBpe::IncrementalBpe(const RankedBpe& bpe) : bpe_(&bpe) {
  last_.reserve(kUsualPlaces);
  bytes_.reserve(kUsualPlaces);
  restart();
}

void IncrementalBpe::restart() {
  start_behind(RankedBpe::kNone);
  dense_ = false;
}

bool IncrementalBpe::fits(uint32_t token, PairMemo& memo) const {
  const size_t place = last_.size() + 1, length = bpe_->length(token);
  if (length > place) return false;  // it began before what is certain
  if (length == place) return emitted_ == RankedBpe::kNone || bpe_->is_pair(emitted_, token, memo);
  const uint32_t left = last_[place - length - 1];
  return left != RankedBpe::kNone && bpe_->is_pair(left, token, memo);
}

bool IncrementalBpe::push_or_miss(std::string_view bytes, PairMemo& memo) {
  bytes_ += bytes;
  bool missed = false;
  for (const char byte : bytes) {
    node_ = bpe_->step(node_, static_cast<uint8_t>(byte));
    // One of the tokens that end here is the last of the encoding. The first guess is the last
    // token before, made longer: right all along a run of one character.
    uint32_t token = last_.empty() ? emitted_ : last_.back();
    if (token != RankedBpe::kNone) token = bpe_->longer(token, static_cast<uint8_t>(byte));
    if (token == RankedBpe::kNone || !fits(token, memo)) {
      token = bpe_->longest_end(node_);
      while (token != RankedBpe::kNone && !fits(token, memo)) token = bpe_->shorter_end(token);
    }
    last_.push_back(token);
    missed |= token == RankedBpe::kNone;
  }
  return !missed;
}

void IncrementalBpe::push(std::string_view bytes, PairMemo& memo) {
  if (!push_or_miss(bytes, memo)) {
    const auto place = std::find(last_.begin(), last_.end(), RankedBpe::kNone) - last_.begin();
    fail(ErrorCode::kInternal, "[tokenizer] no token ends at byte ", place + 1, " of a piece");
  }
}

void IncrementalBpe::push_many(std::string_view bytes, PairMemo& memo, std::vector<uint64_t>& dead,
                               std::vector<int32_t>& out) {
  if (dense_ || bytes.size() < kMany) return push_in_parts(bytes, memo, out);
  std::string text = bytes_;
  text += bytes;
  const auto ids = std::make_unique_for_overwrite<int32_t[]>(text.size());
  const uint32_t before = emitted_;
  const int32_t* const end = bpe_->encode(text, memo, dead, ids.get(), before);
  if (!end) {
    dense_ = true;
    return push_in_parts(bytes, memo, out);
  }
  // Tokens that are open at the end begin within the longest token's length.
  const size_t first_open = text.size() - std::min<size_t>(text.size(), bpe_->trie().deepest());
  const int32_t* settled = end;
  size_t place = text.size();
  for (const size_t margin : kMargins) {
    while (settled != ids.get() && text.size() - place < margin) {
      place -= bpe_->length(static_cast<uint32_t>(*--settled));
    }
    if (settled == ids.get()) break;
    start_behind(static_cast<uint32_t>(settled[-1]));
    for (size_t at = first_open; at < place; ++at) {
      node_ = bpe_->step(node_, static_cast<uint8_t>(text[at]));
    }
    push_or_miss(std::string_view(text).substr(place), memo);
    if (all_open_are_reached()) {
      out.insert(out.end(), static_cast<const int32_t*>(ids.get()), settled);
      return drain(out);
    }
  }
  start_behind(before);
  push_in_parts(text, memo, out);
}

void IncrementalBpe::push_in_parts(std::string_view bytes, PairMemo& memo,
                                   std::vector<int32_t>& out) {
  // Ids are looked for after so many bytes, so that no more places are kept.
  constexpr size_t kPlacesAtOnce = 64;
  for (size_t at = 0; at < bytes.size(); at += kPlacesAtOnce) {
    push(bytes.substr(at, kPlacesAtOnce), memo);
    drain(out);
  }
}

void IncrementalBpe::start_behind(uint32_t token) {
  node_ = bpe_->trie().root();
  emitted_ = token;
  last_.clear();
  bytes_.clear();
}

bool IncrementalBpe::all_open_are_reached() const {
  const TokenTrie& trie = bpe_->trie();
  const auto is_reached = [&](size_t back) {
    return back == last_.size() ||
           (back < last_.size() && last_[last_.size() - back - 1] != RankedBpe::kNone);
  };
  if (!is_reached(0)) return false;
  for (uint32_t node = node_; node != trie.root(); node = bpe_->fail(node)) {
    if (trie.has_children(node) && !is_reached(trie.depth(node))) return false;
  }
  return true;
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
  for (uint32_t node = node_; node != trie.root() && common > 0; node = bpe_->fail(node)) {
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
  bytes_.erase(0, common);
}

}  // namespace puna
