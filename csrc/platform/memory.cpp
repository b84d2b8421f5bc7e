#include "platform/memory.h"

#include <sys/mman.h>

#include <utility>

#include "base/error.h"
#include "platform/system.h"

namespace puna {

namespace {

constexpr size_t kPage = 4096, kHugePage = size_t{2} << 20;

size_t whole_pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

}  // namespace

Memory::Memory(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  // At a huge-page boundary: map more than is needed and give the ends back. What is left after the
  // last whole huge page stays in small ones: with one more, a model of many matrices would take
  // megabytes for each that nobody reads.
  const bool huge = bytes >= kHugePage;
  const size_t wanted = whole_pages(bytes);
  const size_t mapped = huge ? wanted + kHugePage : wanted;
  void* start = mapped < bytes ? MAP_FAILED
                               : mmap(nullptr, mapped, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) {
    fail(ErrorCode::kOutOfMemory, "[memory] the system refused ", bytes, " bytes; it reports ",
         available_memory_bytes(), " free");
  }
  if (!huge) {
    data_ = start;
    return;
  }
  auto* const first = static_cast<char*>(start);
  const size_t lead = (kHugePage - reinterpret_cast<size_t>(first) % kHugePage) % kHugePage;
  if (lead > 0) munmap(first, lead);
  if (kHugePage - lead > 0) munmap(first + lead + wanted, kHugePage - lead);
  data_ = first + lead;
  size_ = wanted;
  // A wish: without it pages are 4 KiB and reads slower.
  (void)madvise(data_, size_, MADV_HUGEPAGE);
}

void Memory::give_back(void* start, size_t bytes) { (void)madvise(start, bytes, MADV_DONTNEED); }

Memory Memory::adopted(void* data, size_t bytes) {
  Memory memory;
  memory.data_ = data;
  memory.size_ = whole_pages(bytes);
  return memory;
}

Memory::~Memory() {
  if (data_) munmap(data_, size_);
}

Memory::Memory(Memory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

}  // namespace puna
