// The token ids of a sequence, in blocks that copies share: a copy of ten million tokens is a few
// thousand pointers, and what two copies have in common is found without looking at it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace puna {

class TokenList {
 public:
  TokenList() = default;
  explicit TokenList(std::span<const int32_t> tokens) { append(tokens); }

  int64_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  int32_t operator[](int64_t i) const { return (*blocks_[i / kBlock])[i % kBlock]; }

  void append(std::span<const int32_t> tokens);
  void push_back(int32_t token) { append({&token, 1}); }
  void truncate(int64_t size);

  // Appends the tokens [first, first + count) to `out`.
  void copy_to(std::vector<int32_t>& out, int64_t first, int64_t count) const;
  int64_t common_length(const TokenList& other) const;

  // Calls visit(token) for each of the first `count`.
  template <class Visit>
  void each(int64_t count, Visit visit) const {
    for (int64_t first = 0; first < count; first += kBlock) {
      const Block& block = *blocks_[first / kBlock];
      for (int64_t i = 0; i < std::min(kBlock, count - first); ++i) visit(block[i]);
    }
  }

 private:
  static constexpr int64_t kBlock = 4096;
  using Block = std::vector<int32_t>;

  // All but the last hold kBlock tokens; the last may hold some that are not of this list.
  std::vector<std::shared_ptr<Block>> blocks_;
  int64_t size_ = 0;
};

}  // namespace puna
