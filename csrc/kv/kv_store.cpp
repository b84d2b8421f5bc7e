#include "kv/kv_store.h"

#include <algorithm>
#include <limits>
#include <unordered_map>

#include "base/error.h"

namespace puna {
namespace {

int64_t pages_for(int64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

}  // namespace

// Pages in order. Forks share a page through its owner; the last owner gives it back to the tier.
struct KvStore::Pages {
  std::vector<void*> table;
  std::vector<std::shared_ptr<void>> owners;  // of table[i]

  int64_t count() const { return static_cast<int64_t>(table.size()); }
  void push(std::shared_ptr<void> page) {
    table.push_back(page.get());
    owners.push_back(std::move(page));
  }
  void replace(int64_t index, std::shared_ptr<void> page) {
    table[index] = page.get();
    owners[index] = std::move(page);
  }
  // Forgets the pages from `count` on.
  void keep(int64_t count) {
    if (count >= this->count()) return;
    table.resize(static_cast<size_t>(count));
    owners.resize(static_cast<size_t>(count));
  }
  // Hands the first `count` pages to `to`, or drops them.
  void move_front(int64_t count, Pages* to) {
    for (int64_t i = 0; to != nullptr && i < count; ++i) to->push(std::move(owners[i]));
    table.erase(table.begin(), table.begin() + count);
    owners.erase(owners.begin(), owners.begin() + count);
  }
};

// The pages of one layer of one sequence. Between passes a global layer has its full pages sealed
// and one open page, if the last is not full; a chunked layer has open pages only, from the start
// of its chunk. apply() adds pages to both lists: open ones for the rows of the pass, sealed ones
// for the open ones that it will fill.
struct KvStore::Layer {
  int64_t first_position = 0;
  Pages sealed, open;
};

struct KvStore::State {
  int64_t length = 0;
  std::vector<Layer> layers;
};

// What a layer needs for an append.
struct KvStore::Growth {
  int64_t sealed = 0, open = 0;                    // pages beyond those of the tokens held
  int64_t left_over = 0;                           // bytes of pages of a pass not committed
  const std::shared_ptr<void>* at_hand = nullptr;  // the open page that will be written on, if any
};

KvStore::KvStore(KvGeometry geometry, std::unique_ptr<KvTier> tier)
    : geometry_(std::move(geometry)), tier_(std::move(tier)) {
  if (tier_ == nullptr || geometry_.layout.page_bytes() == 0)
    fail(ErrorCode::kInternal, "[kv] a store without a tier, or of empty pages");
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
  for (size_t i = 0; i < copy->layers.size(); ++i) keep(*copy, i, copy->length);
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
  // Going down for one layer may leave another one's boundary, hence the repetition; 0 is a
  // boundary of all.
  for (bool moved = true; moved;) {
    moved = false;
    for (size_t i = 0; i < geometry_.chunk.size(); ++i) {
      const int64_t chunk = geometry_.chunk[i];
      int64_t past = 0;
      if (chunk > 0 && length < current.layers[i].first_position)
        past = length % chunk;
      else if (chunk == 0 && geometry_.seal != KvSeal::kNone &&
               length < current.length / kPageTokens * kPageTokens)
        past = length % kPageTokens;
      length -= past;
      moved |= past > 0;
    }
  }
  return length;
}

// Forgets what a layer holds beyond `length`, which is restorable.
void KvStore::keep(State& current, size_t layer, int64_t length) const {
  Layer& of = current.layers[layer];
  if (geometry_.chunk[layer] > 0) {
    of.first_position = std::min(of.first_position, length);
    of.open.keep(pages_for(length - of.first_position));
    return;
  }
  const int64_t full = length / kPageTokens, committed = current.length / kPageTokens;
  if (full < committed) {
    of.open.keep(0);
    // A page sealed as it was is open again.
    if (length % kPageTokens != 0) of.open.push(of.sealed.owners[full]);
  }
  of.open.keep(pages_for(length) - full);
  of.sealed.keep(full);
}

void KvStore::truncate(Sequence sequence, int64_t length) {
  State& current = state(sequence);
  if (length < 0 || length > current.length || restorable(sequence, length) != length)
    fail(ErrorCode::kInternal, "[kv] a sequence of ", current.length, " tokens cannot go back to ",
         length, "; the nearest below is ", restorable(sequence, length));
  for (size_t i = 0; i < current.layers.size(); ++i) keep(current, i, length);
  current.length = length;
}

KvStore::Growth KvStore::growth(const State& current, size_t layer, int64_t tokens) const {
  const Layer& of = current.layers[layer];
  const bool global = geometry_.chunk[layer] == 0;
  const int64_t held = current.length - of.first_position;
  const int64_t first_open = global ? held / kPageTokens : 0;
  Growth growth;
  growth.open = pages_for(held + tokens) - pages_for(held);
  if (global && geometry_.seal != KvSeal::kNone)
    growth.sealed = (held + tokens) / kPageTokens - held / kPageTokens;
  growth.left_over =
      (of.open.count() - (pages_for(held) - first_open)) *
          static_cast<int64_t>(geometry_.open_bytes()) +
      (of.sealed.count() - first_open) * static_cast<int64_t>(geometry_.sealed_bytes());
  if (held % kPageTokens != 0) growth.at_hand = &of.open.owners[held / kPageTokens - first_open];
  return growth;
}

KvStore::Plan KvStore::plan(std::span<const Append> appends) const {
  Plan plan{{appends.begin(), appends.end()}};
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
    for (size_t l = 0; l < current.layers.size(); ++l) {
      const Growth needed = growth(current, l, tokens);
      plan.open_pages += needed.open;
      plan.sealed_pages += needed.sealed;
      plan.new_bytes -= needed.left_over;
      if (needed.at_hand == nullptr || needed.at_hand->use_count() == 1) continue;
      int64_t& remaining =
          owners.try_emplace(needed.at_hand->get(), needed.at_hand->use_count()).first->second;
      if (remaining == 1) continue;
      --remaining;
      ++plan.open_pages;
    }
  }
  plan.new_bytes += plan.open_pages * static_cast<int64_t>(geometry_.open_bytes()) +
                    plan.sealed_pages * static_cast<int64_t>(geometry_.sealed_bytes());
  if (plan.new_bytes > tier_->bytes_left())
    fail(ErrorCode::kOutOfMemory, {.asked = plan.new_bytes, .limit = tier_->bytes_left()}, "[kv] ",
         plan.new_bytes, " bytes of keys and values are needed, ", tier_->bytes_left(),
         " bytes of the cache's budget are left; close a session, shorten the text or raise the "
         "budget");
  return plan;
}

std::shared_ptr<void> KvStore::new_page(size_t bytes) {
  KvTier* const tier = tier_.get();
  void* const memory = tier->allocate(bytes);
  if (memory == nullptr)
    fail(ErrorCode::kOutOfMemory, "[kv] the system refused a page of ", bytes,
         " bytes for keys and values");
  return {memory, [tier, bytes](void* page) { tier->free(page, bytes); }};
}

void KvStore::apply(const Plan& plan) {
  // Pages of a pass that was not committed go back. The plan may be older than the store's last
  // change: what it needs is counted anew. All pages first, so that a refusal leaves every sequence
  // as it was.
  for (const auto& [sequence, tokens] : plan.appends) {
    State& current = state(sequence);
    for (size_t l = 0; l < current.layers.size(); ++l) keep(current, l, current.length);
  }
  const Plan now = this->plan(plan.appends);
  std::vector<std::shared_ptr<void>> open(now.open_pages), sealed(now.sealed_pages);
  for (std::shared_ptr<void>& page : open) page = new_page(geometry_.open_bytes());
  for (std::shared_ptr<void>& page : sealed) page = new_page(geometry_.sealed_bytes());
  const auto take = [](std::vector<std::shared_ptr<void>>& from) {
    std::shared_ptr<void> page = std::move(from.back());
    from.pop_back();
    return page;
  };
  for (const auto& [sequence, tokens] : plan.appends) {
    State& current = state(sequence);
    for (size_t l = 0; l < current.layers.size(); ++l) {
      const Growth needed = growth(current, l, tokens);
      Layer& layer = current.layers[l];
      if (needed.at_hand != nullptr && needed.at_hand->use_count() > 1) {
        std::shared_ptr<void> own = take(open);
        tier_->copy(own.get(), needed.at_hand->get(), geometry_.open_bytes());
        layer.open.replace(needed.at_hand - layer.open.owners.data(), std::move(own));
      }
      for (int64_t i = 0; i < needed.open; ++i) layer.open.push(take(open));
      for (int64_t i = 0; i < needed.sealed; ++i) layer.sealed.push(take(sealed));
    }
  }
}

void KvStore::begin_pass(std::span<const int64_t> layers) {
  for (const int64_t layer : layers)
    if (layer < 0 || layer >= static_cast<int64_t>(geometry_.chunk.size()))
      fail(ErrorCode::kInternal, "[kv] layer ", layer, " of ", geometry_.chunk.size());
}

KvView KvStore::view(Sequence sequence, int64_t layer) const {
  const State& current = state(sequence);
  if (layer < 0 || layer >= static_cast<int64_t>(current.layers.size()))
    fail(ErrorCode::kInternal, "[kv] layer ", layer, " of ", current.layers.size());
  const Layer& found = current.layers[layer];
  KvView view;
  view.first_position = found.first_position;
  view.sealed = found.sealed.table;
  view.first_open = geometry_.chunk[layer] == 0 ? current.length / kPageTokens : 0;
  view.open = found.open.table;
  return view;
}

void KvStore::commit(const Plan& plan) {
  for (const auto& [sequence, tokens] : plan.appends) {
    State& current = state(sequence);
    const int64_t full = (current.length + tokens) / kPageTokens - current.length / kPageTokens;
    current.length += tokens;
    for (size_t l = 0; l < current.layers.size(); ++l) {
      Layer& layer = current.layers[l];
      const int64_t chunk = geometry_.chunk[l];
      if (chunk == 0) {
        // Sealed as they are, or read in their sealed form from now on.
        layer.open.move_front(full, geometry_.seal == KvSeal::kNone ? &layer.sealed : nullptr);
      } else if (current.length % chunk == 0) {
        layer.open.keep(0);
        layer.first_position = current.length;
      }
    }
  }
}

int64_t KvStore::bytes_in_use() const { return tier_->bytes_in_use(); }

int64_t KvStore::bytes_for(int64_t tokens, int64_t pass) const {
  // A pass may begin anywhere in a page.
  const int64_t open = std::min(pages_for(tokens), pages_for(pass + kPageTokens - 1));
  int64_t bytes = 0;
  for (const int64_t chunk : geometry_.chunk) {
    const auto open_bytes = static_cast<int64_t>(geometry_.open_bytes());
    if (chunk > 0) {
      bytes += pages_for(std::min(chunk, tokens)) * open_bytes;
    } else if (geometry_.seal == KvSeal::kNone) {
      bytes += pages_for(tokens) * open_bytes;
    } else {
      bytes +=
          tokens / kPageTokens * static_cast<int64_t>(geometry_.sealed_bytes()) + open * open_bytes;
    }
  }
  return bytes;
}

}  // namespace puna
