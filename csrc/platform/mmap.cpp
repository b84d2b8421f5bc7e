#include "platform/mmap.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <utility>

#include "base/error.h"
#include "platform/descriptor.h"

namespace puna {

MappedFile::MappedFile(const std::string& path) : path_(path) {
  // Non-blocking: opening a named pipe would wait for a writer.
  const Descriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!file.is_open()) {
    fail(ErrorCode::kModelNotFound, "[file] ", path, " cannot be opened: ", std::strerror(errno));
  }
  struct stat status{};
  if (fstat(file.get(), &status) != 0 || !S_ISREG(status.st_mode)) {
    fail(ErrorCode::kModelFormat, "[file] ", path,
         S_ISDIR(status.st_mode) ? " is a directory, not a file" : " is not a regular file");
  }
  if (status.st_size == 0) fail(ErrorCode::kModelFormat, "[file] ", path, " is empty");
  size_ = static_cast<size_t>(status.st_size);
  void* mapped = mmap(nullptr, size_, PROT_READ, MAP_SHARED, file.get(), 0);
  if (mapped == MAP_FAILED) {
    fail(ErrorCode::kOutOfMemory, "[file] ", path, " (", size_,
         " bytes) cannot be mapped: ", std::strerror(errno));
  }
  data_ = static_cast<const std::byte*>(mapped);
  // Where the file system can, in huge pages: what is missing is then read 2 MiB at a time.
  advise(0, size_, MADV_HUGEPAGE);
}

MappedFile::~MappedFile() {
  if (data_) munmap(const_cast<std::byte*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

bool MappedFile::holds(const void* address) const {
  const auto at = reinterpret_cast<uintptr_t>(address), start = reinterpret_cast<uintptr_t>(data_);
  return at >= start && at - start < size_;
}

void MappedFile::advise(size_t offset, size_t bytes, int advice) const {
  if (offset >= size_) return;
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t begin = offset / page * page, end = offset + std::min(bytes, size_ - offset);
  // A hint: failure changes nothing but speed.
  (void)madvise(const_cast<std::byte*>(data_) + begin, end - begin, advice);
}

void MappedFile::will_need(size_t offset, size_t bytes) const {
  advise(offset, bytes, MADV_WILLNEED);
}
void MappedFile::dont_need(size_t offset, size_t bytes) const {
  advise(offset, bytes, MADV_DONTNEED);
}

}  // namespace puna
