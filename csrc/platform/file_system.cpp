#include "platform/file_system.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "base/error.h"

namespace puna {
namespace {

[[noreturn]] void refuse(const std::string& path, const char* what, int error) {
  fail(ErrorCode::kStorage, "[file] ", path, " cannot be ", what, ": ", std::strerror(error),
       error == ENOSPC || error == EDQUOT ? "; free some space and try again" : "");
}

// Until a signal no longer interrupts it.
template <class Call>
int repeated(const Call& call) {
  int result;
  do result = call();
  while (result != 0 && errno == EINTR);
  return result;
}

class SystemFile final : public File {
 public:
  SystemFile(const std::string& path, int descriptor) : File(path), descriptor_(descriptor) {}
  ~SystemFile() override {
    // A process that was forked has the descriptor, and with it the lock, as well.
    if (locked_by_ == getpid()) (void)flock(descriptor_, LOCK_UN);
    close(descriptor_);
  }
  // False while somebody else has the lock.
  bool lock() {
    if (flock(descriptor_, LOCK_EX | LOCK_NB) != 0) {
      if (errno == EWOULDBLOCK) return false;
      refuse(path(), "locked", errno);
    }
    locked_by_ = getpid();
    return true;
  }

  size_t read(void* to, size_t bytes, uint64_t offset) override {
    size_t done = 0;
    while (done < bytes) {
      const ssize_t got = pread(descriptor_, static_cast<char*>(to) + done, bytes - done,
                                static_cast<off_t>(offset + done));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) refuse(path(), "read", errno);
      if (got == 0) break;
      done += static_cast<size_t>(got);
    }
    return done;
  }

  void write(std::span<const Part> parts, uint64_t offset) override {
    std::vector<iovec> left;
    for (const Part& part : parts)
      if (!part.empty()) left.push_back({const_cast<std::byte*>(part.data()), part.size()});
    for (size_t first = 0; first < left.size();) {
      const ssize_t put =
          pwritev(descriptor_, left.data() + first,
                  static_cast<int>(std::min<size_t>(left.size() - first, kMostParts)),
                  static_cast<off_t>(offset));
      if (put < 0 && errno == EINTR) continue;
      if (put < 0) refuse(path(), "written", errno);
      if (put == 0) refuse(path(), "written", EIO);
      offset += static_cast<uint64_t>(put);
      auto taken = static_cast<size_t>(put);
      while (first < left.size() && taken >= left[first].iov_len) taken -= left[first++].iov_len;
      if (taken == 0) continue;
      left[first].iov_base = static_cast<char*>(left[first].iov_base) + taken;
      left[first].iov_len -= taken;
    }
  }

  void sync() override {
    if (repeated([&] { return fdatasync(descriptor_); }) != 0)
      refuse(path(), "made durable", errno);
  }
  void resize(uint64_t bytes) override {
    if (repeated([&] { return ftruncate(descriptor_, static_cast<off_t>(bytes)); }) != 0)
      refuse(path(), "resized", errno);
  }
  void reserve(uint64_t bytes) override {
    // Where a file system cannot, a full disk shows itself when written to.
    if (bytes > 0 &&
        repeated([&] { return fallocate(descriptor_, 0, 0, static_cast<off_t>(bytes)); }) != 0 &&
        errno != EOPNOTSUPP && errno != ENOSYS)
      refuse(path(), "extended", errno);
  }
  FileFacts facts() override {
    struct stat status{};
    if (fstat(descriptor_, &status) != 0) refuse(path(), "examined", errno);
    return {static_cast<uint64_t>(status.st_size), status.st_dev, status.st_ino,
            int64_t{status.st_mtim.tv_sec} * 1'000'000'000 + status.st_mtim.tv_nsec};
  }
  int descriptor() const override { return descriptor_; }

 private:
  static constexpr size_t kMostParts = 1024;  // IOV_MAX of Linux
  int descriptor_;
  pid_t locked_by_ = -1;
};

class SystemFiles final : public FileSystem {
 public:
  std::unique_ptr<File> open(const std::string& path, OpenMode mode) override {
    return open_file(path, mode);
  }

  static std::unique_ptr<SystemFile> open_file(const std::string& path, OpenMode mode) {
    const bool direct = mode == OpenMode::kReadDirect || mode == OpenMode::kWriteDirect;
    int flags = O_CLOEXEC | O_NONBLOCK;  // opening a named pipe would wait for its other end
    if (mode == OpenMode::kRead || mode == OpenMode::kReadDirect) flags |= O_RDONLY;
    if (mode == OpenMode::kWrite) flags |= O_RDWR | O_CREAT;
    if (mode == OpenMode::kWriteDirect) flags |= O_RDWR | O_CREAT | O_TRUNC;
    constexpr mode_t kOwnerWrites = 0644;
    int descriptor = ::open(path.c_str(), flags | (direct ? O_DIRECT : 0), kOwnerWrites);
    if (descriptor < 0 && direct && errno == EINVAL) {
      descriptor = ::open(path.c_str(), flags, kOwnerWrites);
      // Pages are read in a cycle longer than the cache: keeping them there would gain nothing.
      if (descriptor >= 0) (void)posix_fadvise(descriptor, 0, 0, POSIX_FADV_NOREUSE);
    }
    if (descriptor < 0) refuse(path, "opened", errno);
    auto file = std::make_unique<SystemFile>(path, descriptor);
    struct stat status{};
    if (fstat(descriptor, &status) != 0 || !S_ISREG(status.st_mode))
      fail(ErrorCode::kStorage, "[file] ", path, " is not a regular file");
    return file;
  }

  bool exists(const std::string& path) override { return access(path.c_str(), F_OK) == 0; }

  std::vector<std::string> list(const std::string& directory) override {
    std::vector<std::string> names;
    std::error_code error;
    for (std::filesystem::directory_iterator entry(directory, error), end; !error && entry != end;
         entry.increment(error))
      names.push_back(entry->path().filename().string());
    if (error) refuse(directory, "listed", error.value());
    std::sort(names.begin(), names.end());
    return names;
  }

  void make_directory(const std::string& path) override {
    std::error_code error;
    std::filesystem::create_directories(path, error);
    if (error) refuse(path, "created", error.value());
  }

  void rename(const std::string& from, const std::string& to) override {
    if (::rename(from.c_str(), to.c_str()) != 0) refuse(from, "renamed", errno);
  }

  bool link(const std::string& from, const std::string& to) override {
    if (::link(from.c_str(), to.c_str()) == 0) return true;
    if (errno == EXDEV || errno == EPERM || errno == EMLINK || errno == EOPNOTSUPP) return false;
    refuse(from, "linked", errno);
  }

  void remove(const std::string& path) override {
    if (unlink(path.c_str()) != 0 && errno != ENOENT) refuse(path, "removed", errno);
  }

  void remove_directory(const std::string& path) override {
    if (rmdir(path.c_str()) != 0 && errno != ENOENT) refuse(path, "removed", errno);
  }

  void sync_directory(const std::string& path) override {
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor < 0) refuse(path, "opened", errno);
    const int failed = fsync(descriptor);
    const int error = errno;
    close(descriptor);
    if (failed) refuse(path, "made durable", error);
  }

  uint64_t free_bytes(const std::string& path) override {
    struct statvfs status{};
    if (statvfs(path.c_str(), &status) != 0) refuse(path, "examined", errno);
    return uint64_t{status.f_bavail} * status.f_frsize;
  }

  std::unique_ptr<File> lock(const std::string& path) override {
    std::unique_ptr<SystemFile> file = open_file(path, OpenMode::kWrite);
    if (!file->lock()) return nullptr;
    // Whoever had it may have removed it between these two calls.
    const FileFacts facts = file->facts();
    struct stat status{};
    if (stat(path.c_str(), &status) != 0 || status.st_dev != facts.device ||
        status.st_ino != facts.inode)
      return nullptr;
    return file;
  }
};

}  // namespace

FileSystem& system_files() {
  static SystemFiles files;
  return files;
}

bool remove_if_possible(FileSystem& files, const std::string& path) noexcept {
  try {
    files.remove(path);
    return true;
  } catch (...) {
    return false;
  }
}

void replace_file(FileSystem& files, const std::string& path, OpenMode mode,
                  const std::function<void(File&)>& write, const std::function<void()>& ready) {
  const std::string temporary = path + ".tmp";
  try {
    {
      const auto file = files.open(temporary, mode);
      write(*file);
      file->sync();
    }
    if (ready) ready();
    files.rename(temporary, path);
  } catch (...) {
    remove_if_possible(files, temporary);
    throw;
  }
}

void read_exactly(File& file, void* to, size_t bytes, uint64_t offset) {
  const size_t got = file.read(to, bytes, offset);
  if (got != bytes)
    fail(ErrorCode::kStorage, "[file] ", file.path(), " ends at byte ", offset + got, ", ", bytes,
         " bytes from ", offset, " were expected");
}

}  // namespace puna
