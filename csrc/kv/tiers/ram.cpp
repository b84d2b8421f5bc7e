#include "kv/tiers/ram.h"

#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "base/error.h"

namespace puna {
namespace {

// Of a cache line, and of the widest vector load.
constexpr std::align_val_t kAlignment{64};

class RamTier final : public KvTier {
 public:
  RamTier(size_t page_bytes, size_t budget_bytes)
      : page_bytes_(page_bytes),
        budget_pages_(budget_bytes == 0 ? std::numeric_limits<int64_t>::max()
                                        : static_cast<int64_t>(budget_bytes / page_bytes)) {}

  ~RamTier() override {
    for (void* page : free_) ::operator delete(page, kAlignment);
  }

  const char* name() const override { return "ram"; }
  size_t page_bytes() const override { return page_bytes_; }
  int64_t pages_in_use() const override { return in_use_; }
  int64_t pages_left() const override { return budget_pages_ - in_use_; }

  void* allocate() override {
    if (in_use_ == budget_pages_) return nullptr;
    void* page = nullptr;
    if (free_.empty()) {
      // Room for the page's return is made now, so that free() cannot fail.
      free_.reserve(static_cast<size_t>(in_use_) + 1);
      page = ::operator new(page_bytes_, kAlignment, std::nothrow);
      if (page == nullptr) return nullptr;
    } else {
      page = free_.back();
      free_.pop_back();
    }
    ++in_use_;
    std::memset(page, 0, page_bytes_);
    return page;
  }

  void free(void* page) override {
    free_.push_back(page);
    --in_use_;
  }

  void copy(void* to, const void* from) override { std::memcpy(to, from, page_bytes_); }

 private:
  size_t page_bytes_;
  int64_t budget_pages_, in_use_ = 0;
  std::vector<void*> free_;
};

}  // namespace

std::unique_ptr<KvTier> make_ram_tier(size_t page_bytes, size_t budget_bytes) {
  if (page_bytes == 0) fail(ErrorCode::kInternal, "[kv] a page of 0 bytes");
  return std::make_unique<RamTier>(page_bytes, budget_bytes);
}

}  // namespace puna
