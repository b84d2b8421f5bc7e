#include "kv/session_file.h"

#include <algorithm>
#include <limits>
#include <set>
#include <utility>

#include "base/crc32c.h"
#include "base/error.h"
#include "kv/bytes.h"
#include "platform/memory.h"

namespace puna {
namespace {

constexpr uint64_t kHeaderMagic = 0x3153'4553'414e'5550;  // "PUNASES1"
constexpr uint32_t kRecordMagic = 0x3152'4a50;            // "PJR1"
constexpr uint32_t kSessionVersion = 1;
constexpr size_t kHeaderCopy = 4096, kRecordBytes = 144, kImageBytes = 32;

// The directory that a path's last name is in.
std::string parent_of(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  const size_t slash = path.find_last_of('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

uint32_t last_word(std::span<const std::byte> bytes) {
  return ByteReader(bytes.last(sizeof(uint32_t))).get<uint32_t>();
}
// Whether the last four bytes are the checksum of the others.
bool intact(std::span<const std::byte> bytes) {
  return crc32c(bytes.data(), bytes.size() - sizeof(uint32_t)) == last_word(bytes);
}
std::vector<std::byte> sealed(ByteWriter& out, size_t bytes) {
  out.pad(bytes - sizeof(uint32_t));
  out.put(crc32c(out.bytes().data(), out.size()));
  return out.bytes();
}

void write_bytes(File& file, std::span<const std::byte> bytes, uint64_t offset) {
  const File::Part part = bytes;
  file.write({&part, 1}, offset);
}

std::vector<std::byte> read_up_to(File& file, uint64_t offset, size_t bytes) {
  std::vector<std::byte> data(bytes);
  data.resize(file.read(data.data(), bytes, offset));
  return data;
}

// For file systems without hard links, or across them.
void copy_file(FileSystem& files, const std::string& from, const std::string& to) {
  const auto source = files.open(from, OpenMode::kReadDirect);
  const uint64_t size = source->facts().bytes;
  replace_file(files, to, OpenMode::kWriteDirect, [&](File& target) {
    constexpr uint64_t kBlock = uint64_t{8} << 20;
    const Memory block(kBlock);
    target.reserve(size);
    for (uint64_t at = 0; at < size; at += kBlock) {
      const size_t bytes = std::min(kBlock, size - at);
      read_exactly(*source, block.data(), bytes, at);
      write_bytes(target, {static_cast<const std::byte*>(block.data()), bytes}, at);
    }
  });
}

std::vector<std::byte> encode_header(const KvIdentity& identity) {
  const KvGeometry& geometry = identity.geometry;
  ByteWriter out;
  out.put(kHeaderMagic).put(kSessionVersion).put(static_cast<uint32_t>(kPageTokens));
  out.put(identity.model).put(identity.root());
  out.put(static_cast<uint32_t>(geometry.layout.dtype)).put(static_cast<uint32_t>(geometry.seal));
  out.put(geometry.layout.kv_heads).put(geometry.layout.head_dim).put(geometry.unit());
  return sealed(out, kHeaderCopy);
}

std::string kv_name(DType dtype, KvSeal seal) {
  if (seal == KvSeal::kInt8) return "int8";
  if (seal == KvSeal::kInt4) return "int4";
  return name_of(dtype);
}

// Throws SessionMismatch if a directory without a journal holds what the making of a session, which
// may have been cut short, does not leave there: somebody else's files are not to be written over.
void check_unused(FileSystem& files, const std::string& path) {
  if (!files.exists(path)) return;
  for (const std::string& name : files.list(path)) {
    const bool own = name == "chunks" || name == "header" || name == "images" || name == "lock" ||
                     name == "tokens";
    if (!own && !name.starts_with('.'))
      mismatch(path, "holds " + name + ", and no session; give a new or an empty directory");
  }
}

// Throws SessionMismatch unless one of the two copies is whole and of this identity.
void check_header(FileSystem& files, const std::string& path, const KvIdentity& identity) {
  if (!files.exists(path + "/header")) mismatch(path, "is not a session");
  const auto file = files.open(path + "/header", OpenMode::kRead);
  for (const uint64_t offset : {uint64_t{0}, uint64_t{kHeaderCopy}}) {
    const std::vector<std::byte> copy = read_up_to(*file, offset, kHeaderCopy);
    if (copy.size() != kHeaderCopy || !intact(copy)) continue;
    ByteReader in(copy);
    if (in.get<uint64_t>() != kHeaderMagic) mismatch(path, "is not a session");
    const auto version = in.get<uint32_t>();
    if (version != kSessionVersion)
      mismatch(path, "has version " + std::to_string(version) + " of the format, this puna reads " +
                         std::to_string(kSessionVersion));
    const auto page_tokens = in.get<uint32_t>();
    const Digest model = in.digest(), root = in.digest();
    if (model != identity.model) mismatch(path, "belongs to another model");
    const auto dtype = static_cast<DType>(in.get<uint32_t>());
    const auto seal = static_cast<KvSeal>(in.get<uint32_t>());
    const KvGeometry& geometry = identity.geometry;
    if (dtype != geometry.layout.dtype || seal != geometry.seal)
      mismatch(path, "holds keys and values in " + kv_name(dtype, seal) +
                         ", the model was loaded with kv=" +
                         kv_name(geometry.layout.dtype, geometry.seal));
    if (page_tokens != kPageTokens || root != identity.root())
      mismatch(path, "belongs to a model of other layers or heads");
    return;
  }
  mismatch(path, "is damaged: neither copy of its header is whole");
}

std::vector<std::byte> encode_record(const SessionRecord& record, int64_t index,
                                     const Digest& previous) {
  ByteWriter out;
  out.put(kRecordMagic).put(uint32_t{0}).put(index).put(record.end).put(record.images);
  out.put(record.name).put(record.digest).put(previous);
  return sealed(out, kRecordBytes);
}

struct Journal {
  std::vector<SessionRecord> records;
  std::vector<Digest> digests;
  bool cut = false;   // it ended in a record that was being written
  std::string fault;  // why what follows the records is not believed
};

Journal read_journal(FileSystem& files, const std::string& path, const KvIdentity& identity) {
  Journal journal;
  if (!files.exists(path + "/journal")) return journal;
  const auto file = files.open(path + "/journal", OpenMode::kRead);
  const std::vector<std::byte> bytes = read_up_to(*file, 0, file->facts().bytes);
  const std::span<const std::byte> all(bytes);
  Digest previous = identity.root();
  const int64_t unit = identity.geometry.unit();
  for (size_t at = 0; at < all.size(); at += kRecordBytes) {
    const bool last = at + kRecordBytes >= all.size();
    const auto one = all.subspan(at, last ? all.size() - at : kRecordBytes);
    if (one.size() < kRecordBytes || !intact(one)) {
      journal.cut = last;
      if (!last)
        journal.fault = "record " + std::to_string(at / kRecordBytes) +
                        " of its journal does not have the checksum that it should";
      break;
    }
    ByteReader in(one);
    SessionRecord record;
    const auto magic = in.get<uint32_t>();
    (void)in.get<uint32_t>();
    const auto index = in.get<int64_t>();
    record.end = in.get<int64_t>();
    record.images = in.get<int64_t>();
    record.name = in.digest();
    record.digest = in.digest();
    const auto count = static_cast<int64_t>(journal.records.size());
    if (magic != kRecordMagic || index != count || record.end != (count + 1) * unit ||
        record.images < (count > 0 ? journal.records.back().images : 0) ||
        in.digest() != previous) {
      journal.fault =
          "record " + std::to_string(count) + " of its journal does not go on from the one before";
      break;
    }
    previous = Sha256::of(one.data(), one.size());
    journal.records.push_back(record);
    journal.digests.push_back(previous);
  }
  return journal;
}

[[noreturn]] void refuse_journal(const std::string& path, const Journal& journal) {
  mismatch(path, "is damaged: " + journal.fault + "; truncating it to " +
                     std::to_string(journal.records.empty() ? 0 : journal.records.back().end) +
                     " tokens keeps what is good");
}

// The pictures that begin before `length`. The journal says that there are `recorded`; those of the
// tail come after them, and what may follow was about to be added.
std::vector<KvImageRun> read_images(FileSystem& files, const std::string& path, int64_t recorded,
                                    int64_t length) {
  std::vector<KvImageRun> images;
  if (!files.exists(path + "/images")) return images;
  const auto file = files.open(path + "/images", OpenMode::kRead);
  const std::vector<std::byte> bytes = read_up_to(*file, 0, file->facts().bytes);
  for (size_t at = 0; at + kImageBytes <= bytes.size(); at += kImageBytes) {
    const auto one = std::span(bytes).subspan(at, kImageBytes);
    ByteReader in(one);
    KvImageRun image;
    image.position = in.get<int64_t>();
    image.rows = in.get<int64_t>();
    image.key = in.get<uint64_t>();
    image.begins = in.get<uint32_t>() != 0;
    if (!intact(one) || image.position >= length) break;
    const KvImageRun before = images.empty() ? KvImageRun{} : images.back();
    // No text has as many rows.
    if (image.position < before.position + before.rows || image.rows < 1 ||
        image.rows > std::numeric_limits<int32_t>::max())
      mismatch(path, "is damaged: its pictures overlap, or have no or too many rows");
    images.push_back(image);
  }
  if (static_cast<int64_t>(images.size()) < recorded)
    mismatch(path, "is damaged: of its " + std::to_string(recorded) + " pictures " +
                       std::to_string(images.size()) + " are listed");
  return images;
}

// The text of the records and the tail; its names must be theirs.
void read_text(FileSystem& files, const std::string& path, const KvIdentity& identity,
               SessionContents& contents) {
  const int64_t recorded = contents.records.empty() ? 0 : contents.records.back().end;
  const int64_t length = contents.tail ? contents.tail->end : recorded;
  if (length == 0) return;
  if (contents.tail && (contents.tail->begin != recorded || length < recorded))
    mismatch(path, "is damaged: its tail does not go on from token " + std::to_string(recorded));
  const auto file = files.open(path + "/tokens", OpenMode::kRead);
  // As much as is there, before so much memory is asked for.
  const auto count = static_cast<uint64_t>(length);
  contents.tokens.resize(std::min(count, file->facts().bytes / sizeof(int32_t)));
  const size_t bytes = contents.tokens.size() * sizeof(int32_t);
  if (contents.tokens.size() != count || file->read(contents.tokens.data(), bytes, 0) != bytes)
    mismatch(path, "is damaged: its text is cut short");
  contents.images = read_images(
      files, path, contents.records.empty() ? 0 : contents.records.back().images, length);
  const KvText text{contents.tokens, contents.images};
  Digest name = identity.root();
  int64_t begin = 0;
  for (const SessionRecord& record : contents.records) {
    name = chain_hash(name, text, begin, record.end);
    if (name != record.name)
      mismatch(path, "is damaged: its text up to token " + std::to_string(record.end) +
                         " is not the one that its journal names");
    begin = record.end;
  }
  if (contents.tail && chain_hash(name, text, begin, length) != contents.tail->chain)
    mismatch(path, "is damaged: its text after token " + std::to_string(begin) +
                       " is not the one that its tail names");
}

}  // namespace

UnitText UnitText::of(const KvText& text, int64_t begin, int64_t end) {
  UnitText unit;
  const std::span<const int32_t> tokens = text.part(begin, end);
  unit.tokens.assign(tokens.begin(), tokens.end());
  for (const KvImageRun& image : text.images)
    if (image.position < end && image.position + image.rows > begin)
      unit.images.push_back({image.position - begin, image.rows, image.key, image.begins});
  return unit;
}

SessionContents read_session(FileSystem& files, const std::string& path,
                             const KvIdentity& identity) {
  check_header(files, path, identity);
  SessionContents contents;
  Journal journal = read_journal(files, path, identity);
  if (!journal.fault.empty()) refuse_journal(path, journal);
  contents.records = std::move(journal.records);
  const Digest name = contents.records.empty() ? identity.root() : contents.records.back().name;
  for (const SessionRecord& record : contents.records)
    contents.chunk_paths.push_back(path + "/chunks/" + hex(record.name));
  contents.tail_path = path + "/tail";
  if (files.exists(contents.tail_path)) {
    try {
      PageFileHeader tail = read_page_file_header(files, contents.tail_path, identity);
      // One that goes on from an earlier chunk was left behind by a session that has gone on
      // itself.
      if (tail.kind == PageFileKind::kTail && tail.parent == name) contents.tail = std::move(tail);
    } catch (const Error&) {
      if (files.exists(contents.tail_path)) throw;  // else whoever writes the session has gone on
    }
  }
  read_text(files, path, identity, contents);
  return contents;
}

VerifyReport verify_session(FileSystem& files, const std::string& path, const KvIdentity& identity,
                            Verify extent) {
  VerifyReport report;
  try {
    check_header(files, path, identity);
    const std::vector<SessionRecord> records = read_journal(files, path, identity).records;
    Memory page(std::max(identity.geometry.sealed_bytes(), identity.geometry.open_bytes()));
    // Every page of a file, or one of each section, another one in each file.
    const auto check = [&](const std::string& file_path, const PageFileHeader& header,
                           int64_t turn) {
      if (extent == Verify::kJournal) return;
      const auto file = files.open(file_path, OpenMode::kReadDirect);
      for (const PageSection& section : header.sections) {
        const bool all = extent == Verify::kFull;
        const int64_t first = all ? 0 : turn % section.pages;
        for (int64_t i = first; i < (all ? section.pages : first + 1); ++i) {
          read_exactly(*file, page.data(), section.page_bytes,
                       section.offset + static_cast<uint64_t>(i) * section.page_bytes);
          check_page(header, section, i, page.data(), file_path);
          ++report.pages;
        }
      }
    };
    for (const SessionRecord& record : records) {
      const std::string file_path = path + "/chunks/" + hex(record.name);
      const PageFileHeader header = read_page_file_header(files, file_path, identity);
      if (header.digest != record.digest)
        mismatch(file_path, "is not the file that the journal names");
      check(file_path, header, report.chunks);
      ++report.chunks;
      report.good_tokens = record.end;
    }
    const SessionContents contents = read_session(files, path, identity);
    if (contents.tail) check(contents.tail_path, *contents.tail, 0);
    report.good_tokens = contents.length();
  } catch (const Error& error) {
    report.fault = error.what();
  }
  return report;
}

void ChunksInUse::add(const std::string& name) {
  const std::lock_guard guard(mutex_);
  names_.insert(name);
}
void ChunksInUse::remove(const std::string& name) {
  const std::lock_guard guard(mutex_);
  if (const auto found = names_.find(name); found != names_.end()) names_.erase(found);
}
bool ChunksInUse::contains(const std::string& name) const {
  const std::lock_guard guard(mutex_);
  return names_.contains(name);
}

SessionDirectory::SessionDirectory(FileSystem& files, std::string path, const KvIdentity& identity,
                                   std::shared_ptr<const ChunksInUse> in_use, bool repair)
    : files_(files), path_(std::move(path)), identity_(identity), in_use_(std::move(in_use)) {
  if (!files_.exists(path_ + "/journal")) check_unused(files_, path_);
  files_.make_directory(path_ + "/chunks");
  lock_ = files_.lock(path_ + "/lock");
  if (lock_ == nullptr)
    mismatch(path_, "is being written by another session; close that one, or open this read-only");
  // A directory whose first header was never finished has nothing in it yet.
  if (!files_.exists(path_ + "/journal")) create();
  check_header(files_, path_, identity_);
  const Journal journal = read_journal(files_, path_, identity_);
  if (!journal.fault.empty() && !repair) refuse_journal(path_, journal);
  records_ = journal.records;
  record_digests_ = journal.digests;
  tokens_ = files_.open(path_ + "/tokens", OpenMode::kWrite);
  images_ = files_.open(path_ + "/images", OpenMode::kWrite);
  journal_ = files_.open(path_ + "/journal", OpenMode::kWrite);
  find_tail(repair);
  if (journal.cut || !journal.fault.empty())
    truncate(static_cast<int64_t>(records_.size()));
  else
    remove_unused_chunks();
}

void SessionDirectory::find_tail(bool repair) {
  if (!files_.exists(path_ + "/tail")) return;
  try {
    PageFileHeader tail = read_page_file_header(files_, path_ + "/tail", identity_);
    if (tail.parent == (records_.empty() ? identity_.root() : records_.back().name)) {
      tail_ = std::move(tail);
      return;
    }
  } catch (const Error&) {
    if (!repair) throw;
  }
  remove_tail();
}

void SessionDirectory::create() {
  const std::vector<std::byte> header = encode_header(identity_);
  const auto file = files_.open(path_ + "/header", OpenMode::kWrite);
  for (const uint64_t offset : {uint64_t{0}, uint64_t{kHeaderCopy}}) {
    write_bytes(*file, header, offset);
    file->sync();
  }
  for (const char* name : {"/tokens", "/images"})
    files_.open(path_ + name, OpenMode::kWrite)->sync();
  files_.sync_directory(path_);
  // Last, for it says that the others are there.
  files_.open(path_ + "/journal", OpenMode::kWrite)->sync();
  files_.sync_directory(path_);
  files_.sync_directory(parent_of(path_));
}

std::string SessionDirectory::chunk_path(const Digest& name) const {
  return path_ + "/chunks/" + hex(name);
}

Digest SessionDirectory::last_record_digest() const {
  return record_digests_.empty() ? identity_.root() : record_digests_.back();
}

void SessionDirectory::write_text(int64_t begin, int64_t images, const UnitText& text) {
  const auto tokens = std::as_bytes(std::span(text.tokens));
  write_bytes(*tokens_, tokens, static_cast<uint64_t>(begin) * sizeof(int32_t));
  tokens_->resize(static_cast<uint64_t>(begin) * sizeof(int32_t) + tokens.size());
  tokens_->sync();
  std::vector<std::byte> encoded;
  for (const KvImageRun& image : text.images) {
    if (image.position < 0) continue;  // begins, and was written, before
    ByteWriter out;
    out.put(begin + image.position).put(image.rows).put(image.key);
    out.put(static_cast<uint32_t>(image.begins));
    const std::vector<std::byte> one = sealed(out, kImageBytes);
    encoded.insert(encoded.end(), one.begin(), one.end());
  }
  const auto offset = static_cast<uint64_t>(images) * kImageBytes;
  if (!encoded.empty()) write_bytes(*images_, encoded, offset);
  images_->resize(offset + encoded.size());
  images_->sync();
}

void SessionDirectory::append(int64_t index, const UnitText& text, const ChunkFile* file,
                              const PageFileHeader& header, std::span<const void* const> pages) {
  if (index > static_cast<int64_t>(records_.size()))
    fail(ErrorCode::kStorage, "[session] ", path_, " has ", records_.size(), " chunks, so chunk ",
         index, " cannot be added; an earlier one could not be written");
  if (index == static_cast<int64_t>(records_.size())) keep_tail_before(header.parent, text);
  if (index < static_cast<int64_t>(records_.size())) truncate(index);

  const std::string name = hex(header.chain), path = chunk_path(header.chain);
  SessionRecord record;
  record.end = header.end;
  record.name = header.chain;
  record.images = records_.empty() ? 0 : records_.back().images;
  const int64_t images_before = record.images;
  for (const KvImageRun& image : text.images) record.images += image.position >= 0;
  record.digest = header.digest;
  if (file != nullptr) {
    record.digest = file->header.digest;
    bool there = false;
    if (files_.exists(path)) {
      try {
        there = read_page_file_header(files_, path, identity_).digest == record.digest;
      } catch (const Error&) {
        // Left by a write that did not come to its end.
      }
      if (!there) files_.remove(path);
    }
    if (!there && !files_.link(file->path, path)) copy_file(files_, file->path, path);
    files_.sync_directory(path_ + "/chunks");
  } else {
    PageFileHeader written = header;
    write_page_file(files_, path_ + "/chunks", name, identity_, written, pages);
    record.digest = written.digest;
  }
  write_text(header.begin, images_before, text);
  const std::vector<std::byte> encoded = encode_record(record, index, last_record_digest());
  write_bytes(*journal_, encoded, static_cast<uint64_t>(index) * kRecordBytes);
  journal_->sync();
  records_.push_back(record);
  record_digests_.push_back(Sha256::of(encoded.data(), encoded.size()));
  if (tail_) remove_tail();
}

void SessionDirectory::truncate(int64_t chunks) {
  const auto kept = static_cast<size_t>(chunks);
  if (tail_ && kept < records_.size()) remove_tail();
  journal_->resize(kept * kRecordBytes);
  records_.resize(std::min(kept, records_.size()));
  record_digests_.resize(records_.size());
  journal_->sync();
  remove_unused_chunks();
}

void SessionDirectory::remove_unused_chunks() {
  std::set<std::string> used;
  for (const SessionRecord& record : records_) used.insert(hex(record.name));
  for (const std::string& name : files_.list(path_ + "/chunks"))
    if (!used.contains(name) && !in_use_->contains(name)) files_.remove(path_ + "/chunks/" + name);
}

void SessionDirectory::write_tail(const UnitText& text, PageFileHeader header,
                                  std::span<const void* const> pages) {
  // First what may fill a disk: until then the tail of another text that was saved before is good.
  write_page_file(files_, path_, "tail", identity_, header, pages, [&] {
    keep_tail_before(header.parent, text);
    write_text(header.begin, records_.empty() ? 0 : records_.back().images, text);
  });
  tail_ = std::move(header);
}

// The text after the last chunk is about to be overwritten by one that may go further. The tail
// stays good if it is of the same text as far as it goes; of another, it would look damaged.
void SessionDirectory::keep_tail_before(const Digest& parent, const UnitText& text) {
  if (!tail_) return;
  const int64_t held = tail_->end - tail_->begin;
  if (held > static_cast<int64_t>(text.tokens.size()) ||
      chain_hash(parent, text.view(), 0, held) != tail_->chain)
    remove_tail();
}

void SessionDirectory::remove_tail() {
  tail_.reset();
  files_.remove(path_ + "/tail");
  files_.sync_directory(path_);
}

}  // namespace puna
