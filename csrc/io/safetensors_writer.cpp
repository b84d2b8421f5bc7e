#include "io/safetensors_writer.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/error.h"

namespace puna {
namespace {

constexpr size_t kLengthBytes = 8;

const char* code_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "F32";
    case DType::kF16:
      return "F16";
    case DType::kBF16:
      return "BF16";
    case DType::kU8:
      return "U8";
    default:
      fail(ErrorCode::kInternal, "[safetensors] ", name_of(dtype), " tensors are not written");
  }
}

}  // namespace

int64_t SafetensorsWriter::Entry::bytes() const {
  int64_t bytes = static_cast<int64_t>(size_of(dtype));
  for (const int64_t extent : shape) bytes *= extent;
  return bytes;
}

SafetensorsWriter::Partial::~Partial() {
  if (file_ < 0) return;
  ::unlink(path_.c_str());  // while nobody else can have locked it
  ::close(file_);
}

void SafetensorsWriter::Partial::open() {
  const int file = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
  if (file < 0)
    fail(ErrorCode::kInvalidRequest, "[write] ", path_, " cannot be made: ", std::strerror(errno));
  const bool is_locked = ::flock(file, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK;
  // Of a writer that has just ended, this may be the file that it renamed or removed.
  struct stat opened, named;
  if (is_locked || ::fstat(file, &opened) != 0 || ::stat(path_.c_str(), &named) != 0 ||
      opened.st_ino != named.st_ino || opened.st_dev != named.st_dev) {
    ::close(file);
    fail(ErrorCode::kInvalidRequest, "[write] ", path_,
         " is being written by another; wait for it, or choose another folder");
  }
  file_ = file;
  if (::ftruncate(file_, 0) != 0)
    fail(ErrorCode::kInvalidRequest, "[write] ", path_, " cannot be made: ", std::strerror(errno));
}

bool SafetensorsWriter::Partial::rename(const std::string& path) {
  if (::rename(path_.c_str(), path.c_str()) != 0) return false;
  ::close(std::exchange(file_, -1));
  return true;
}

SafetensorsWriter::SafetensorsWriter(const std::string& path, std::vector<Entry> entries,
                                     const std::map<std::string, std::string>& metadata,
                                     int64_t alignment)
    : path_(path), partial_(path + ".partial"), entries_(std::move(entries)) {
  nlohmann::json header;
  header["__metadata__"] = metadata;
  int64_t offset = 0;
  for (const Entry& entry : entries_) {
    header[entry.name] = {{"dtype", code_of(entry.dtype)},
                          {"shape", entry.shape},
                          {"data_offsets", {offset, offset + entry.bytes()}}};
    offset += entry.bytes();
  }
  // The format allows spaces after the header.
  std::string text = header.dump();
  const auto unit = static_cast<size_t>(alignment);
  text.resize((kLengthBytes + text.size() + unit - 1) / unit * unit - kLengthBytes, ' ');

  const auto require_new = [&] {
    if (std::filesystem::exists(path_))
      fail(ErrorCode::kInvalidRequest, "[write] ", path_,
           " exists; remove it or choose another folder");
  };
  require_new();
  std::error_code unknown;
  const auto space = std::filesystem::space(std::filesystem::path(path_).parent_path(), unknown);
  const uint64_t needed = kLengthBytes + text.size() + static_cast<uint64_t>(offset);
  if (!unknown && needed > space.available)
    fail(ErrorCode::kInvalidRequest, "[write] ", path_, " needs ", needed, " bytes, the disk has ",
         space.available, " free");
  partial_.open();
  require_new();  // another writer may have ended meanwhile
  uint8_t length[kLengthBytes];
  for (size_t i = 0; i < kLengthBytes; ++i) length[i] = static_cast<uint8_t>(text.size() >> 8 * i);
  append(length, kLengthBytes);
  append(text.data(), text.size());
}

void SafetensorsWriter::refuse(const char* doing) const {
  fail(ErrorCode::kDevice, "[write] ", partial_.path(), ": ", doing,
       " failed: ", std::strerror(errno));
}

void SafetensorsWriter::append(const void* data, size_t bytes) {
  const auto* from = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = ::write(partial_.file(), from, std::min(bytes, size_t{1} << 30));
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) refuse("writing");
    from += written;
    bytes -= static_cast<size_t>(written);
  }
}

void SafetensorsWriter::write(const std::string& name, const void* data, size_t bytes) {
  if (next_ == entries_.size() || entries_[next_].name != name ||
      static_cast<int64_t>(bytes) > entries_[next_].bytes())
    fail(ErrorCode::kInternal, "[write] ", name, " of ", bytes, " bytes is not what comes next");
  append(data, bytes);
  const std::vector<char> zeros(static_cast<size_t>(entries_[next_++].bytes()) - bytes);
  append(zeros.data(), zeros.size());
}

void SafetensorsWriter::finish() {
  if (next_ != entries_.size())
    fail(ErrorCode::kInternal, "[write] ", entries_.size() - next_, " tensors were not written");
  if (::fsync(partial_.file()) != 0) refuse("reaching the disk");
  if (!partial_.rename(path_)) refuse("renaming");
}

}  // namespace puna
