#include "kv/tiers/pinned.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "base/error.h"

namespace puna {
namespace {

// What is pinned at once, if the budget has room: a call takes some milliseconds, and as long again
// for each 100 MB.
constexpr int64_t kPinnedBlock = int64_t{64} << 20;

class PinnedTier final : public KvTier {
 public:
  PinnedTier(Backend& backend, int64_t budget_bytes) : backend_(backend), budget_(budget_bytes) {}

  const char* name() const override { return "pinned"; }
  int64_t bytes_in_use() const override { return in_use_; }
  int64_t bytes_left() const override { return budget_ - in_use_; }

  void* allocate(size_t bytes) override {
    if (static_cast<int64_t>(bytes) > bytes_left()) return nullptr;
    Size& size = sizes_[bytes];
    if (size.free.empty() && !size.freed.empty()) settle();
    if (size.free.empty() && !add_block(size, bytes)) return nullptr;
    void* const page = size.free.back();
    size.free.pop_back();
    in_use_ += static_cast<int64_t>(bytes);
    std::memset(page, 0, bytes);
    return page;
  }

  void free(void* page, size_t bytes) override {
    sizes_[bytes].freed.push_back(page);
    in_use_ -= static_cast<int64_t>(bytes);
  }

  void copy(void* to, const void* from, size_t bytes) override { backend_.copy(to, from, bytes); }

  void settle() override {
    backend_.to_host(nullptr, {});
    for (auto& [bytes, size] : sizes_) {
      size.free.insert(size.free.end(), size.freed.begin(), size.freed.end());
      size.freed.clear();
    }
  }

 private:
  struct Size {
    std::vector<void*> free;
    std::vector<void*> freed;  // copies to and from them may be on their way
    std::vector<Buffer> blocks;
  };

  bool add_block(Size& size, size_t bytes) {
    const auto page = static_cast<int64_t>(bytes);
    const int64_t pages = std::max<int64_t>(std::min(kPinnedBlock, bytes_left()) / page, 1);
    try {
      Buffer block = backend_.allocate_host(static_cast<size_t>(pages) * bytes);
      for (int64_t i = pages; i-- > 0;)
        size.free.push_back(static_cast<char*>(block.data()) + static_cast<size_t>(i) * bytes);
      size.blocks.push_back(std::move(block));
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kOutOfMemory) throw;
      return false;
    }
    return true;
  }

  Backend& backend_;
  int64_t budget_, in_use_ = 0;
  std::map<size_t, Size> sizes_;  // by bytes of a page
};

}  // namespace

std::unique_ptr<KvTier> make_pinned_tier(Backend& backend, int64_t budget_bytes) {
  return std::make_unique<PinnedTier>(backend, budget_bytes);
}

}  // namespace puna
