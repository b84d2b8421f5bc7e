#include "kv/tiers/device.h"

#include <limits>
#include <map>
#include <utility>

#include "base/error.h"

namespace puna {
namespace {

class DeviceTier final : public KvTier {
 public:
  DeviceTier(Backend& backend, int64_t budget_bytes)
      : backend_(backend),
        budget_(budget_bytes == 0 ? std::numeric_limits<int64_t>::max() : budget_bytes) {}

  const char* name() const override { return backend_.name(); }
  bool host_memory() const override { return !backend_.device_memory(); }
  int64_t bytes_in_use() const override { return in_use_; }
  int64_t bytes_left() const override { return budget_ - in_use_; }

  void* allocate(size_t bytes) override {
    if (static_cast<int64_t>(bytes) > bytes_left()) return nullptr;
    try {
      Buffer page = backend_.allocate(bytes);
      void* const data = page.data();
      pages_.emplace(data, std::move(page));
      in_use_ += static_cast<int64_t>(bytes);
      return data;
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kOutOfMemory) throw;
      return nullptr;
    }
  }

  void free(void* page, size_t bytes) override {
    pages_.erase(page);
    in_use_ -= static_cast<int64_t>(bytes);
  }

  void copy(void* to, const void* from, size_t bytes) override { backend_.copy(to, from, bytes); }

  // Pages are whole blocks, and so whole floats.
  void to_host(void* to, const void* page, size_t bytes) override {
    backend_.to_host(static_cast<float*>(to), {static_cast<const float*>(page), 1, floats(bytes)});
  }
  void from_host(void* page, const void* from, size_t bytes) override {
    backend_.from_host({static_cast<float*>(page), 1, floats(bytes)},
                       static_cast<const float*>(from));
  }
  void settle() override { backend_.to_host(nullptr, {}); }

 private:
  static int64_t floats(size_t bytes) { return static_cast<int64_t>(bytes / sizeof(float)); }

  Backend& backend_;
  int64_t budget_, in_use_ = 0;
  std::map<void*, Buffer> pages_;
};

}  // namespace

std::unique_ptr<KvTier> make_device_tier(Backend& backend, int64_t budget_bytes) {
  return std::make_unique<DeviceTier>(backend, budget_bytes);
}

}  // namespace puna
