// Pages of one layer that a device's memory does not hold, from the host's memory or from files, on
// their way to attention; and to places in the device's memory, where there is room for them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "kv/kv_tier.h"

namespace puna {

class TieredStream final : public KvStream {
 public:
  TieredStream(KvTier& device, size_t page_bytes) : device_(device), page_bytes_(page_bytes) {}

  // Pages from `first` on that are in the host's memory, for as long as the pass takes.
  void add(int64_t first, std::span<const std::shared_ptr<void>> pages) {
    for (size_t i = 0; i < pages.size(); ++i) at(first, i).host = pages[i].get();
  }
  // Where pages from `first` on shall stay.
  void keep(int64_t first, std::span<const std::shared_ptr<void>> places) {
    for (size_t i = 0; i < places.size(); ++i) at(first, i).stay = places[i].get();
  }
  // Whether all of them have come there, once the device has done what it was asked for.
  bool has_kept(int64_t first, int64_t count) const {
    return std::all_of(pages_.begin() + first, pages_.begin() + first + count,
                       [](const Page& page) { return page.kept; });
  }
  // The stream of all other pages; it outlives this one's use.
  void set_files(KvStream* files) {
    files_ = files;
    first_of_files_ = 0;
    while (first_of_files_ < std::ssize(pages_) && pages_[first_of_files_].host != nullptr)
      ++first_of_files_;
  }

  const void* wait(int64_t index) override {
    Page& page = at(index, 0);
    const void* const there = page.host != nullptr ? page.host : files_->wait(index);
    if (page.stay != nullptr && !page.kept) {
      device_.from_host(page.stay, there, page_bytes_);
      page.kept = true;
    }
    return there;
  }
  void passed(int64_t index) override {
    if (files_ != nullptr) files_->passed(index);
  }
  // The files' pages among them: what it will not be asked for it does not read.
  void restart(std::span<const uint8_t> wanted) override {
    if (files_ == nullptr) return;
    std::vector<uint8_t> of_files(wanted.begin(), wanted.end());
    for (size_t i = 0; i < std::min(of_files.size(), pages_.size()); ++i)
      if (pages_[i].host != nullptr) of_files[i] = 0;
    files_->restart(of_files);
  }
  int64_t lasting() const override { return first_of_files_; }

 private:
  struct Page {
    const void* host = nullptr;  // null: it comes from the files
    void* stay = nullptr;
    bool kept = false;
  };

  Page& at(int64_t first, size_t i) {
    const auto index = static_cast<size_t>(first) + i;
    if (index >= pages_.size()) pages_.resize(index + 1);
    return pages_[index];
  }

  KvTier& device_;
  const size_t page_bytes_;
  std::vector<Page> pages_;  // by index
  KvStream* files_ = nullptr;
  int64_t first_of_files_ = std::numeric_limits<int64_t>::max();
};

}  // namespace puna
