#include "kv/chunk_writer.h"

#include <unistd.h>

#include <utility>

#include "platform/io_thread.h"

namespace puna {

ChunkWriter::ChunkWriter(FileSystem& files, std::string directory, const KvIdentity& identity,
                         std::shared_ptr<std::atomic<int64_t>> written_bytes)
    : files_(files),
      directory_(std::move(directory)),
      identity_(identity),
      written_bytes_(std::move(written_bytes)) {
  thread_ = start_io_thread([this] { work(); });
}

ChunkWriter::~ChunkWriter() {
  {
    const std::lock_guard guard(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void ChunkWriter::add(ChunkJob&& job) {
  {
    const std::lock_guard guard(mutex_);
    waiting_.push_back(std::move(job));
  }
  changed_.notify_all();
}

std::vector<ChunkJob> ChunkWriter::collect() {
  const std::lock_guard guard(mutex_);
  return std::exchange(done_, {});
}

bool ChunkWriter::wait() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return !done_.empty() || (waiting_.empty() && !busy_); });
  return !done_.empty();
}

int64_t ChunkWriter::pending() const {
  const std::lock_guard guard(mutex_);
  return static_cast<int64_t>(waiting_.size()) + busy_;
}

void ChunkWriter::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return stopping_ || !waiting_.empty(); });
    // The cache's own files go with the process, a session's chunks are waited for.
    if (stopping_) std::erase_if(waiting_, [](const ChunkJob& job) { return !job.session; });
    if (waiting_.empty()) return;
    ChunkJob job = std::move(waiting_.front());
    waiting_.pop_front();
    busy_ = true;
    lock.unlock();
    try {
      write(job);
    } catch (...) {
      job.failure = std::current_exception();
    }
    lock.lock();
    busy_ = false;
    done_.push_back(std::move(job));
    changed_.notify_all();
  }
}

void ChunkWriter::write(ChunkJob& job) {
  // Another sequence's job may have written the chunk meanwhile.
  job.file = job.chunk->written;
  if (job.file == nullptr && !directory_.empty()) {
    const std::string name = hex(job.header.chain);
    write_page_file(files_, directory_, name, identity_, job.header, job.pages);
    const std::string path = directory_ + "/" + name;
    const auto bytes = static_cast<int64_t>(job.header.file_bytes);
    const FileFacts facts = files_.open(path, OpenMode::kRead)->facts();
    written_bytes_->fetch_add(bytes);
    auto* const file = new ChunkFile{path, job.header, facts};
    job.file = {file, [files = &files_, count = written_bytes_, bytes,
                       process = getpid()](ChunkFile* gone) {
                  // Not a fork's to remove. What stays, does until the directory is cleaned up.
                  if (getpid() == process) remove_if_possible(*files, gone->path);
                  count->fetch_sub(bytes);
                  delete gone;
                }};
    job.chunk->written = job.file;
  }
  if (job.session)
    job.session->append(job.chunk->index, job.text, job.file.get(), job.header, job.pages);
}

}  // namespace puna
