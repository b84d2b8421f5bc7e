// A session on disk: one sequence, as a directory that survives crashes.
//
//   header      what the session is of; two copies
//   tokens      the text, 4 bytes a token
//   images      where pictures stand in it, and which
//   chunks/     chunk files, by name; hard links where another session or the cache has them, too
//   journal     one record for each chunk, in order, each naming the one before
//   tail        pages of all layers after the last chunk, written by an explicit save alone
//   lock        held by whoever writes
//
// What a record speaks of is durable before the record is written, and the record before anything
// is said to be saved. So after a crash the journal is good up to its last record but one at least,
// and what it names is there: less than one chunk of computing is lost. A record that is cut short
// or damaged at the end of the journal was being written and is dropped; one before others is
// damage, and refused.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "kv/chunk.h"
#include "kv/kv_chain.h"
#include "kv/page_file.h"
#include "platform/file_system.h"

namespace puna {

// The text of one unit, positions counted from its begin (a picture may begin before).
struct UnitText {
  std::vector<int32_t> tokens;
  std::vector<KvImageRun> images;

  static UnitText of(const KvText& text, int64_t begin, int64_t end);
  KvText view() const { return {tokens, images}; }
};

// What the journal says of a chunk.
struct SessionRecord {
  int64_t end = 0;     // tokens up to its end
  int64_t images = 0;  // runs of pictures that begin before it
  Digest name{};       // of the prefix up to its end
  Digest digest{};     // of its chunk file
};

struct SessionContents {
  std::vector<SessionRecord> records;
  std::vector<int32_t> tokens;  // of the records, then of the tail
  std::vector<KvImageRun> images;
  std::vector<std::string> chunk_paths;
  std::optional<PageFileHeader> tail;  // in tail_path
  std::string tail_path;

  int64_t length() const { return static_cast<int64_t>(tokens.size()); }
};

// Reads everything but pages, and checks it: throws SessionMismatch with the reason if it is of
// another model or format of keys and values, or damaged.
SessionContents read_session(FileSystem& files, const std::string& path,
                             const KvIdentity& identity);

enum class Verify { kJournal, kSampled, kFull };
struct VerifyReport {
  int64_t chunks = 0, pages = 0;  // looked at
  int64_t good_tokens = 0;        // up to the first fault
  std::string fault;              // empty: none
};
// Reads the pages of every chunk file: of each layer one (kSampled), or all of them (kFull).
VerifyReport verify_session(FileSystem& files, const std::string& path, const KvIdentity& identity,
                            Verify extent);

// Names of chunks that a store reads from the directories of sessions. Sequences go on from them
// when their session has gone another way.
class ChunksInUse {
 public:
  void add(const std::string& name);
  void remove(const std::string& name);
  bool contains(const std::string& name) const;

 private:
  mutable std::mutex mutex_;
  std::multiset<std::string> names_;
};

// The directory for writing; one at a time. Not for several threads at once.
class SessionDirectory {
 public:
  // Makes it if need be. Throws SessionMismatch if it is another model's session, in use, or
  // damaged; `repair` drops what is damaged in the journal, all that follows it, and a damaged tail
  // instead. Files of chunks that it has no more, but that are in use, stay for as long as it is
  // not opened for writing again.
  SessionDirectory(FileSystem& files, std::string path, const KvIdentity& identity,
                   std::shared_ptr<const ChunksInUse> in_use, bool repair = false);

  const std::string& path() const { return path_; }
  const std::vector<SessionRecord>& records() const { return records_; }
  int64_t length() const {  // tokens
    return tail_ ? tail_->end : records_.empty() ? 0 : records_.back().end;
  }

  // Adds chunk `index`, or puts it in the place of that one and those after it. Its file is linked
  // or copied, or written from `pages`.
  void append(int64_t index, const UnitText& text, const ChunkFile* file,
              const PageFileHeader& header, std::span<const void* const> pages);
  // Keeps the first `chunks` chunks.
  void truncate(int64_t chunks);
  // The text and the pages after the last chunk.
  void write_tail(const UnitText& text, PageFileHeader header, std::span<const void* const> pages);
  // Drops it, if there is one.
  void remove_tail();

 private:
  std::string chunk_path(const Digest& name) const;
  void create();
  void find_tail(bool repair);
  void keep_tail_before(const Digest& parent, const UnitText& text);
  void remove_unused_chunks();
  void write_text(int64_t begin, int64_t images, const UnitText& text);
  Digest last_record_digest() const;

  FileSystem& files_;
  std::string path_;
  KvIdentity identity_;
  std::shared_ptr<const ChunksInUse> in_use_;
  std::unique_ptr<File> lock_, tokens_, images_, journal_;
  std::vector<SessionRecord> records_;
  std::vector<Digest> record_digests_;  // of the records as they lie in the file
  std::optional<PageFileHeader> tail_;
};

}  // namespace puna
