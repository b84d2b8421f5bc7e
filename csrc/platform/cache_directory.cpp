#include "platform/cache_directory.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <memory>
#include <utility>
#include <vector>

#include "platform/descriptor.h"

namespace puna {

namespace {

constexpr mode_t kOwnerOnly = 0700, kOwnersFile = 0600;

bool is_ours_alone(const struct stat& status) {
  return status.st_uid == geteuid() && (status.st_mode & (S_IWGRP | S_IWOTH)) == 0;
}

// -1 if it is not there, or others may write in it.
int open_directory(const std::string& path) {
  Descriptor directory(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  struct stat status{};
  if (!directory.is_open() || fstat(directory.get(), &status) != 0 || !is_ours_alone(status)) {
    return -1;
  }
  return directory.release();
}

// With its parents; what is there already stays as it is.
void make_directory(const std::string& path) {
  for (size_t end = path.find('/', 1);; end = path.find('/', end + 1)) {
    (void)mkdir(path.substr(0, end).c_str(), kOwnerOnly);  // it shows itself when it is opened
    if (end == std::string::npos) return;
  }
}

bool write_all(int descriptor, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t put = write(descriptor, bytes.data(), bytes.size());
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) return false;
    bytes = bytes.subspan(static_cast<size_t>(put));
  }
  return true;
}

// NAME, or NAME.….new, which is unfinished: names are hexadecimal digits, all of one length.
bool is_cached(std::string_view file, size_t length) {
  const std::string_view name = file.substr(0, file.find('.'));
  return name.size() == length && name.find_first_not_of("0123456789abcdef") == name.npos &&
         (name.size() == file.size() || file.ends_with(".new"));
}

// Unfinished files among them, which are of processes that ended early if they are old. Files that
// are not the cache's stay.
void remove_all_but(int directory, size_t length, size_t kept) {
  struct File {
    timespec used;
    std::string name;
  };
  std::vector<File> files;
  const int copy = fcntl(directory, F_DUPFD_CLOEXEC, 0);
  const std::unique_ptr<DIR, int (*)(DIR*)> list(copy < 0 ? nullptr : fdopendir(copy), &closedir);
  if (!list) {
    if (copy >= 0) close(copy);
    return;
  }
  while (const dirent* entry = readdir(list.get())) {
    struct stat status{};
    if (is_cached(entry->d_name, length) &&
        fstatat(directory, entry->d_name, &status, AT_SYMLINK_NOFOLLOW) == 0 &&
        S_ISREG(status.st_mode)) {
      files.push_back({status.st_mtim, entry->d_name});
    }
  }
  if (files.size() <= kept) return;
  std::sort(files.begin(), files.end(), [](const File& a, const File& b) {
    return std::pair(a.used.tv_sec, a.used.tv_nsec) > std::pair(b.used.tv_sec, b.used.tv_nsec);
  });
  for (size_t i = kept; i < files.size(); ++i) (void)unlinkat(directory, files[i].name.c_str(), 0);
}

}  // namespace

CacheDirectory::Reader::~Reader() {
  if (descriptor_ >= 0) close(descriptor_);
}

CacheDirectory::Reader::Reader(Reader&& other) noexcept
    : descriptor_(std::exchange(other.descriptor_, -1)), left_(std::exchange(other.left_, 0)) {}

bool CacheDirectory::Reader::read(void* to, size_t bytes) {
  if (bytes > left_) return false;
  left_ -= bytes;
  for (auto* at = static_cast<char*>(to); bytes > 0;) {
    const ssize_t got = ::read(descriptor_, at, bytes);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    at += got;
    bytes -= static_cast<size_t>(got);
  }
  return true;
}

std::optional<CacheDirectory::Reader> CacheDirectory::open(const std::string& name) const {
  const Descriptor directory(open_directory(path_));
  if (!directory.is_open()) return std::nullopt;
  // Non-blocking: opening a named pipe would wait for a writer.
  Descriptor file(
      openat(directory.get(), name.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  struct stat status{};
  if (!file.is_open() || fstat(file.get(), &status) != 0 || !S_ISREG(status.st_mode) ||
      !is_ours_alone(status)) {
    return std::nullopt;
  }
  (void)futimens(file.get(), nullptr);  // it was used now
  return std::optional<Reader>(std::in_place, file.release(), static_cast<size_t>(status.st_size));
}

bool CacheDirectory::put(const std::string& name, std::span<const Part> parts, size_t kept) const {
  make_directory(path_);
  const Descriptor directory(open_directory(path_));
  if (!directory.is_open()) return false;
  // Other threads, processes and machines may be at the same; whose name is taken leaves it.
  const auto now = std::chrono::system_clock::now().time_since_epoch().count();
  const std::string unfinished =
      name + "." + std::to_string(getpid()) + "-" + std::to_string(now) + ".new";
  const Descriptor file(openat(directory.get(), unfinished.c_str(),
                               O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, kOwnersFile));
  if (!file.is_open()) return false;
  const bool whole = std::all_of(parts.begin(), parts.end(),
                                 [&](const Part& part) { return write_all(file.get(), part); });
  if (!whole || renameat(directory.get(), unfinished.c_str(), directory.get(), name.c_str()) != 0) {
    (void)unlinkat(directory.get(), unfinished.c_str(), 0);
    return false;
  }
  remove_all_but(directory.get(), name.size(), kept);
  return true;
}

}  // namespace puna
