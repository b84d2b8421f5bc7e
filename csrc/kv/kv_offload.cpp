// KvStore where attention reads a device's memory: what goes from there to the host's, and how the
// host comes by pages that it saves.
#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "kv/kv_state.h"
#include "kv/kv_store.h"
#include "platform/memory.h"

namespace puna {

int64_t KvStore::layer_bytes() const {
  return unit_ / kPageTokens * static_cast<int64_t>(geometry().sealed_bytes());
}

// Of the host's tier, for whole layers of chunks: beside the ring, which may be needed yet.
int64_t KvStore::host_room() const {
  if (!host_ || unit_ == 0) return 0;
  const int64_t left = host_->bytes_left() - (reader_ ? 0 : read_ahead_bytes());
  return std::max<int64_t>(0, left) / layer_bytes() * layer_bytes();
}

// Moves a layer's pages of the last chunk that has any in the device's memory to the host's; false
// if there are none, or no room for them.
bool KvStore::offload_one() {
  if (!host_ || host_room() < layer_bytes()) return false;
  KvChunk* last = nullptr;
  size_t global = 0;
  for (const auto& [id, current] : sequences_)
    for (const auto& chunk : current->chunks) {
      if (last != nullptr && chunk->index <= last->index) continue;
      for (size_t g = 0; g < globals_.size(); ++g) {
        // Pages that a sequence holds by itself would not be given back.
        const auto is_shared = [](const Page& page) { return page.use_count() > 1; };
        if (!chunk->in_reach(g) || std::ranges::any_of(chunk->pages[g], is_shared)) continue;
        last = chunk.get();
        global = g;
      }
    }
  if (last == nullptr) return false;
  std::vector<Page>& pages = last->pages[global];
  const size_t bytes = geometry().sealed_bytes();
  std::vector<Page> moved;
  for (const Page& page : pages) {
    void* const memory = host_->allocate(bytes);
    if (memory == nullptr) return false;
    moved.push_back(owned(*host_, memory, bytes));
    host_->copy(memory, page.get(), bytes);
  }
  pages = std::move(moved);
  last->offloaded[global] = 1;
  set_pages(*last, global);
  return true;
}

void KvStore::require_host_memory() const {
  if (!tier_->host_memory() && !host_)
    fail(ErrorCode::kUnsupported, "[kv] pages in the memory of ", tier_->name(),
         " cannot go to files or come from them without memory of the host");
}

KvStore::HostPages KvStore::on_host(std::span<const StoredPage> pages) const {
  HostPages found;
  size_t bytes = 0;
  for (const StoredPage& stored : pages) bytes += stored.on_device ? stored.bytes : 0;
  if (bytes > 0) {
    const auto copies = std::make_shared<Memory>(bytes);
    found.copies = {copies, copies->data()};
  }
  if (host_) host_->settle();
  size_t used = 0;
  for (const StoredPage& stored : pages) {
    if (!stored.on_device) {
      found.pages.push_back(stored.page);
      continue;
    }
    void* const to = static_cast<char*>(const_cast<void*>(found.copies.get())) + used;
    tier_->to_host(to, stored.page, stored.bytes);
    used += stored.bytes;
    found.pages.push_back(to);
  }
  return found;
}

KvStore::HostPages KvStore::on_host(const KvChunk& chunk) const {
  std::vector<StoredPage> stored;
  for (size_t g = 0; g < chunk.pages.size(); ++g)
    for (const Page& page : chunk.pages[g])
      stored.push_back({page.get(), geometry().sealed_bytes(), host_ && chunk.in_reach(g)});
  return on_host(stored);
}

}  // namespace puna
