#include "kv/tiers/ram.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <list>
#include <map>
#include <utility>
#include <vector>

#include "base/error.h"
#include "platform/memory.h"

namespace puna {
namespace {

// Pages are cut from blocks that reach for this size, so that most of a block lies in huge pages
// of the system (2 MiB): attention reads those a tenth faster. A larger block is free as a whole
// less often.
constexpr size_t kBlock = size_t{4} << 20;
// A new block holds at most this share of the pages of its size that are in use: what is not in use
// yet of it stays small beside what is.
constexpr int64_t kGrowth = 8;
// There are at most some hundreds of blocks for each doubling of what is in use: each is a mapping,
// of which the system allows a process some 65,000.
constexpr int64_t kBlocks = 256;

// Pages of one size that the system gave, and gets back, as one. Those that are free are kept in
// memory, or given back to the system, which gives others in their place when they are written.
struct Block {
  Block(size_t page_bytes, int64_t pages)
      : memory(page_bytes * static_cast<size_t>(pages)), pages(pages) {
    // Room for all pages, so that free() cannot fail.
    kept.reserve(static_cast<size_t>(pages));
    given_back.reserve(static_cast<size_t>(pages));
    for (int64_t page = pages; page-- > 0;)
      kept.push_back(static_cast<char*>(memory.data()) + static_cast<size_t>(page) * page_bytes);
  }

  bool full() const { return kept.empty() && given_back.empty(); }
  bool empty() const { return static_cast<int64_t>(kept.size() + given_back.size()) == pages; }

  Memory memory;
  int64_t pages;
  std::vector<void*> kept, given_back;
};

class RamTier final : public KvTier {
 public:
  explicit RamTier(int64_t budget_bytes)
      : budget_(budget_bytes == 0 ? std::numeric_limits<int64_t>::max() : budget_bytes) {}

  const char* name() const override { return "ram"; }
  int64_t bytes_in_use() const override { return in_use_; }
  int64_t bytes_left() const override { return budget_ - in_use_; }

  void* allocate(size_t bytes) override {
    const auto wanted = static_cast<int64_t>(bytes);
    if (bytes % kPageAlignment != 0 || bytes == 0)
      fail(ErrorCode::kInternal, "[kv] a page of ", bytes, " bytes");
    if (wanted > bytes_left()) return nullptr;
    Size& size = sizes_[bytes];
    if (size.with_room.empty() && !add_block(size, bytes)) return nullptr;
    Block& block = size.with_room.front();
    const bool kept = !block.kept.empty();
    if (kept)
      kept_ -= wanted;
    else
      make_room(wanted);  // leaves this block alone: it is not empty, nor does it keep a page
    std::vector<void*>& from = kept ? block.kept : block.given_back;
    void* const page = from.back();
    from.pop_back();
    if (block.full()) size.full.splice(size.full.begin(), size.with_room, size.with_room.begin());
    ++size.in_use;
    in_use_ += wanted;
    std::memset(page, 0, bytes);
    return page;
  }

  void free(void* page, size_t bytes) override {
    Size& size = sizes_.find(bytes)->second;
    const auto place = std::prev(size.blocks.upper_bound(page));
    const std::list<Block>::iterator block = place->second;
    // The block with most of its pages in use comes first, so that others may become empty.
    if (block->full()) size.with_room.splice(size.with_room.begin(), size.full, block);
    block->kept.push_back(page);
    --size.in_use;
    in_use_ -= static_cast<int64_t>(bytes);
    kept_ += static_cast<int64_t>(bytes);
    // One empty block is enough for what comes next; what is large goes back at once.
    if (block->empty() && (size.with_room.size() > 1 || bytes >= kBlock)) drop(size, bytes, block);
  }

  void copy(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }

 private:
  struct Size {
    std::list<Block> with_room, full;
    std::map<void*, std::list<Block>::iterator> blocks;  // by their first page
    int64_t in_use = 0;                                  // pages
  };

  // False if the system has no memory.
  bool add_block(Size& size, size_t bytes) {
    const auto page = static_cast<int64_t>(bytes);
    make_room(page);
    const auto whole =
        std::max(static_cast<int64_t>((kBlock + bytes - 1) / bytes), size.in_use / kBlocks);
    const int64_t room = (budget_ - in_use_ - kept_) / page;
    const int64_t pages = std::clamp<int64_t>(std::min(size.in_use / kGrowth, room), 1, whole);
    try {
      Block& block = size.with_room.emplace_back(bytes, pages);
      size.blocks.emplace(block.memory.data(), std::prev(size.with_room.end()));
    } catch (const Error&) {
      return false;
    }
    kept_ += pages * page;
    return true;
  }

  void drop(Size& size, size_t bytes, std::list<Block>::iterator block) {
    kept_ -= static_cast<int64_t>(block->kept.size() * bytes);
    size.blocks.erase(block->memory.data());
    size.with_room.erase(block);
  }

  // Gives free pages back to the system until `wanted` more bytes are within the budget: empty
  // blocks, then what lies between pages in use.
  void make_room(int64_t wanted) {
    const auto enough = [&] { return wanted <= budget_ - in_use_ - kept_; };
    for (auto& [bytes, size] : sizes_)
      for (auto block = size.with_room.begin(); block != size.with_room.end() && !enough();) {
        const auto next = std::next(block);
        if (block->empty()) drop(size, bytes, block);
        block = next;
      }
    for (auto& [bytes, size] : sizes_)
      for (Block& block : size.with_room)
        while (!block.kept.empty() && !enough()) {
          block.memory.give_back(block.kept.back(), bytes);
          block.given_back.push_back(block.kept.back());
          block.kept.pop_back();
          kept_ -= static_cast<int64_t>(bytes);
        }
  }

  int64_t budget_, in_use_ = 0;
  int64_t kept_ = 0;              // bytes of free pages that are kept
  std::map<size_t, Size> sizes_;  // by bytes of a page
};

}  // namespace

std::unique_ptr<KvTier> make_ram_tier(int64_t budget_bytes) {
  return std::make_unique<RamTier>(budget_bytes);
}

}  // namespace puna
