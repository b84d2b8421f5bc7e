// KvStore's sessions: sequences to and from directories.
#include <algorithm>
#include <utility>

#include "base/error.h"
#include "kv/kv_state.h"
#include "kv/kv_store.h"
#include "platform/memory.h"

namespace puna {
namespace {

void require_units(int64_t unit) {
  if (unit == 0)
    fail(ErrorCode::kUnsupported,
         "[session] the attention chunks of this model's layers have no useful common multiple, at "
         "which a session could be stored");
}

// How many records of the journal are chunks of the sequence.
int64_t common_chunks(const SessionDirectory& directory,
                      std::span<const std::shared_ptr<KvChunk>> chunks) {
  const std::vector<SessionRecord>& records = directory.records();
  size_t common = 0;
  while (common < std::min(records.size(), chunks.size()) &&
         records[common].name == chunks[common]->name)
    ++common;
  return static_cast<int64_t>(common);
}

}  // namespace

// Chunks that were made without their text get their names; others must have the text's.
void KvStore::name_chunks(State& current, const KvText& text) {
  Digest parent = identity_.root();
  for (const auto& chunk : current.chunks) {
    const int64_t begin = chunk->index * unit_;
    const Digest name = chain_hash(parent, text, begin, begin + unit_);
    if (chunk->named && chunk->name != name)
      fail(ErrorCode::kInternal, "[session] the text is not the one that the sequence was made of");
    if (!chunk->named) {
      chunk->named = true;
      chunk->parent = parent;
      chunk->name = name;
    }
    parent = name;
  }
}

std::shared_ptr<SessionDirectory> KvStore::directory_at(const std::string& path, bool repair) {
  return std::make_shared<SessionDirectory>(files_, path, identity_, in_use_, repair);
}

// A file in a session's directory, which stays there as long as it is held.
std::shared_ptr<const ChunkFile> KvStore::in_use(std::unique_ptr<ChunkFile> file) const {
  const std::string name = hex(file->header.chain);
  std::shared_ptr<const ChunkFile> held(file.release(),
                                        [names = in_use_, name](const ChunkFile* gone) {
                                          names->remove(name);
                                          delete gone;
                                        });
  in_use_->add(name);
  return held;
}

void KvStore::save(Sequence sequence, const std::string& path, const KvText& text) {
  require_host_memory();
  require_units(unit_);
  end_pass();
  State& current = state(sequence);
  name_chunks(current, text);
  // A chunk that could not be written elsewhere may still be written here.
  wait_for_writes();
  std::shared_ptr<SessionDirectory> directory = current.session;
  if (directory && directory->path() == path)
    require_same_process();  // else it is the parent's
  else
    directory = directory_at(path);
  const auto chunks = static_cast<int64_t>(current.chunks.size());
  int64_t common = common_chunks(*directory, current.chunks);
  for (; common < chunks; ++common) {
    const KvChunk& chunk = *current.chunks[common];
    const PageFileHeader header = header_of(chunk);
    HostPages pages;  // what has a file is linked
    if (!chunk.file) pages = on_host(chunk);
    directory->append(common, UnitText::of(text, header.begin, header.end), chunk.file.get(),
                      header, pages.pages);
  }
  if (static_cast<int64_t>(directory->records().size()) > chunks) directory->truncate(chunks);
  // What could not be written there before is there now; again, it would take the tail away.
  for (ChunkJob& job : failed_)
    if (job.session == directory) job.session.reset();

  PageFileHeader tail;
  tail.kind = PageFileKind::kTail;
  tail.begin = chunks * unit_;
  tail.end = current.length;
  if (tail.begin == tail.end) return directory->remove_tail();
  tail.parent = chunks == 0 ? identity_.root() : current.chunks.back()->name;
  tail.chain = chain_hash(tail.parent, text, tail.begin, tail.end);
  tail.sections = tail_sections(geometry(), tail.begin, tail.end);
  std::vector<StoredPage> stored;
  for (const PageSection& section : tail.sections) {
    const Layer& layer = current.layers[section.layer];
    for (int64_t i = 0; i < section.pages; ++i)
      stored.push_back(
          {section.kind == PageKind::kSealed ? layer.tail[i].get() : layer.open.table[i],
           static_cast<size_t>(section.page_bytes), host_ != nullptr});
  }
  const HostPages pages = on_host(stored);
  directory->write_tail(UnitText::of(text, tail.begin, tail.end), std::move(tail), pages.pages);
}

void KvStore::attach(Sequence sequence, const std::string& path, const KvText& text) {
  require_host_memory();
  require_units(unit_);
  State& current = state(sequence);
  name_chunks(current, text);
  current.session.reset();
  wait_for_writes();
  auto directory = directory_at(path);
  const int64_t common = common_chunks(*directory, current.chunks);
  if (common < static_cast<int64_t>(directory->records().size())) directory->truncate(common);
  current.session = directory;
  for (auto i = static_cast<size_t>(common); i < current.chunks.size(); ++i)
    write(current.chunks[i], directory, text);
}

void KvStore::flush(Sequence sequence) {
  state(sequence);
  wait_for_writes();
  const Append append{sequence, 0};
  report_failures({&append, 1});
}

KvStore::Opened KvStore::open(const std::string& path, bool resume) {
  require_host_memory();
  require_units(unit_);
  auto fresh = std::make_unique<State>();
  if (resume) {
    if (!files_.exists(path + "/journal"))
      fail(ErrorCode::kSessionMismatch, "[session] ", path, " is not a session");
    fresh->session = directory_at(path);
  }
  SessionContents contents = read_session(files_, path, identity_);
  if (!contents.records.empty()) open_reader();
  fresh->layers.resize(geometry().chunk.size());
  const auto count = static_cast<size_t>(unit_ / kPageTokens);
  for (size_t i = 0; i < contents.records.size(); ++i) {
    const SessionRecord& record = contents.records[i];
    auto file = std::make_unique<ChunkFile>();
    file->path = contents.chunk_paths[i];
    if (!files_.exists(file->path))
      fail(ErrorCode::kSessionMismatch, "[session] ", file->path,
           " is missing; truncating the session to ", record.end - unit_, " tokens keeps the rest");
    file->header = read_page_file_header(files_, file->path, identity_);
    file->facts = files_.open(file->path, OpenMode::kRead)->facts();
    if (file->header.digest != record.digest || file->header.kind != PageFileKind::kChunk)
      fail(ErrorCode::kSessionMismatch, "[session] ", file->path,
           " is not the file that the journal names; truncating the session to ",
           record.end - unit_, " tokens keeps the rest");
    std::weak_ptr<KvChunk>& known = by_name_[record.name];
    std::shared_ptr<KvChunk> chunk = known.lock();
    if (!chunk) {
      chunk = std::make_shared<KvChunk>();
      chunk->index = static_cast<int64_t>(i);
      chunk->named = true;
      chunk->parent = file->header.parent;
      chunk->name = record.name;
      chunk->pages.resize(globals_.size());
      chunk->offloaded.resize(globals_.size());
      chunk->written = chunk->file = in_use(std::move(file));
      known = chunk;
    } else if (chunk->is_lost()) {
      let_go_of_file(*chunk);
      chunk->written = chunk->file = in_use(std::move(file));
    }
    fresh->chunks.push_back(std::move(chunk));
    for (size_t g = 0; g < globals_.size(); ++g) {
      std::vector<void*>& table = fresh->layers[globals_[g]].sealed;
      for (size_t p = 0; p < count; ++p) {
        const KvChunk& chunk = *fresh->chunks.back();
        table.push_back(chunk.in_reach(g) ? chunk.pages[g][p].get() : nullptr);
      }
    }
  }
  fresh->length = contents.length();
  for (size_t layer = 0; layer < fresh->layers.size(); ++layer)
    if (!geometry().global(layer))
      fresh->layers[layer].first_position = fresh->length - fresh->length % geometry().chunk[layer];
  if (contents.tail) read_tail(*fresh, contents);

  Opened opened;
  opened.sequence = next_;
  opened.tokens = std::move(contents.tokens);
  opened.images = std::move(contents.images);
  sequences_.emplace(next_++, std::move(fresh));
  return opened;
}

void KvStore::read_tail(State& fresh, const SessionContents& contents) {
  const PageFileHeader& tail = *contents.tail;
  int64_t bytes = 0;
  for (const PageSection& section : tail.sections)
    bytes += section.pages * static_cast<int64_t>(section.page_bytes);
  make_room(bytes);
  const auto file = files_.open(contents.tail_path, OpenMode::kReadDirect);
  Memory staged;  // of a page that the host cannot write where it will be
  for (const PageSection& section : tail.sections) {
    Layer& layer = fresh.layers[section.layer];
    if (host_ && staged.size() < section.page_bytes) staged = Memory(section.page_bytes);
    for (int64_t i = 0; i < section.pages; ++i) {
      Page page = new_page(*tier_, section.page_bytes);
      void* const to = host_ ? staged.data() : page.get();
      read_exactly(*file, to, section.page_bytes,
                   section.offset + static_cast<uint64_t>(i) * section.page_bytes);
      check_page(tail, section, i, to, contents.tail_path);
      if (host_) tier_->from_host(page.get(), to, section.page_bytes);
      if (section.kind == PageKind::kSealed)
        layer.push_sealed(std::move(page));
      else
        layer.open.push(std::move(page));
    }
  }
}

VerifyReport KvStore::verify(const std::string& path, Verify extent) {
  require_units(unit_);
  wait_for_writes();  // it may be a session of this store
  return verify_session(files_, path, identity_, extent);
}

int64_t KvStore::truncate_session(const std::string& path, int64_t tokens) {
  require_units(unit_);
  if (!files_.exists(path + "/journal"))
    fail(ErrorCode::kSessionMismatch, "[session] ", path, " is not a session");
  const std::shared_ptr<SessionDirectory> held = directory_at(path, true);
  SessionDirectory& directory = *held;
  const auto chunks = static_cast<int64_t>(directory.records().size());
  const int64_t kept = std::clamp<int64_t>(tokens / unit_, 0, chunks);
  // The tail stays where nothing before it, and nothing of it, goes.
  if (kept < chunks || tokens < directory.length()) {
    directory.truncate(kept);
    directory.remove_tail();
  }
  return directory.length();
}

KvStatistics KvStore::statistics() const {
  KvStatistics statistics;
  statistics.memory_bytes = bytes_in_use();
  if (host_) statistics.host_bytes = host_->bytes_in_use();
  statistics.disk_bytes = *disk_bytes_;
  if (reader_) {
    const ReadStatistics reads = reader_->statistics();
    statistics.read_bytes = reads.bytes;
    statistics.waited_seconds = reads.waited_seconds;
  }
  std::vector<const KvChunk*> chunks;
  for (const auto& [id, current] : sequences_)
    for (const auto& chunk : current->chunks) chunks.push_back(chunk.get());
  std::sort(chunks.begin(), chunks.end());
  chunks.erase(std::unique(chunks.begin(), chunks.end()), chunks.end());
  statistics.chunks = static_cast<int64_t>(chunks.size());
  statistics.resident =
      std::count_if(chunks.begin(), chunks.end(), [](const auto* c) { return c->resident(); });
  return statistics;
}

}  // namespace puna
