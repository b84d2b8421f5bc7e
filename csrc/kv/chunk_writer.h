// Writes finished chunks behind the computation: to a directory of chunk files, to the journals of
// the sessions that go through them, or both. One thread, in the order of the jobs.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "kv/chunk.h"
#include "kv/kv_chain.h"
#include "kv/session_file.h"
#include "platform/file_system.h"

namespace puna {

struct ChunkJob {
  std::shared_ptr<KvChunk> chunk;
  PageFileHeader header;
  std::vector<const void*> pages;      // of the chunk, in the order of header.sections
  std::shared_ptr<const void> copies;  // of pages that the host cannot read where they are
  // To be told of the chunk, after it is durable; null: nobody.
  std::shared_ptr<SessionDirectory> session;
  UnitText text;  // for the session
  // Set by the writer: the file in the directory, why there is none.
  std::shared_ptr<const ChunkFile> file;
  std::exception_ptr failure;
};

class ChunkWriter {
 public:
  // `directory` "": chunk files are written to sessions alone. `written_bytes` counts what lies in
  // the directory; a file is removed when nobody holds its ChunkFile any more.
  ChunkWriter(FileSystem& files, std::string directory, const KvIdentity& identity,
              std::shared_ptr<std::atomic<int64_t>> written_bytes);
  ~ChunkWriter();  // when the jobs for sessions are done; drops the others
  ChunkWriter(const ChunkWriter&) = delete;
  ChunkWriter& operator=(const ChunkWriter&) = delete;

  // The job stays as it is if this throws.
  void add(ChunkJob&& job);
  // Jobs that came to their end, in order. Chunks and pages are let go of by the caller's thread,
  // never by the writer's.
  std::vector<ChunkJob> collect();
  // Waits until there is something to collect; false if there is nothing to wait for.
  bool wait();
  int64_t pending() const;

 private:
  void work();
  void write(ChunkJob& job);

  FileSystem& files_;
  const std::string directory_;
  const KvIdentity identity_;
  const std::shared_ptr<std::atomic<int64_t>> written_bytes_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<ChunkJob> waiting_;
  std::vector<ChunkJob> done_;
  bool busy_ = false, stopping_ = false;
  std::thread thread_;
};

}  // namespace puna
