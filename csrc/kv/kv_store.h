// Keys and values of all live sequences: a page table over memory and files.
//
// Layers that attend in absolute chunks keep the current chunk only; its pages are dropped whole
// when the sequence steps over a multiple of the chunk length. Other layers ("global" ones) keep
// everything: full pages in their sealed form, and the last, unfinished one open. Pages are shared
// between forks; the open page is copied when one of the owners writes.
//
// Global pages come in chunks of KvGeometry::unit() tokens. With a directory for them (`disk`), a
// finished chunk is written to a file behind the computation, and gives up its memory when that is
// needed: the last one first, so that a fixed prefix of what every pass reads from beginning to end
// stays in memory and the rest streams. (Least recently used first would keep nothing that is
// needed next.) Where memory is left, chunks that pass through stay.
//
// Where attention reads a device's memory, a second tier may have the host's: what the first has no
// room for goes there, again the last chunk first, before it is left to the file alone. Files are
// written from copies, and read into the host's tier; attention gets pages of both through streams.
//
// Use: plan() says what an append needs and refuses what cannot be had, changing nothing; apply()
// makes the room; the forward pass announces with begin_pass() the layers it will read, in order,
// and reads and writes through view(); commit() moves the length on. One thread at a time.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "kv/chunk.h"
#include "kv/chunk_reader.h"
#include "kv/chunk_writer.h"
#include "kv/kv_chain.h"
#include "kv/kv_geometry.h"
#include "kv/kv_tier.h"
#include "kv/session_file.h"
#include "platform/file_system.h"
#include "platform/private_directory.h"
#include "platform/read_queue.h"

namespace puna {

struct KvStoreOptions {
  // Of all that keys and values are computed from; pages of another one are never read.
  Digest model{};
  // Where chunks that do not fit into memory go; "": nowhere.
  std::string disk;
  int64_t disk_budget = 0;  // bytes; 0: what the file system has
  // Memory for pages on their way from the disk; a few more if pages are large.
  int64_t read_ahead = int64_t{64} << 20;
  // For tests.
  FileSystem* files = nullptr;
  std::function<std::unique_ptr<ReadQueue>()> reads;
  bool poison = false;
};

// One layer of one sequence, as AttentionSegment wants it. Valid until the next apply(), commit(),
// truncate() or release().
struct KvView {
  int64_t first_position = 0;  // of token 0 of page 0
  std::span<void* const> sealed;
  KvStream* stream = nullptr;
  std::span<const void* const> key_scales;
  int64_t first_open = 0;
  std::span<void* const> open;
};

// What one sequence takes at most.
struct KvFootprint {
  int64_t memory = 0;        // if everything is in memory
  int64_t least_memory = 0;  // if all chunks but the one at hand are on disk
  int64_t disk = 0;          // of those
};

struct KvStatistics {
  int64_t memory_bytes = 0;          // pages and read-ahead, of both tiers
  int64_t host_bytes = 0;            // of them, of the host's tier
  int64_t disk_bytes = 0;            // chunk files of this process
  int64_t read_bytes = 0;            // from chunk files so far
  double waited_seconds = 0;         // by attention, for pages on their way
  int64_t chunks = 0, resident = 0;  // of all sequences, each once; wholly in memory
};

class KvStore {
 public:
  using Sequence = int64_t;
  struct Append {
    Sequence sequence;
    int64_t tokens;
    // The text from the last multiple of geometry().unit() to the end of the append at least, valid
    // until commit(). May be left out where chunks go to no file.
    KvText text = {};
  };
  struct Plan {
    std::vector<Append> appends;
    int64_t open_pages = 0, sealed_pages = 0;
    int64_t new_bytes = 0;  // by which the use of memory grows
  };

  // `tier`: of what attention reads and writes. `host`: of the host's memory, if that is a
  // device's; without it nothing goes to files or comes from them. The store owns both.
  KvStore(KvGeometry geometry, std::unique_ptr<KvTier> tier, KvStoreOptions options = {},
          std::unique_ptr<KvTier> host = nullptr);
  ~KvStore();
  KvStore(const KvStore&) = delete;
  KvStore& operator=(const KvStore&) = delete;

  const KvGeometry& geometry() const { return identity_.geometry; }

  Sequence create();
  Sequence fork(Sequence source);  // shares every page
  void release(Sequence sequence);
  int64_t length(Sequence sequence) const;

  // How many tokens may be appended at once: up to the next multiple of the smallest chunk.
  int64_t room(Sequence sequence) const;
  // The longest length <= `length` that truncate() can restore exactly. Chunked layers cannot go
  // back into a chunk whose pages were dropped, so below the current chunk only its boundaries can
  // be reached (where those layers hold nothing). Where pages are sealed into fewer bits, the open
  // form of a sealed one is gone, so below the open page only page boundaries can be; and where a
  // chunk's pages are in a file, only its begin and its end.
  int64_t restorable(Sequence sequence, int64_t length) const;
  void truncate(Sequence sequence, int64_t length);  // `length` must be restorable
  // How much of the sequence is in memory, or in files that could be read so far. What goes on from
  // there makes pages anew that others lack, too.
  int64_t readable(Sequence sequence) const;

  // Throws OutOfMemory, with the bytes asked and left, if the pages cannot be had, and StorageError
  // if a chunk of one of the sequences could not be written; that is tried again then, so that the
  // next call goes on where the cause is gone. The sequence is as it was, and can go back to before
  // the chunk.
  Plan plan(std::span<const Append> appends);
  // Waits for chunks to be written where their memory is needed.
  void apply(const Plan& plan);
  // `layers`: those whose pages this forward pass will read, in that order. `partly`: it may leave
  // pages out, for which memory is given to the scales of keys.
  void begin_pass(std::span<const int64_t> layers, bool partly = false);
  KvView view(Sequence sequence, int64_t layer) const;
  void commit(const Plan& plan);

  // --- sessions (kv/session_file.h) ---
  // Writes the sequence to a directory, so that open() finds it with all its tokens. One that is
  // there is brought up to date: what it shares with this one is not written again.
  void save(Sequence sequence, const std::string& path, const KvText& text);
  // From now on, each chunk is in the session's journal soon after it is finished.
  void attach(Sequence sequence, const std::string& path, const KvText& text);
  // Waits until all finished chunks of the sequence are durable; throws what kept one from it.
  void flush(Sequence sequence);
  struct Opened {
    Sequence sequence = 0;
    std::vector<int32_t> tokens;
    std::vector<KvImageRun> images;
  };
  // A sequence as it was saved, or up to the last chunk in the journal. Pages are read when they
  // are needed, from the directory, which must stay. `resume`: attached to it as well.
  Opened open(const std::string& path, bool resume);
  VerifyReport verify(const std::string& path, Verify extent);
  // Cuts a session on disk down to whole chunks within its first `tokens` tokens; also one that is
  // damaged behind them. Returns what is left.
  int64_t truncate_session(const std::string& path, int64_t tokens);

  int64_t bytes_in_use() const;
  // Memory for pages on their way from the disk, of the host, where so much is wanted; a store with
  // a directory takes it as it is made, another one when first a session is opened.
  int64_t read_ahead_bytes(int64_t wanted) const;
  int64_t read_ahead_bytes() const { return read_ahead_bytes(options_.read_ahead); }
  KvStatistics statistics() const;
  // Of a sequence that grows to `tokens` tokens by passes of at most `pass` tokens.
  KvFootprint footprint(int64_t tokens, int64_t pass = 1) const;
  // Of a chunk's file, as of its pages. Where the host cannot read pages, they are copied to be
  // written, of so many chunks at a time at most.
  int64_t chunk_file_bytes() const;
  static constexpr int64_t kMostCopied = 2;
  int64_t bytes_for(int64_t tokens, int64_t pass = 1) const {
    return footprint(tokens, pass).memory;
  }

 private:
  using Page = std::shared_ptr<void>;
  struct Pages;
  struct Layer;
  struct State;
  struct Growth;
  struct Kept;
  struct PassStream;

  // kv_store.cpp: sequences and pages
  State& state(Sequence sequence) const;
  Growth growth(const State& current, size_t layer, int64_t tokens) const;
  void keep(State& current, size_t layer, int64_t length) const;
  static Page new_page(KvTier& tier, size_t bytes);
  static Page owned(KvTier& tier, void* memory, size_t bytes);

  // kv_chunks.cpp: chunks in memory and in files
  void open_disk();
  struct Ring {
    int64_t slots, slot_pages;
  };
  Ring ring(int64_t bytes) const;
  void open_reader();
  void finish_chunks(State& current, const KvText& text);
  void write(const std::shared_ptr<KvChunk>& chunk,
             const std::shared_ptr<SessionDirectory>& session, const KvText& text);
  void hand_over(ChunkJob job);
  void let_go_of_file(KvChunk& chunk);
  void note_failure(ChunkJob job);
  PageFileHeader header_of(const KvChunk& chunk) const;
  void set_pages(const KvChunk& chunk, size_t global);
  void take_back_last_chunk(State& current, int64_t length) const;
  void collect();
  static bool holds(const State& current, const KvChunk& chunk);
  void report_failures(std::span<const Append> appends);
  void wait_for_writes();
  int64_t evictable_bytes() const;
  bool evict_one();
  void check_memory(int64_t bytes);
  void make_room(int64_t bytes);
  void end_pass();
  void keep_what_fits(std::vector<StreamPlan>& plans);
  int64_t growth_reserve() const;
  size_t key_scale_bytes() const;
  void make_room_for_key_scales();
  void keep_key_scales(std::vector<StreamPlan>& plans);
  void set_key_scales();
  bool drop_key_scales();
  void check_disk(int64_t new_chunks);
  bool is_forked() const;  // so that threads, files and the directory are the parent's
  void leave_to_parent();
  void require_same_process() const;
  std::vector<Page> pages_that_fit(KvTier& tier);

  // kv_offload.cpp: where attention does not read the host's memory
  KvTier& host_tier() const { return host_ ? *host_ : *tier_; }
  int64_t layer_bytes() const;  // of a chunk's pages of one layer
  int64_t host_room() const;
  bool offload_one();
  void require_host_memory() const;  // of what goes to files or comes from them
  struct StoredPage {
    const void* page;
    size_t bytes;
    bool on_device;
  };
  // Pages where the host can read them: where they are, or copies.
  struct HostPages {
    std::vector<const void*> pages;
    std::shared_ptr<const void> copies;
  };
  HostPages on_host(std::span<const StoredPage> pages) const;
  HostPages on_host(const KvChunk& chunk) const;

  // kv_sessions.cpp
  std::shared_ptr<SessionDirectory> directory_at(const std::string& path, bool repair = false);
  std::shared_ptr<const ChunkFile> in_use(std::unique_ptr<ChunkFile> file) const;
  void name_chunks(State& current, const KvText& text);
  void read_tail(State& fresh, const SessionContents& contents);

  const KvIdentity identity_;
  const KvStoreOptions options_;
  FileSystem& files_;
  const int64_t unit_;            // tokens of a chunk, 0: there are none
  const pid_t process_;           // threads do not survive a fork
  std::vector<int64_t> globals_;  // global layers, ascending
  std::unique_ptr<KvTier> tier_;
  std::unique_ptr<KvTier> host_;  // null: the other is of the host's memory, or nothing is shared
  std::unique_ptr<PrivateDirectory> directory_;
  const std::shared_ptr<std::atomic<int64_t>> disk_bytes_;
  const std::shared_ptr<ChunksInUse> in_use_ = std::make_shared<ChunksInUse>();
  Page ring_;  // of the reader
  std::map<Digest, std::weak_ptr<KvChunk>> by_name_;
  std::map<Sequence, std::unique_ptr<State>> sequences_;
  Sequence next_ = 1;
  std::vector<ChunkJob> failed_;
  std::unique_ptr<ChunkWriter> writer_;

  // The pass at hand.
  std::vector<Sequence> pass_;
  std::map<int64_t, int64_t> order_;  // of each layer in it
  std::vector<PassStream> streams_;
  std::map<std::pair<Sequence, int64_t>, size_t> stream_of_;  // by sequence and layer
  std::vector<Kept> kept_;                                    // pages that stay
  std::vector<Kept> scaled_;                                  // pages whose keys' scales stay
  std::unique_ptr<ChunkReader> reader_;
};

}  // namespace puna
