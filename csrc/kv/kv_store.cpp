#include "kv/kv_store.h"

#include <algorithm>
#include <limits>
#include <unordered_map>

#include "base/error.h"

namespace puna {
namespace {

int64_t pages_for(int64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

}  // namespace

// The pages of one layer of one sequence. Forks share a page through its owner; the last owner
// gives it back to the tier.
struct KvStore::Layer {
  int64_t first_position = 0;
  std::vector<void*> pages;
  std::vector<std::shared_ptr<void>> owners;  // of pages[i]

  // Forgets the pages from `count` on.
  void keep(int64_t count) {
    if (count >= static_cast<int64_t>(pages.size())) return;
    pages.resize(static_cast<size_t>(count));
    owners.resize(static_cast<size_t>(count));
  }
};

struct KvStore::State {
  int64_t length = 0;
  std::vector<Layer> layers;
};

KvStore::KvStore(KvGeometry geometry, std::unique_ptr<KvTier> tier)
    : geometry_(std::move(geometry)), tier_(std::move(tier)) {
  if (tier_ == nullptr || tier_->page_bytes() != geometry_.layout.page_bytes())
    fail(ErrorCode::kInternal, "[kv] the layout has pages of ", geometry_.layout.page_bytes(),
         " bytes, the tier's are of another size");
  for (const int64_t chunk : geometry_.chunk)
    if (chunk < 0) fail(ErrorCode::kInternal, "[kv] an attention chunk of ", chunk, " tokens");
}

KvStore::~KvStore() = default;

KvStore::State& KvStore::state(Sequence sequence) const {
  const auto found = sequences_.find(sequence);
  if (found == sequences_.end()) fail(ErrorCode::kInternal, "[kv] there is no sequence ", sequence);
  return *found->second;
}

KvStore::Sequence KvStore::create() {
  auto fresh = std::make_unique<State>();
  fresh->layers.resize(geometry_.chunk.size());
  sequences_.emplace(next_, std::move(fresh));
  return next_++;
}

KvStore::Sequence KvStore::fork(Sequence source) {
  auto copy = std::make_unique<State>(state(source));
  // Pages that apply() made but commit() never filled stay with the source: shared, both would
  // write them.
  for (Layer& layer : copy->layers) layer.keep(pages_for(copy->length - layer.first_position));
  sequences_.emplace(next_, std::move(copy));
  return next_++;
}

void KvStore::release(Sequence sequence) {
  state(sequence);
  sequences_.erase(sequence);
}

int64_t KvStore::length(Sequence sequence) const { return state(sequence).length; }

int64_t KvStore::room(Sequence sequence) const {
  const int64_t length = state(sequence).length;
  int64_t room = std::numeric_limits<int64_t>::max() - length;
  for (const int64_t chunk : geometry_.chunk)
    if (chunk > 0) room = std::min(room, chunk - length % chunk);
  return room;
}

int64_t KvStore::restorable(Sequence sequence, int64_t length) const {
  const State& current = state(sequence);
  length = std::clamp<int64_t>(length, 0, current.length);
  // A layer that has dropped what lies before its first position can only go back to a boundary of
  // its chunks. Going down for one layer may leave another one's boundary, hence the repetition; 0
  // is a boundary of all.
  for (bool moved = true; moved;) {
    moved = false;
    for (size_t i = 0; i < geometry_.chunk.size(); ++i) {
      const int64_t chunk = geometry_.chunk[i];
      if (chunk == 0 || length >= current.layers[i].first_position || length % chunk == 0) continue;
      length -= length % chunk;
      moved = true;
    }
  }
  return length;
}

void KvStore::truncate(Sequence sequence, int64_t length) {
  State& current = state(sequence);
  if (length < 0 || length > current.length || restorable(sequence, length) != length)
    fail(ErrorCode::kInternal, "[kv] a sequence of ", current.length, " tokens cannot go back to ",
         length, "; the nearest below is ", restorable(sequence, length));
  for (Layer& layer : current.layers) {
    layer.first_position = std::min(layer.first_position, length);
    layer.keep(pages_for(length - layer.first_position));
  }
  current.length = length;
}

KvStore::Plan KvStore::plan(std::span<const Append> appends) const {
  Plan plan{{appends.begin(), appends.end()}, 0};
  // Owners of each shared page that would be written, less those that get a copy of their own: the
  // last one may write in place.
  std::unordered_map<const void*, int64_t> owners;
  for (size_t i = 0; i < appends.size(); ++i) {
    const auto [sequence, tokens] = appends[i];
    const State& current = state(sequence);
    if (tokens < 1 || tokens > room(sequence))
      fail(ErrorCode::kInternal, "[kv] ", tokens, " tokens at once, expected 1 to ",
           room(sequence));
    for (size_t j = 0; j < i; ++j)
      if (appends[j].sequence == sequence)
        fail(ErrorCode::kInternal, "[kv] sequence ", sequence, " is appended to twice");
    for (const Layer& layer : current.layers) {
      const int64_t held = current.length - layer.first_position;
      const auto have = static_cast<int64_t>(layer.pages.size());
      plan.new_pages += std::max<int64_t>(0, pages_for(held + tokens) - have);
      if (held % kPageTokens == 0) continue;
      const std::shared_ptr<void>& last = layer.owners[held / kPageTokens];
      if (last.use_count() == 1) continue;
      int64_t& remaining = owners.try_emplace(last.get(), last.use_count()).first->second;
      if (remaining == 1) continue;
      --remaining;
      ++plan.new_pages;
    }
  }
  if (plan.new_pages > tier_->pages_left())
    fail(ErrorCode::kOutOfMemory, "[kv] ", plan.new_pages * tier_->page_bytes(),
         " bytes of keys and values are needed, ", tier_->pages_left() * tier_->page_bytes(),
         " bytes of the cache's budget are left; close a session, shorten the text or raise the "
         "budget");
  return plan;
}

void KvStore::apply(const Plan& plan) {
  // All pages first, so that a refusal leaves every sequence as it was. The plan may be older than
  // the store's last change: what it needs is counted anew.
  std::vector<std::shared_ptr<void>> fresh(this->plan(plan.appends).new_pages);
  KvTier* tier = tier_.get();
  for (std::shared_ptr<void>& page : fresh) {
    void* memory = tier->allocate();
    if (memory == nullptr)
      fail(ErrorCode::kOutOfMemory, "[kv] the system refused a page of ", tier->page_bytes(),
           " bytes for keys and values");
    page = std::shared_ptr<void>(memory, [tier](void* data) { tier->free(data); });
  }
  for (const auto& [sequence, tokens] : plan.appends) {
    State& current = state(sequence);
    for (Layer& layer : current.layers) {
      const int64_t held = current.length - layer.first_position;
      const auto have = static_cast<int64_t>(layer.pages.size());
      const int64_t missing = pages_for(held + tokens) - have;
      const auto take = [&] {
        std::shared_ptr<void> page = std::move(fresh.back());
        fresh.pop_back();
        return page;
      };
      if (held % kPageTokens != 0) {
        const int64_t last = held / kPageTokens;
        if (layer.owners[last].use_count() > 1) {
          std::shared_ptr<void> own = take();
          tier->copy(own.get(), layer.pages[last]);
          layer.owners[last] = std::move(own);
          layer.pages[last] = layer.owners[last].get();
        }
      }
      for (int64_t i = 0; i < missing; ++i) {
        layer.owners.push_back(take());
        layer.pages.push_back(layer.owners.back().get());
      }
    }
  }
}

KvView KvStore::view(Sequence sequence, int64_t layer) const {
  const State& current = state(sequence);
  if (layer < 0 || layer >= static_cast<int64_t>(current.layers.size()))
    fail(ErrorCode::kInternal, "[kv] layer ", layer, " of ", current.layers.size());
  const Layer& found = current.layers[layer];
  return {found.first_position, found.pages};
}

void KvStore::commit(const Plan& plan) {
  for (const auto& [sequence, tokens] : plan.appends) {
    State& current = state(sequence);
    current.length += tokens;
    for (size_t i = 0; i < current.layers.size(); ++i) {
      const int64_t chunk = geometry_.chunk[i];
      if (chunk == 0 || current.length % chunk != 0) continue;
      current.layers[i].keep(0);
      current.layers[i].first_position = current.length;
    }
  }
}

size_t KvStore::bytes_in_use() const {
  return static_cast<size_t>(tier_->pages_in_use()) * tier_->page_bytes();
}

size_t KvStore::bytes_for(int64_t tokens) const {
  int64_t pages = 0;
  for (const int64_t chunk : geometry_.chunk)
    pages += pages_for(chunk > 0 ? std::min(chunk, tokens) : tokens);
  return static_cast<size_t>(pages) * tier_->page_bytes();
}

}  // namespace puna
