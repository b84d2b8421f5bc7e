#include "kv/kv_store.h"

#include <unistd.h>

#include <algorithm>
#include <limits>
#include <unordered_map>

#include "base/error.h"
#include "kv/kv_state.h"

namespace puna {

KvStore::KvStore(KvGeometry geometry, std::unique_ptr<KvTier> tier, KvStoreOptions options,
                 std::unique_ptr<KvTier> host)
    : identity_{options.model, std::move(geometry)},
      options_(std::move(options)),
      files_(options_.files ? *options_.files : system_files()),
      unit_(identity_.geometry.unit()),
      process_(getpid()),
      tier_(std::move(tier)),
      host_(std::move(host)),
      disk_bytes_(std::make_shared<std::atomic<int64_t>>(0)) {
  if (tier_ == nullptr || this->geometry().layout.page_bytes() == 0)
    fail(ErrorCode::kInternal, "[kv] a store without a tier, or of empty pages");
  if (tier_->host_memory()) host_.reset();
  for (size_t layer = 0; layer < this->geometry().chunk.size(); ++layer) {
    const int64_t chunk = this->geometry().chunk[layer];
    if (chunk < 0) fail(ErrorCode::kInternal, "[kv] an attention chunk of ", chunk, " tokens");
    if (chunk == 0) globals_.push_back(static_cast<int64_t>(layer));
  }
  if (!options_.disk.empty()) {
    require_host_memory();
    open_disk();
  }
}

KvStore::~KvStore() {
  if (is_forked()) leave_to_parent();
  // Threads first, then what they hold on to, then what that lies in.
  reader_.reset();
  writer_.reset();
  failed_.clear();
  kept_.clear();
  streams_.clear();
  sequences_.clear();
  ring_.reset();
}

KvStore::State& KvStore::state(Sequence sequence) const {
  const auto found = sequences_.find(sequence);
  if (found == sequences_.end()) fail(ErrorCode::kInternal, "[kv] there is no sequence ", sequence);
  return *found->second;
}

KvStore::Sequence KvStore::create() {
  auto fresh = std::make_unique<State>();
  fresh->layers.resize(geometry().chunk.size());
  sequences_.emplace(next_, std::move(fresh));
  return next_++;
}

KvStore::Sequence KvStore::fork(Sequence source) {
  end_pass();
  auto copy = std::make_unique<State>(state(source));
  copy->session.reset();
  // Pages that apply() made but commit() never filled stay with the source: shared, both would
  // write them.
  for (size_t i = 0; i < copy->layers.size(); ++i) keep(*copy, i, copy->length);
  sequences_.emplace(next_, std::move(copy));
  return next_++;
}

void KvStore::release(Sequence sequence) {
  end_pass();
  const bool attached = state(sequence).session != nullptr;
  std::erase(pass_, sequence);
  sequences_.erase(sequence);
  // With the last of its chunks that is written, a session lets go of its directory.
  if (attached && !is_forked()) wait_for_writes();
  std::erase_if(by_name_, [](const auto& entry) { return entry.second.expired(); });
}

int64_t KvStore::length(Sequence sequence) const { return state(sequence).length; }

int64_t KvStore::room(Sequence sequence) const {
  const int64_t length = state(sequence).length;
  int64_t room = std::numeric_limits<int64_t>::max() - length;
  for (const int64_t chunk : geometry().chunk)
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
    for (size_t i = 0; i < geometry().chunk.size(); ++i) {
      const int64_t chunk = geometry().chunk[i];
      int64_t past = 0;
      if (chunk > 0 && length < current.layers[i].first_position)
        past = length % chunk;
      else if (chunk == 0 && geometry().seal != KvSeal::kNone &&
               length < current.length / kPageTokens * kPageTokens)
        past = length % kPageTokens;
      length -= past;
      moved |= past > 0;
    }
    if (unit_ == 0 || length % unit_ == 0) continue;
    const auto chunk = static_cast<size_t>(length / unit_);
    if (chunk >= current.chunks.size() || current.chunks[chunk]->resident()) continue;
    length -= length % unit_;
    moved = true;
  }
  return length;
}

int64_t KvStore::readable(Sequence sequence) const {
  const State& current = state(sequence);
  for (const auto& chunk : current.chunks)
    if (chunk->is_lost()) return chunk->index * unit_;
  return current.length;
}

// Forgets what a layer holds beyond `length`, which is restorable.
void KvStore::keep(State& current, size_t layer, int64_t length) const {
  Layer& of = current.layers[layer];
  if (geometry().chunk[layer] > 0) {
    of.first_position = std::min(of.first_position, length);
    of.open.keep(pages_for(length - of.first_position));
    return;
  }
  const int64_t full = length / kPageTokens, committed = current.length / kPageTokens;
  if (full < committed) {
    of.open.keep(0);
    // A page sealed as it was is open again.
    if (length % kPageTokens != 0) of.open.push(of.tail[full - of.chunk_pages()]);
  }
  of.open.keep(pages_for(length) - full);
  of.keep_sealed(full);
}

void KvStore::truncate(Sequence sequence, int64_t length) {
  State& current = state(sequence);
  if (length < 0 || length > current.length || restorable(sequence, length) != length)
    fail(ErrorCode::kInternal, "[kv] a sequence of ", current.length, " tokens cannot go back to ",
         length, "; the nearest below is ", restorable(sequence, length));
  end_pass();
  while (length < static_cast<int64_t>(current.chunks.size()) * unit_)
    take_back_last_chunk(current, length);
  for (size_t i = 0; i < current.layers.size(); ++i) keep(current, i, length);
  current.length = length;
}

KvStore::Growth KvStore::growth(const State& current, size_t layer, int64_t tokens) const {
  const Layer& of = current.layers[layer];
  const bool global = geometry().chunk[layer] == 0;
  const int64_t held = current.length - of.first_position;
  const int64_t first_open = global ? held / kPageTokens : 0;
  Growth growth;
  growth.open = pages_for(held + tokens) - pages_for(held);
  if (global && geometry().seal != KvSeal::kNone)
    growth.sealed = (held + tokens) / kPageTokens - held / kPageTokens;
  growth.left_over = (of.open.count() - (pages_for(held) - first_open)) *
                         static_cast<int64_t>(geometry().open_bytes()) +
                     (of.sealed_count() - (global ? first_open : 0)) *
                         static_cast<int64_t>(geometry().sealed_bytes());
  if (held % kPageTokens != 0) growth.at_hand = &of.open.owners[held / kPageTokens - first_open];
  return growth;
}

KvStore::Plan KvStore::plan(std::span<const Append> appends) {
  report_failures(appends);
  Plan plan{{appends.begin(), appends.end()}};
  // Owners of each shared page that would be written, less those that get a copy of their own: the
  // last one may write in place.
  std::unordered_map<const void*, int64_t> owners;
  int64_t new_chunks = 0;
  for (size_t i = 0; i < appends.size(); ++i) {
    const auto& [sequence, tokens, text] = appends[i];
    const State& current = state(sequence);
    if (tokens < 1 || tokens > room(sequence))
      fail(ErrorCode::kInternal, "[kv] ", tokens, " tokens at once, expected 1 to ",
           room(sequence));
    for (size_t j = 0; j < i; ++j)
      if (appends[j].sequence == sequence)
        fail(ErrorCode::kInternal, "[kv] sequence ", sequence, " is appended to twice");
    if (directory_ || current.session)
      text.part(static_cast<int64_t>(current.chunks.size()) * unit_, current.length + tokens);
    if (unit_ > 0)
      new_chunks += (current.length + tokens) / unit_ - static_cast<int64_t>(current.chunks.size());
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
  plan.new_bytes += plan.open_pages * static_cast<int64_t>(geometry().open_bytes()) +
                    plan.sealed_pages * static_cast<int64_t>(geometry().sealed_bytes());
  check_memory(plan.new_bytes);
  check_disk(new_chunks);
  return plan;
}

KvStore::Page KvStore::new_page(KvTier& tier, size_t bytes) {
  void* const memory = tier.allocate(bytes);
  if (memory == nullptr)
    fail(ErrorCode::kOutOfMemory, "[kv] the system refused a page of ", bytes,
         " bytes for keys and values");
  return owned(tier, memory, bytes);
}

KvStore::Page KvStore::owned(KvTier& tier, void* memory, size_t bytes) {
  return {memory, [tier = &tier, bytes](void* page) { tier->free(page, bytes); }};
}

void KvStore::apply(const Plan& plan) {
  end_pass();
  pass_.clear();
  for (const Append& append : plan.appends) pass_.push_back(append.sequence);
  // Pages of a pass that was not committed go back. The plan may be older than the store's last
  // change: what it needs is counted anew. All pages first, so that a refusal leaves every sequence
  // as it was.
  for (const auto& [sequence, tokens, text] : plan.appends) {
    State& current = state(sequence);
    for (size_t l = 0; l < current.layers.size(); ++l) keep(current, l, current.length);
  }
  const Plan now = this->plan(plan.appends);
  std::vector<Page> open(now.open_pages), sealed(now.sealed_pages);
  make_room(now.new_bytes);
  for (Page& page : open) page = new_page(*tier_, geometry().open_bytes());
  for (Page& page : sealed) page = new_page(*tier_, geometry().sealed_bytes());
  const auto take = [](std::vector<Page>& from) {
    Page page = std::move(from.back());
    from.pop_back();
    return page;
  };
  for (const auto& [sequence, tokens, text] : plan.appends) {
    State& current = state(sequence);
    for (size_t l = 0; l < current.layers.size(); ++l) {
      const Growth needed = growth(current, l, tokens);
      Layer& layer = current.layers[l];
      if (needed.at_hand != nullptr && needed.at_hand->use_count() > 1) {
        Page own = take(open);
        tier_->copy(own.get(), needed.at_hand->get(), geometry().open_bytes());
        layer.open.replace(needed.at_hand - layer.open.owners.data(), std::move(own));
      }
      for (int64_t i = 0; i < needed.open; ++i) layer.open.push(take(open));
      for (int64_t i = 0; i < needed.sealed; ++i) layer.push_sealed(take(sealed));
    }
  }
}

KvView KvStore::view(Sequence sequence, int64_t layer) const {
  const State& current = state(sequence);
  if (layer < 0 || layer >= static_cast<int64_t>(current.layers.size()))
    fail(ErrorCode::kInternal, "[kv] layer ", layer, " of ", current.layers.size());
  const Layer& found = current.layers[layer];
  KvView view;
  view.first_position = found.first_position;
  view.sealed = found.sealed;
  view.first_open =
      geometry().global(static_cast<size_t>(layer)) ? current.length / kPageTokens : 0;
  view.open = found.open.table;
  view.key_scales = found.key_scales;
  const auto at = order_.find(layer);
  if (reader_ && at != order_.end()) reader_->finish_before(at->second);
  if (const auto found = stream_of_.find({sequence, layer}); found != stream_of_.end()) {
    const PassStream& stream = streams_[found->second];
    view.stream = stream.tiered ? stream.tiered.get() : reader_->stream(*stream.plan);
  }
  return view;
}

void KvStore::commit(const Plan& plan) {
  end_pass();
  for (const auto& [sequence, tokens, text] : plan.appends) {
    State& current = state(sequence);
    const int64_t full = (current.length + tokens) / kPageTokens - current.length / kPageTokens;
    current.length += tokens;
    for (size_t l = 0; l < current.layers.size(); ++l) {
      Layer& layer = current.layers[l];
      const int64_t chunk = geometry().chunk[l];
      if (chunk == 0) {
        // Sealed as they are, or read in their sealed form from now on.
        const bool as_they_are = geometry().seal == KvSeal::kNone;
        for (int64_t i = 0; as_they_are && i < full; ++i)
          layer.push_sealed(std::move(layer.open.owners[i]));
        layer.open.drop_front(full);
      } else if (current.length % chunk == 0) {
        layer.open.keep(0);
        layer.first_position = current.length;
      }
    }
    finish_chunks(current, text);
  }
}

int64_t KvStore::bytes_in_use() const {
  return tier_->bytes_in_use() + (host_ ? host_->bytes_in_use() : 0);
}

KvFootprint KvStore::footprint(int64_t tokens, int64_t pass) const {
  const auto open_bytes = static_cast<int64_t>(geometry().open_bytes());
  const auto sealed_bytes = static_cast<int64_t>(geometry().sealed_bytes());
  // A pass may begin anywhere in a page.
  const int64_t open = std::min(pages_for(tokens), pages_for(pass + kPageTokens - 1));
  // While one chunk is written, the next is filled.
  const int64_t at_hand = unit_ > 0 ? std::min(tokens, 2 * unit_) : tokens;
  const auto global_bytes = [&](int64_t held) {
    if (geometry().seal == KvSeal::kNone) return pages_for(held) * open_bytes;
    return held / kPageTokens * sealed_bytes + open * open_bytes;
  };
  KvFootprint footprint;
  for (const int64_t chunk : geometry().chunk) {
    const int64_t chunked = pages_for(std::min(chunk, tokens)) * open_bytes;
    footprint.memory += chunk > 0 ? chunked : global_bytes(tokens);
    footprint.least_memory += chunk > 0 ? chunked : global_bytes(at_hand);
  }
  if (unit_ > 0) footprint.disk = tokens / unit_ * chunk_file_bytes();
  return footprint;
}

}  // namespace puna
