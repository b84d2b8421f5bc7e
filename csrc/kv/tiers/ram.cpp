#include "kv/tiers/ram.h"

#include <cstring>
#include <limits>
#include <map>
#include <new>
#include <utility>
#include <vector>

#include "base/error.h"
#include "platform/memory.h"

namespace puna {
namespace {

constexpr std::align_val_t kAlignment{kPageAlignment};
// From here on memory comes from the system in huge pages, and goes back at once.
constexpr size_t kLarge = size_t{2} << 20;

class RamTier final : public KvTier {
 public:
  explicit RamTier(int64_t budget_bytes)
      : budget_(budget_bytes == 0 ? std::numeric_limits<int64_t>::max() : budget_bytes) {}

  ~RamTier() override {
    for (auto& [bytes, size] : sizes_)
      while (!size.kept.empty()) drop(bytes, size);
  }

  const char* name() const override { return "ram"; }
  int64_t bytes_in_use() const override { return in_use_; }
  int64_t bytes_left() const override { return budget_ - in_use_; }

  void* allocate(size_t bytes) override {
    const auto wanted = static_cast<int64_t>(bytes);
    if (bytes % kPageAlignment != 0 || bytes == 0)
      fail(ErrorCode::kInternal, "[kv] a page of ", bytes, " bytes");
    if (wanted > bytes_left()) return nullptr;
    if (bytes >= kLarge) return allocate_large(bytes);
    Size& size = sizes_[bytes];
    void* page = nullptr;
    if (size.kept.empty()) {
      make_room(wanted);
      // Room for the page's return is made now, so that free() cannot fail.
      size.kept.reserve(static_cast<size_t>(size.in_use) + 1);
      page = ::operator new(bytes, kAlignment, std::nothrow);
      if (page == nullptr) return nullptr;
    } else {
      page = size.kept.back();
      size.kept.pop_back();
      kept_ -= wanted;
    }
    ++size.in_use;
    in_use_ += wanted;
    std::memset(page, 0, bytes);
    return page;
  }

  void free(void* page, size_t bytes) override {
    if (bytes >= kLarge) {
      large_.erase(page);
      in_use_ -= static_cast<int64_t>(bytes);
      return;
    }
    Size& size = sizes_.find(bytes)->second;
    size.kept.push_back(page);
    --size.in_use;
    in_use_ -= static_cast<int64_t>(bytes);
    kept_ += static_cast<int64_t>(bytes);
  }

  void copy(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }

 private:
  struct Size {
    std::vector<void*> kept;
    int64_t in_use = 0;  // pages
  };

  void* allocate_large(size_t bytes) {
    make_room(static_cast<int64_t>(bytes));
    try {
      Memory memory(bytes);
      void* const page = memory.data();
      large_.emplace(page, std::move(memory));
      in_use_ += static_cast<int64_t>(bytes);
      return page;
    } catch (const Error&) {
      return nullptr;
    }
  }

  void drop(size_t bytes, Size& size) {
    ::operator delete(size.kept.back(), kAlignment);
    size.kept.pop_back();
    kept_ -= static_cast<int64_t>(bytes);
  }

  // Gives kept pages back to the system until `wanted` more bytes are within the budget.
  void make_room(int64_t wanted) {
    for (auto& [bytes, size] : sizes_)
      while (!size.kept.empty() && wanted > budget_ - in_use_ - kept_) drop(bytes, size);
  }

  int64_t budget_, in_use_ = 0, kept_ = 0;
  std::map<size_t, Size> sizes_;  // by bytes of a page
  std::map<void*, Memory> large_;
};

}  // namespace

std::unique_ptr<KvTier> make_ram_tier(int64_t budget_bytes) {
  return std::make_unique<RamTier>(budget_bytes);
}

}  // namespace puna
