#include "base/token_list.h"

namespace puna {

void TokenList::append(std::span<const int32_t> tokens) {
  while (!tokens.empty()) {
    const int64_t used = size_ % kBlock;
    if (used == 0) {
      blocks_.push_back(std::make_shared<Block>());
      blocks_.back()->reserve(std::min(kBlock, static_cast<int64_t>(tokens.size())));
    } else if (std::shared_ptr<Block>& last = blocks_.back(); last.use_count() > 1) {
      last = std::make_shared<Block>(last->begin(), last->begin() + used);
    } else {
      last->resize(static_cast<size_t>(used));
    }
    const auto count = std::min(static_cast<size_t>(kBlock - used), tokens.size());
    Block& block = *blocks_.back();
    block.insert(block.end(), tokens.begin(), tokens.begin() + static_cast<int64_t>(count));
    size_ += static_cast<int64_t>(count);
    tokens = tokens.subspan(count);
  }
}

void TokenList::truncate(int64_t size) {
  size_ = std::min(size_, size);
  blocks_.resize(static_cast<size_t>((size_ + kBlock - 1) / kBlock));
}

void TokenList::copy_to(std::vector<int32_t>& out, int64_t first, int64_t count) const {
  while (count > 0) {
    const Block& block = *blocks_[first / kBlock];
    const int64_t at = first % kBlock, part = std::min(kBlock - at, count);
    out.insert(out.end(), block.begin() + at, block.begin() + at + part);
    first += part;
    count -= part;
  }
}

int64_t TokenList::common_length(const TokenList& other) const {
  const int64_t shorter = std::min(size_, other.size_);
  for (int64_t first = 0; first < shorter; first += kBlock) {
    const std::shared_ptr<Block>&a = blocks_[first / kBlock], &b = other.blocks_[first / kBlock];
    if (a == b) continue;
    const int64_t count = std::min(kBlock, shorter - first);
    const int64_t same =
        std::mismatch(a->begin(), a->begin() + count, b->begin()).first - a->begin();
    if (same < count) return first + same;
  }
  return shorter;
}

}  // namespace puna
