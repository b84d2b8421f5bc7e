// Streams pages of chunk files through a ring of memory, ahead of the attention that reads them.
//
// A pass reads its layers in a known order, and each layer's pages in ascending order, once. So the
// ring is filled in that order and as far ahead as it reaches: behind the chunked layers and
// feed-forward networks between two global layers, the next one's pages arrive. Every page is
// checked against its checksum each time it is read.
//
// Two streams of one layer (sequences whose files differ) take turns in the ring. A reader that
// waits for a page beyond the ring (because it holds on to many, or prefers one stream) gets memory
// outside of it: the bound gives way, never the pass.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "kv/chunk.h"
#include "platform/file_system.h"
#include "platform/read_queue.h"

namespace puna {

// One chunk's pages of one layer, to be read in a pass.
struct ChunkPart {
  std::shared_ptr<const ChunkFile> file;
  const PageSection* section = nullptr;  // of file->header
  int64_t first_index = 0;               // of the segment's page that is its first
  // Where its pages shall stay, or empty: through the ring.
  std::vector<std::shared_ptr<void>> stay;
  // Null, or where a piece of each page shall be copied to, one after another.
  std::shared_ptr<void> excerpts;
  size_t excerpt_offset = 0, excerpt_bytes = 0;
  std::vector<uint8_t> arrived = {};  // by page: 1 once it has been read

  bool whole() const {
    return !arrived.empty() && std::find(arrived.begin(), arrived.end(), 0) == arrived.end();
  }
};

struct StreamPlan {
  int64_t order = 0;             // of its layer in the pass
  std::vector<ChunkPart> parts;  // ascending in first_index
};

struct ReadStatistics {
  int64_t bytes = 0;          // read so far
  double waited_seconds = 0;  // by attention
};

class ChunkReader {
 public:
  // `slots`: the ring, each of slot_pages pages; they stay the caller's. `poison`: overwrites pages
  // that were passed, so that a test sees whoever still reads them.
  ChunkReader(FileSystem& files, std::unique_ptr<ReadQueue> queue, std::vector<void*> slots,
              int64_t slot_pages, bool poison);
  ~ChunkReader();
  ChunkReader(const ChunkReader&) = delete;
  ChunkReader& operator=(const ChunkReader&) = delete;

  void begin(std::vector<StreamPlan> plans);
  KvStream* stream(size_t plan);
  // Streams of layers before `order` are not needed any more.
  void finish_before(int64_t order);
  // Ends the pass, wherever it is; returns the plans, with what stayed.
  std::vector<StreamPlan> end();

  ReadStatistics statistics() const;
  const char* method() const { return queue_->name(); }

 private:
  class Stream;
  struct Group;

  void pump();
  Stream* next_stream();
  void issue(Stream& stream, char* memory, bool ring);
  void finished(Group& group, std::exception_ptr failure);
  void let_go(Group& group);
  const void* wait(Stream& stream, int64_t index);
  void passed(Stream& stream, int64_t index);
  void restart(Stream& stream, std::span<const uint8_t> wanted);
  void drop(Group& group);
  void drop_before(Stream& stream, int64_t index);

  FileSystem& files_;
  const int64_t slot_pages_;
  const bool poison_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<char*> free_;
  std::vector<std::unique_ptr<Stream>> streams_;
  int64_t in_flight_ = 0;
  ReadStatistics statistics_;
  std::unique_ptr<ReadQueue> queue_;  // ends before what its reads refer to
};

}  // namespace puna
