// KvStore's chunks: how they are made, written, dropped from memory, and streamed back.
#include <unistd.h>

#include <algorithm>
#include <set>
#include <utility>

#include "base/error.h"
#include "kv/kv_state.h"
#include "kv/kv_store.h"

namespace puna {
namespace {

// One read: from here on a disk gives what it can, with several under way.
constexpr int64_t kReadBytes = int64_t{1} << 20;
// Places of the ring beyond what attention may hold: for reads under way.
constexpr int64_t kLeastAhead = 4;

}  // namespace

void KvStore::open_disk() {
  if (unit_ == 0)
    fail(
        ErrorCode::kUnsupported,
        "[kv] the attention chunks of this model's layers have no useful common multiple, at which "
        "keys and values could go to disk");
  directory_ = std::make_unique<PrivateDirectory>(files_, options_.disk);
  open_reader();
}

KvStore::Ring KvStore::ring(int64_t bytes) const {
  const auto page = static_cast<int64_t>(geometry().sealed_bytes());
  const int64_t slot_pages = std::clamp<int64_t>((kReadBytes + page - 1) / page, 1,
                                                 std::max<int64_t>(1, unit_ / kPageTokens));
  const int64_t held = (KvStream::kHeld + slot_pages - 1) / slot_pages + kLeastAhead;
  return {std::max(held, bytes / (slot_pages * page)), slot_pages};
}

int64_t KvStore::read_ahead_bytes(int64_t wanted) const {
  const auto [slots, slot_pages] = ring(wanted);
  return globals_.empty() ? 0
                          : slots * slot_pages * static_cast<int64_t>(geometry().sealed_bytes());
}

void KvStore::open_reader() {
  if (reader_) return;
  const auto [slots, slot_pages] = ring(options_.read_ahead);
  std::vector<void*> memory;
  Page page;
  if (!globals_.empty()) {
    const int64_t slot_bytes = slot_pages * static_cast<int64_t>(geometry().sealed_bytes());
    if (!host_) make_room(slots * slot_bytes);
    page = new_page(host_tier(), static_cast<size_t>(slots * slot_bytes));
    for (int64_t i = 0; i < slots; ++i)
      memory.push_back(static_cast<char*>(page.get()) + i * slot_bytes);
  }
  reader_ =
      std::make_unique<ChunkReader>(files_, options_.reads ? options_.reads() : make_read_queue(),
                                    std::move(memory), slot_pages, options_.poison);
  ring_ = std::move(page);
}

bool KvStore::is_forked() const { return getpid() != process_; }

// There, threads are gone that would be waited for, and whoever holds their mutexes.
void KvStore::leave_to_parent() {
  static_cast<void>(reader_.release());
  static_cast<void>(writer_.release());
  static_cast<void>(directory_.release());
}

void KvStore::require_same_process() const {
  if (is_forked())
    fail(ErrorCode::kUnsupported,
         "[kv] the process was forked; load the model anew there to use sessions or a cache on "
         "disk");
}

int64_t KvStore::chunk_file_bytes() const {
  return static_cast<int64_t>(page_file_bytes(chunk_sections(geometry())));
}

void KvStore::check_disk(int64_t new_chunks) {
  if (!directory_ || options_.disk_budget == 0 || new_chunks <= 0) return;
  const int64_t needed = new_chunks * chunk_file_bytes();
  int64_t left = 0;
  do {
    // What nobody needs any more may still be on its way to the disk.
    collect();
    const int64_t pending = writer_ ? writer_->pending() : 0;
    left = options_.disk_budget - *disk_bytes_ - pending * chunk_file_bytes();
    if (needed <= left) return;
  } while (writer_ && writer_->wait());
  fail(ErrorCode::kOutOfMemory, {.asked = needed, .limit = std::max<int64_t>(0, left)}, "[kv] ",
       needed, " bytes of keys and values are to be written, ", std::max<int64_t>(0, left),
       " bytes of the disk's budget of ", options_.disk_budget,
       " are left; close a session, shorten the text or raise the budget");
}

// --- making and writing
// ----------------------------------------------------------------------------

PageFileHeader KvStore::header_of(const KvChunk& chunk) const {
  PageFileHeader header;
  header.kind = PageFileKind::kChunk;
  header.begin = chunk.index * unit_;
  header.end = header.begin + unit_;
  header.parent = chunk.parent;
  header.chain = chunk.name;
  header.sections = chunk_sections(geometry());
  return header;
}

// Moves what is finished from the sequence's own pages to chunks, which others may share.
void KvStore::finish_chunks(State& current, const KvText& text) {
  if (unit_ == 0) return;
  const auto count = static_cast<size_t>(unit_ / kPageTokens);
  while (current.length >= static_cast<int64_t>(current.chunks.size() + 1) * unit_) {
    auto chunk = std::make_shared<KvChunk>();
    chunk->index = static_cast<int64_t>(current.chunks.size());
    chunk->offloaded.resize(globals_.size());
    for (const int64_t l : globals_) {
      std::vector<Page>& tail = current.layers[l].tail;
      const auto end = tail.begin() + static_cast<ptrdiff_t>(count);
      chunk->pages.emplace_back(std::make_move_iterator(tail.begin()),
                                std::make_move_iterator(end));
      tail.erase(tail.begin(), end);
    }
    const bool after_named = current.chunks.empty() || current.chunks.back()->named;
    if (after_named && text.end() >= (chunk->index + 1) * unit_) {
      chunk->named = true;
      chunk->parent = current.chunks.empty() ? identity_.root() : current.chunks.back()->name;
      chunk->name =
          chain_hash(chunk->parent, text, chunk->index * unit_, (chunk->index + 1) * unit_);
      std::weak_ptr<KvChunk>& known = by_name_[chunk->name];
      if (std::shared_ptr<KvChunk> same = known.lock()) {  // equal names, equal pages
        if (same->is_lost()) {
          let_go_of_file(*same);
          same->pages = std::move(chunk->pages);
          same->offloaded = std::move(chunk->offloaded);
        }
        chunk = std::move(same);
      } else {
        known = chunk;
      }
    }
    current.chunks.push_back(chunk);
    for (size_t g = 0; g < globals_.size(); ++g) set_pages(*chunk, g);
    const bool new_file = directory_ && chunk->file == nullptr && chunk->writing == 0;
    if (new_file || current.session) write(chunk, current.session, text);
  }
}

void KvStore::write(const std::shared_ptr<KvChunk>& chunk,
                    const std::shared_ptr<SessionDirectory>& session, const KvText& text) {
  ChunkJob job;
  job.chunk = chunk;
  job.header = header_of(*chunk);
  job.session = session;
  if (session) job.text = UnitText::of(text, job.header.begin, job.header.end);
  hand_over(std::move(job));
}

// To the writer. What keeps it from there is noted as what keeps a chunk from its file is: the
// sequence has grown by the chunk already.
void KvStore::hand_over(ChunkJob job) {
  try {
    require_same_process();
    if (!writer_)
      writer_ = std::make_unique<ChunkWriter>(files_, directory_ ? directory_->path() : "",
                                              identity_, disk_bytes_);
    // Copies that wait for the disk would add up.
    while (host_ && writer_->pending() >= kMostCopied && writer_->wait()) collect();
    if (!job.chunk->file) {  // which sessions link otherwise
      HostPages pages = on_host(*job.chunk);
      job.pages = std::move(pages.pages);
      job.copies = std::move(pages.copies);
    }
    KvChunk& chunk = *job.chunk;
    writer_->add(std::move(job));
    ++chunk.writing;
  } catch (...) {
    job.failure = std::current_exception();
    note_failure(std::move(job));
  }
}

// Where its pages are is asked again when it is tried again: they may move until then.
void KvStore::note_failure(ChunkJob job) {
  job.pages.clear();
  job.copies.reset();
  failed_.push_back(std::move(job));
}

// Of one that cannot be read. It is removed, if it is the cache's, before another takes its name.
void KvStore::let_go_of_file(KvChunk& chunk) {
  if (chunk.writing > 0) wait_for_writes();
  chunk.file.reset();
  chunk.written.reset();  // no job is left that the writer's thread would look at it for
}

// Puts the chunk's pages of a layer, or their absence, into the tables of all who have it.
void KvStore::set_pages(const KvChunk& chunk, size_t global) {
  const int64_t count = unit_ / kPageTokens;
  const std::vector<Page>& pages = chunk.pages[global];
  for (const auto& [id, other] : sequences_) {
    if (!holds(*other, chunk)) continue;
    void** const table = other->layers[globals_[global]].sealed.data() + chunk.index * count;
    for (int64_t i = 0; i < count; ++i)
      table[i] = chunk.in_reach(global) ? pages[static_cast<size_t>(i)].get() : nullptr;
  }
}

// Makes the last chunk, within which or before which `length` lies, the sequence's own pages again.
void KvStore::take_back_last_chunk(State& current, int64_t length) const {
  const std::shared_ptr<KvChunk> chunk = std::move(current.chunks.back());
  current.chunks.pop_back();
  const auto before = static_cast<size_t>(chunk->index * (unit_ / kPageTokens));
  for (size_t g = 0; g < globals_.size(); ++g) {
    Layer& layer = current.layers[globals_[g]];
    layer.tail.clear();
    layer.sealed.resize(before);
    if (length <= chunk->index * unit_) continue;
    for (const Page& page : chunk->pages[g]) layer.push_sealed(page);
  }
}

void KvStore::collect() {
  if (is_forked()) leave_to_parent();
  for (ChunkJob& job : writer_ ? writer_->collect() : std::vector<ChunkJob>()) {
    KvChunk& chunk = *job.chunk;
    --chunk.writing;
    if (job.file) chunk.file = std::move(job.file);
    if (job.failure) note_failure(std::move(job));
  }
  // What nobody waits for any more is not tried again: a session that went another way must not get
  // a chunk of the old one.
  for (ChunkJob& job : failed_) {
    const auto waits = [&](const auto& entry) {
      return entry.second->session == job.session && holds(*entry.second, *job.chunk);
    };
    if (std::none_of(sequences_.begin(), sequences_.end(), waits)) job.session.reset();
  }
  std::erase_if(failed_, [&](const ChunkJob& job) {
    return job.chunk.use_count() == 1 || (!job.session && (!directory_ || job.chunk->file));
  });
}

bool KvStore::holds(const State& current, const KvChunk& chunk) {
  const auto index = static_cast<size_t>(chunk.index);
  return index < current.chunks.size() && current.chunks[index].get() == &chunk;
}

// Throws what kept a chunk of one of the sequences from its file, after a new try was begun.
void KvStore::report_failures(std::span<const Append> appends) {
  collect();
  if (failed_.empty()) return;
  std::exception_ptr failure;
  for (const Append& append : appends) {
    const State& current = state(append.sequence);
    for (const ChunkJob& job : failed_)
      if (!failure && holds(current, *job.chunk) &&
          (job.session == nullptr || job.session == current.session))
        failure = job.failure;
  }
  if (!failure) return;
  for (ChunkJob& job : std::exchange(failed_, {})) {
    job.failure = nullptr;
    hand_over(std::move(job));
  }
  std::rethrow_exception(failure);
}

// Until then a session's directory is the writer's: of chunks, too, that its sequence has given up.
void KvStore::wait_for_writes() {
  do collect();
  while (writer_ && writer_->wait());
}

// --- memory
// ------------------------------------------------------------------------------------------

// What the chunks that are, or will be, in files would give back, and what the host has room for.
int64_t KvStore::evictable_bytes() const {
  std::set<const KvChunk*> seen;
  int64_t in_files = 0, elsewhere = 0, offloaded = 0, scales = 0;
  for (const auto& [id, current] : sequences_) {
    for (const auto& chunk : current->chunks) {
      if (!seen.insert(chunk.get()).second) continue;
      const bool file = chunk->file || (directory_ && chunk->writing > 0);
      for (size_t g = 0; g < chunk->pages.size(); ++g) {
        const std::vector<Page>& layer = chunk->pages[g];
        const int64_t count = std::count_if(layer.begin(), layer.end(),
                                            [](const Page& page) { return page.use_count() == 1; });
        if (chunk->in_reach(g))
          (file ? in_files : elsewhere) += file || count == std::ssize(layer) ? count : 0;
        else if (file)
          offloaded += count;
      }
      if (file)
        scales += std::count_if(chunk->key_scales.begin(), chunk->key_scales.end(),
                                [](const Page& some) { return some.use_count() == 1; });
    }
  }
  const auto page = static_cast<int64_t>(geometry().sealed_bytes());
  if (host_) return in_files * page + std::min(elsewhere * page, host_room() + offloaded * page);
  return in_files * page + scales * static_cast<int64_t>(key_scale_bytes());
}

// Drops the pages of the last chunk that has a file, of all sequences; false if there is none, or
// if later ones are about to have one: the first chunks shall stay. (One chunk is let go early, so
// that the next can be filled while the last is written.)
bool KvStore::evict_one() {
  KvChunk* last = nullptr;
  int64_t last_writing = 0;
  for (const auto& [id, current] : sequences_) {
    for (const auto& chunk : current->chunks) {
      if (!chunk->holds_memory()) continue;
      if (chunk->writing > 0 && directory_)
        last_writing = std::max(last_writing, chunk->index);
      else if (chunk->file && (last == nullptr || chunk->index > last->index))
        last = chunk.get();
    }
  }
  if (last == nullptr || last->index < last_writing - 1) return false;
  for (size_t g = 0; g < globals_.size(); ++g) {
    last->pages[g].clear();
    last->offloaded[g] = 0;
    set_pages(*last, g);
  }
  return true;
}

// Throws OutOfMemory unless make_room() can make it, should the disk not fail.
void KvStore::check_memory(int64_t bytes) {
  if (bytes <= tier_->bytes_left()) return;
  int64_t left = 0;
  do {
    // What nobody needs any more may still be on its way to the disk.
    collect();
    left = tier_->bytes_left() + evictable_bytes();
    if (bytes <= left) return;
  } while (writer_ && writer_->wait());
  fail(ErrorCode::kOutOfMemory, {.asked = bytes, .limit = left}, "[kv] ", bytes,
       " bytes of keys and values are needed, ", left,
       " bytes of the cache's budget are left; close a session, shorten the text or raise the "
       "budget");
}

void KvStore::make_room(int64_t bytes) {
  check_memory(bytes);
  while (bytes > tier_->bytes_left()) {
    collect();
    if (offload_one() || evict_one() || drop_key_scales()) continue;
    if (writer_ && writer_->wait()) continue;
    if (!failed_.empty()) std::rethrow_exception(failed_.front().failure);
    check_memory(bytes);
    // Nothing is being written any more that could give back what the budgets allow.
    fail(ErrorCode::kOutOfMemory, {.asked = bytes, .limit = 0}, "[kv] the system refused ", bytes,
         " bytes of the host's memory for keys and values; load with less context= or "
         "host_memory=");
  }
}

// --- passes
// ------------------------------------------------------------------------------------------

void KvStore::begin_pass(std::span<const int64_t> layers, bool partly) {
  end_pass();
  if (partly) make_room_for_key_scales();
  std::vector<StreamPlan> plans;
  for (size_t order = 0; order < layers.size(); ++order) {
    const int64_t layer = layers[order];
    if (layer < 0 || layer >= static_cast<int64_t>(geometry().chunk.size()))
      fail(ErrorCode::kInternal, "[kv] layer ", layer, " of ", geometry().chunk.size());
    order_[layer] = static_cast<int64_t>(order);
    const auto found = std::find(globals_.begin(), globals_.end(), layer);
    if (found == globals_.end()) continue;
    const auto g = static_cast<size_t>(found - globals_.begin());
    // Sequences share a stream if the chunks that one misses are the first of those that the other
    // does.
    std::vector<std::pair<std::vector<std::shared_ptr<KvChunk>>, std::vector<Sequence>>> groups;
    for (const Sequence sequence : pass_) {
      std::vector<std::shared_ptr<KvChunk>> missing;
      for (const auto& chunk : state(sequence).chunks)
        if (!chunk->in_reach(g)) missing.push_back(chunk);
      if (missing.empty()) continue;
      const auto group = std::find_if(groups.begin(), groups.end(), [&](const auto& candidate) {
        const size_t common = std::min(candidate.first.size(), missing.size());
        return std::equal(missing.begin(), missing.begin() + static_cast<ptrdiff_t>(common),
                          candidate.first.begin());
      });
      if (group == groups.end()) {
        groups.push_back({std::move(missing), {sequence}});
      } else {
        if (missing.size() > group->first.size()) group->first = std::move(missing);
        group->second.push_back(sequence);
      }
    }
    for (const auto& [missing, sequences] : groups) {
      PassStream& stream = streams_.emplace_back();
      if (host_) stream.tiered = std::make_unique<TieredStream>(*tier_, geometry().sealed_bytes());
      StreamPlan plan;
      plan.order = static_cast<int64_t>(order);
      for (const auto& chunk : missing) {
        Kept& kept = kept_.emplace_back(Kept{chunk, g});
        kept.stream = streams_.size() - 1;
        const int64_t first = chunk->index * (unit_ / kPageTokens);
        if (!chunk->pages[g].empty()) {
          stream.tiered->add(first, chunk->pages[g]);
          continue;
        }
        kept.plan = plans.size();
        kept.part = plan.parts.size();
        ChunkPart& part = plan.parts.emplace_back();
        part.file = chunk->file;
        part.section = chunk->file->header.find(layer, PageKind::kSealed);
        part.first_index = first;
      }
      if (!plan.parts.empty()) {
        stream.plan = plans.size();
        plans.push_back(std::move(plan));
      }
      for (const Sequence sequence : sequences) stream_of_[{sequence, layer}] = streams_.size() - 1;
    }
  }
  if (streams_.empty()) return;
  if (partly) {
    keep_key_scales(plans);
    set_key_scales();
  }
  keep_what_fits(plans);
  if (plans.empty()) return;
  require_same_process();
  reader_->begin(std::move(plans));
  for (const PassStream& stream : streams_)
    if (stream.tiered && stream.plan) stream.tiered->set_files(reader_->stream(*stream.plan));
}

// Gives memory that is left to the first chunks of those that stream: they stay. On entry, kept_
// has all that stream, on return those that stay.
void KvStore::keep_what_fits(std::vector<StreamPlan>& plans) {
  std::stable_sort(kept_.begin(), kept_.end(), [](const Kept& a, const Kept& b) {
    return std::pair(a.chunk->index, a.chunk.get()) < std::pair(b.chunk->index, b.chunk.get());
  });
  std::vector<Kept> staying;
  std::set<std::pair<const KvChunk*, size_t>> seen;  // a chunk in two streams stays once
  bool device_has_room = host_ != nullptr;
  for (Kept& kept : kept_) {
    if (!seen.insert({kept.chunk.get(), kept.global}).second) continue;
    // What is being written from the host's memory stays there.
    if (device_has_room && kept.chunk->writing == 0) {
      kept.on_device = pages_that_fit(*tier_);
      device_has_room = !kept.on_device.empty();
      if (device_has_room) {
        streams_[kept.stream].tiered->keep(kept.chunk->index * (unit_ / kPageTokens),
                                           kept.on_device);
        staying.push_back(std::move(kept));
        continue;
      }
    }
    if (!kept.plan) continue;
    std::vector<Page> stay = pages_that_fit(host_tier());
    if (stay.empty()) break;
    plans[*kept.plan].parts[kept.part].stay = std::move(stay);
    staying.push_back(std::move(kept));
  }
  kept_ = std::move(staying);
}

// For a chunk's pages of one layer, or none.
std::vector<KvStore::Page> KvStore::pages_that_fit(KvTier& tier) {
  std::vector<Page> pages;
  const int64_t left = &tier == host_.get() ? host_room() : tier.bytes_left();
  if (left - layer_bytes() < growth_reserve()) return pages;
  const size_t bytes = geometry().sealed_bytes();
  while (std::ssize(pages) < unit_ / kPageTokens) {
    void* const memory = tier.allocate(bytes);
    if (memory == nullptr) return {};
    pages.push_back(owned(tier, memory, bytes));
  }
  return pages;
}

// Growing sequences would at once push out what took the last bytes.
int64_t KvStore::growth_reserve() const { return 2 * std::ssize(globals_) * layer_bytes(); }

// --- passes that may leave pages out -------------------------------------------------------------

// Of the pages of one chunk and layer; 0 where pages are not sealed into fewer bits.
size_t KvStore::key_scale_bytes() const {
  if (geometry().seal == KvSeal::kNone) return 0;
  const KvSealedLayout layout = geometry().sealed_layout();
  return whole_blocks(static_cast<size_t>(unit_ / kPageTokens * layout.kv_heads) *
                      layout.key_scale_bytes());
}

// They are worth more than the pages of the last chunks, of which they take a hundredth.
void KvStore::make_room_for_key_scales() {
  if (key_scale_bytes() == 0) return;
  for (;;) {
    int64_t wanted = 0;
    std::set<const KvChunk*> seen;
    for (const Sequence sequence : pass_)
      for (const auto& chunk : state(sequence).chunks) {
        if (!seen.insert(chunk.get()).second) continue;
        for (size_t g = 0; g < globals_.size(); ++g)
          wanted += chunk->pages[g].empty() && (chunk->key_scales.empty() || !chunk->key_scales[g]);
      }
    wanted *= static_cast<int64_t>(key_scale_bytes());
    if (wanted == 0 || wanted <= tier_->bytes_left() - growth_reserve() || !evict_one()) return;
  }
}

// Gives memory to the scales of keys that are not known yet: the pass fills them in.
void KvStore::keep_key_scales(std::vector<StreamPlan>& plans) {
  const size_t bytes = key_scale_bytes();
  if (bytes == 0) return;
  const KvSealedLayout layout = geometry().sealed_layout();
  std::set<std::pair<const KvChunk*, size_t>> seen;
  for (const Kept& kept : kept_) {
    KvChunk& chunk = *kept.chunk;
    chunk.key_scales.resize(globals_.size());
    if (!kept.plan || chunk.key_scales[kept.global] || !seen.insert({&chunk, kept.global}).second)
      continue;
    KvTier& tier = host_tier();
    if (static_cast<int64_t>(bytes) > tier.bytes_left() - growth_reserve()) return;
    void* const memory = tier.allocate(bytes);
    if (memory == nullptr) return;
    ChunkPart& part = plans[*kept.plan].parts[kept.part];
    part.excerpts = owned(tier, memory, bytes);
    part.excerpt_offset = layout.key_scale_offset(0);
    part.excerpt_bytes = static_cast<size_t>(layout.kv_heads) * layout.key_scale_bytes();
    scaled_.push_back(kept);
  }
}

// Puts what is known into the tables of the pass's sequences.
void KvStore::set_key_scales() {
  if (key_scale_bytes() == 0) return;
  const KvSealedLayout layout = geometry().sealed_layout();
  const size_t page = static_cast<size_t>(layout.kv_heads) * layout.key_scale_bytes();
  const int64_t count = unit_ / kPageTokens;
  for (const Sequence sequence : pass_) {
    State& current = state(sequence);
    for (size_t g = 0; g < globals_.size(); ++g) {
      Layer& layer = current.layers[globals_[g]];
      layer.key_scales.assign(layer.sealed.size(), nullptr);
      for (const auto& chunk : current.chunks) {
        if (!chunk->pages[g].empty() || chunk->key_scales.empty() || !chunk->key_scales[g])
          continue;
        const auto* scales = static_cast<const char*>(chunk->key_scales[g].get());
        for (int64_t i = 0; i < count; ++i)
          layer.key_scales[chunk->index * count + i] = scales + static_cast<size_t>(i) * page;
      }
    }
  }
}

bool KvStore::drop_key_scales() {
  bool dropped = false;
  for (const auto& [id, current] : sequences_)
    for (const auto& chunk : current->chunks) {
      for (const Page& some : chunk->key_scales) dropped = dropped || some != nullptr;
      chunk->key_scales.clear();
    }
  return dropped;
}

void KvStore::end_pass() {
  order_.clear();
  stream_of_.clear();
  for (const auto& [id, current] : sequences_)
    for (const int64_t layer : globals_) current->layers[layer].key_scales.clear();
  // A device may still be copying out of the ring, and to pages that stay.
  if (host_ && !streams_.empty()) host_->settle();
  std::vector<StreamPlan> plans;
  if (reader_ && !is_forked()) plans = reader_->end();
  const auto part_of = [&](const Kept& kept) {
    // begin_pass() may not have come to its end.
    const bool there = kept.plan && *kept.plan < plans.size();
    return there ? &plans[*kept.plan].parts[kept.part] : nullptr;
  };
  for (const Kept& scaled : std::exchange(scaled_, {})) {
    ChunkPart* const part = part_of(scaled);
    if (part != nullptr && part->whole())
      scaled.chunk->key_scales[scaled.global] = std::move(part->excerpts);
  }
  for (Kept& kept : kept_) {
    KvChunk& chunk = *kept.chunk;
    ChunkPart* const part = part_of(kept);
    const bool on_device = !kept.on_device.empty();
    if (on_device) {
      const int64_t count = unit_ / kPageTokens;
      if (!streams_[kept.stream].tiered->has_kept(chunk.index * count, count)) continue;
      chunk.pages[kept.global] = std::move(kept.on_device);
    } else {
      if (part == nullptr || part->stay.empty() || !part->whole()) continue;
      chunk.pages[kept.global] = std::move(part->stay);
    }
    chunk.offloaded[kept.global] = host_ && !on_device ? 1 : 0;
    if (!chunk.key_scales.empty()) chunk.key_scales[kept.global].reset();
    set_pages(chunk, kept.global);
  }
  kept_.clear();
  streams_.clear();
}

}  // namespace puna
