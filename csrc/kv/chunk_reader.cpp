#include "kv/chunk_reader.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#include "base/error.h"

namespace puna {
namespace {

constexpr std::align_val_t kAlignment{kPageAlignment};
constexpr int kPoison = 0xff;  // not a number in every format

// Of the file, unless it is one of memory.
void note_failure(const ChunkPart& part, const std::exception_ptr& failure) {
  try {
    std::rethrow_exception(failure);
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kStorage || error.code() == ErrorCode::kSessionMismatch)
      part.file->unreadable = true;
  } catch (...) {
  }
}

}  // namespace

// Neighbouring pages that are read at once.
struct ChunkReader::Group {
  ChunkPart* part = nullptr;
  int64_t first = 0, count = 0;  // indices of the segment
  char* memory = nullptr;
  enum class Where { kRing, kOutside, kStays } where = Where::kRing;
  bool done = false, abandoned = false;
  std::exception_ptr failure;

  size_t page_bytes() const { return part->section->page_bytes; }
  size_t bytes() const { return static_cast<size_t>(count) * page_bytes(); }
};

class ChunkReader::Stream final : public KvStream {
 public:
  Stream(ChunkReader& reader, StreamPlan plan) : reader(reader), plan(std::move(plan)) {}

  const void* wait(int64_t index) override { return reader.wait(*this, index); }
  void passed(int64_t index) override { reader.passed(*this, index); }
  void restart(std::span<const uint8_t> wanted) override { reader.restart(*this, wanted); }

  bool exhausted() const { return failure != nullptr || next_part == plan.parts.size(); }
  bool wants(int64_t index) const {
    return wanted.empty() ||
           (index < static_cast<int64_t>(wanted.size()) && wanted[static_cast<size_t>(index)] != 0);
  }
  // Behind the next `pages` pages, and then to one that is wanted.
  void go_on(int64_t pages) {
    next_page += pages;
    while (next_part < plan.parts.size()) {
      const ChunkPart& part = plan.parts[next_part];
      while (next_page < part.section->pages && !wants(part.first_index + next_page)) ++next_page;
      if (next_page < part.section->pages) return;
      ++next_part;
      next_page = 0;
      file.reset();
    }
  }

  ChunkReader& reader;
  StreamPlan plan;
  std::deque<std::shared_ptr<Group>> groups;  // asked for and not passed, ascending
  size_t next_part = 0;                       // what will be asked for next
  int64_t next_page = 0;                      // of that part
  std::shared_ptr<File> file;                 // of that part
  std::exception_ptr failure;                 // nothing can be asked for any more
  std::vector<uint8_t> wanted;                // by index; empty: every page
  bool begun = false;                         // something has been passed, or let go of
};

ChunkReader::ChunkReader(FileSystem& files, std::unique_ptr<ReadQueue> queue,
                         std::vector<void*> slots, int64_t slot_pages, bool poison)
    : files_(files), slot_pages_(slot_pages), poison_(poison), queue_(std::move(queue)) {
  for (void* slot : slots) free_.push_back(static_cast<char*>(slot));
}

ChunkReader::~ChunkReader() { end(); }

void ChunkReader::begin(std::vector<StreamPlan> plans) {
  const std::lock_guard guard(mutex_);
  for (StreamPlan& plan : plans)
    streams_.push_back(std::make_unique<Stream>(*this, std::move(plan)));
  pump();
}

KvStream* ChunkReader::stream(size_t plan) { return streams_[plan].get(); }

void ChunkReader::finish_before(int64_t order) {
  for (const auto& stream : streams_) {
    if (stream->plan.order >= order) continue;
    {
      const std::lock_guard guard(mutex_);
      stream->next_part = stream->plan.parts.size();
    }
    passed(*stream, std::numeric_limits<int64_t>::max());
  }
}

std::vector<StreamPlan> ChunkReader::end() {
  finish_before(std::numeric_limits<int64_t>::max());
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return in_flight_ == 0; });
  std::vector<StreamPlan> plans;
  for (const auto& stream : streams_) plans.push_back(std::move(stream->plan));
  streams_.clear();
  return plans;
}

ReadStatistics ChunkReader::statistics() const {
  const std::lock_guard guard(mutex_);
  return statistics_;
}

// --- under the mutex
// -------------------------------------------------------------------------------

// Of the first layer that has anything left to ask for, the stream that is least ahead.
ChunkReader::Stream* ChunkReader::next_stream() {
  Stream* next = nullptr;
  for (const auto& stream : streams_) {
    if (stream->exhausted()) continue;
    if (next == nullptr || stream->plan.order < next->plan.order ||
        (stream->plan.order == next->plan.order && stream->groups.size() < next->groups.size()))
      next = stream.get();
  }
  return next;
}

void ChunkReader::pump() {
  for (Stream* stream = next_stream(); stream != nullptr; stream = next_stream()) {
    const bool stays = !stream->plan.parts[stream->next_part].stay.empty();
    if (!stays && free_.empty()) return;
    // Pages that stay take no place in the ring; what is in flight bounds how far ahead they go.
    if (stays && in_flight_ >= kReadsInFlight) return;
    char* slot = nullptr;
    if (!stays) {
      slot = free_.back();
      free_.pop_back();
    }
    issue(*stream, slot, true);
  }
}

// Asks for the stream's next group. `memory` is null for pages that stay.
void ChunkReader::issue(Stream& stream, char* memory, bool ring) {
  ChunkPart& part = stream.plan.parts[stream.next_part];
  auto group = std::make_shared<Group>();
  group->part = &part;
  group->first = part.first_index + stream.next_page;
  group->memory = memory;
  group->count = std::min(slot_pages_, part.section->pages - stream.next_page);
  for (int64_t i = 1; i < group->count; ++i)
    if (!stream.wants(group->first + i)) group->count = i;
  group->where = ring ? Group::Where::kRing : Group::Where::kOutside;
  if (!part.stay.empty()) {
    group->count = 1;
    group->where = Group::Where::kStays;
    group->memory = static_cast<char*>(part.stay[stream.next_page].get());
  }
  stream.groups.push_back(group);
  ++in_flight_;
  try {
    if (stream.file == nullptr) {
      stream.file = files_.open(part.file->path, OpenMode::kReadDirect);
      if (stream.file->facts() != part.file->facts)
        fail(ErrorCode::kSessionMismatch, "[session] ", part.file->path,
             " is not the file any more that was written; it was changed or replaced");
    }
    const uint64_t page_bytes = part.section->page_bytes;
    ReadQueue::Request request;
    request.file = stream.file;
    request.to = group->memory;
    request.bytes = group->bytes();
    request.offset = part.section->offset + static_cast<uint64_t>(stream.next_page) * page_bytes;
    request.done = [this, group](std::exception_ptr failure) { finished(*group, failure); };
    queue_->submit(std::move(request));
  } catch (...) {  // whatever it is, nobody may wait for this group
    --in_flight_;
    note_failure(part, std::current_exception());
    group->failure = stream.failure = std::current_exception();
    group->done = true;
    return;
  }
  stream.go_on(group->count);
}

void ChunkReader::let_go(Group& group) {
  if (group.where == Group::Where::kStays) return;
  if (poison_) std::memset(group.memory, kPoison, group.bytes());
  if (group.where == Group::Where::kRing)
    free_.push_back(group.memory);
  else
    ::operator delete(group.memory, kAlignment);
}

// --- on a thread of the queue
// ------------------------------------------------------------------------

void ChunkReader::finished(Group& group, std::exception_ptr failure) {
  if (failure == nullptr) {
    try {
      for (int64_t i = 0; i < group.count; ++i) {
        const int64_t page = group.first + i - group.part->first_index;
        const char* const data = group.memory + static_cast<size_t>(i) * group.page_bytes();
        check_page(group.part->file->header, *group.part->section, page, data,
                   group.part->file->path);
        const size_t bytes = group.part->excerpt_bytes;
        if (group.part->excerpts)
          std::memcpy(
              static_cast<char*>(group.part->excerpts.get()) + static_cast<size_t>(page) * bytes,
              data + group.part->excerpt_offset, bytes);
      }
    } catch (...) {
      failure = std::current_exception();
    }
  }
  if (failure != nullptr) note_failure(*group.part, failure);
  const std::lock_guard guard(mutex_);
  --in_flight_;
  group.done = true;
  group.failure = failure;
  statistics_.bytes += static_cast<int64_t>(group.bytes());
  if (failure == nullptr) {
    std::vector<uint8_t>& arrived = group.part->arrived;
    arrived.resize(static_cast<size_t>(group.part->section->pages));
    std::fill_n(arrived.begin() + (group.first - group.part->first_index), group.count, uint8_t{1});
  }
  if (group.abandoned) let_go(group);
  changed_.notify_all();
}

// --- for attention
// -------------------------------------------------------------------------------------

const void* ChunkReader::wait(Stream& stream, int64_t index) {
  std::unique_lock lock(mutex_);
  for (;;) {
    pump();
    for (const std::shared_ptr<Group>& candidate : stream.groups) {
      if (index >= candidate->first + candidate->count) continue;
      if (index < candidate->first) break;
      const std::shared_ptr<Group> group = candidate;
      if (!group->done) {
        const auto start = std::chrono::steady_clock::now();
        changed_.wait(lock, [&] { return group->done; });
        statistics_.waited_seconds +=
            std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      }
      if (group->failure) std::rethrow_exception(group->failure);
      return group->memory + static_cast<size_t>(index - group->first) * group->page_bytes();
    }
    if (stream.failure) std::rethrow_exception(stream.failure);
    if (stream.exhausted())
      fail(ErrorCode::kInternal, "[kv] page ", index, " is not in the stream, or was passed");
    // Not asked for yet: the ring is full.
    const ChunkPart& part = stream.plan.parts[stream.next_part];
    char* memory = nullptr;
    if (part.stay.empty()) {
      const size_t bytes = static_cast<size_t>(slot_pages_) * part.section->page_bytes;
      memory = static_cast<char*>(::operator new(bytes, kAlignment, std::nothrow));
      if (memory == nullptr)
        fail(ErrorCode::kOutOfMemory, "[kv] the system refused ", bytes,
             " bytes for pages from the disk");
    }
    issue(stream, memory, false);
  }
}

void ChunkReader::passed(Stream& stream, int64_t index) {
  const std::lock_guard guard(mutex_);
  stream.begun = stream.begun || index > 0;
  drop_before(stream, index);
  pump();
}

// The first time, before anything was passed, what has been asked for is kept if it is wanted.
void ChunkReader::restart(Stream& stream, std::span<const uint8_t> wanted) {
  const std::lock_guard guard(mutex_);
  stream.wanted.assign(wanted.begin(), wanted.end());
  if (stream.begun) {
    drop_before(stream, std::numeric_limits<int64_t>::max());
    stream.next_part = 0;
    stream.next_page = 0;
    stream.file.reset();
  } else {
    const auto unwanted = [&](const std::shared_ptr<Group>& group) {
      for (int64_t i = 0; i < group->count; ++i)
        if (stream.wants(group->first + i)) return false;
      return true;
    };
    std::deque<std::shared_ptr<Group>> kept;
    for (std::shared_ptr<Group>& group : stream.groups) {
      if (unwanted(group))
        drop(*group);
      else
        kept.push_back(std::move(group));
    }
    stream.groups = std::move(kept);
  }
  stream.begun = true;
  stream.go_on(0);
  pump();
}

void ChunkReader::drop(Group& group) {
  if (group.done)
    let_go(group);
  else
    group.abandoned = true;
}

void ChunkReader::drop_before(Stream& stream, int64_t index) {
  while (!stream.groups.empty()) {
    Group& group = *stream.groups.front();
    if (group.first + group.count > index) break;
    drop(group);
    stream.groups.pop_front();
  }
}

}  // namespace puna
