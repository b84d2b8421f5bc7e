#include "platform/private_directory.h"

#include <utility>

#include "base/error.h"

namespace puna {

namespace {

constexpr const char* kPrefix = "puna-";
constexpr const char* kLock = "lock";

void remove_all_but_lock(FileSystem& files, const std::string& path) {
  for (const std::string& name : files.list(path))
    if (name != kLock) files.remove(path + "/" + name);
}

}  // namespace

PrivateDirectory::PrivateDirectory(FileSystem& files, const std::string& parent) : files_(files) {
  files_.make_directory(parent);
  // Whose lock can be had belongs to nobody any more; the first such one, or a new one, is ours.
  for (int number = 0;
       path_.empty() || files_.exists(parent + "/" + kPrefix + std::to_string(number)); ++number) {
    const std::string path = parent + "/" + kPrefix + std::to_string(number);
    files_.make_directory(path);
    std::unique_ptr<File> lock;
    try {
      lock = files_.lock(path + "/" + kLock);
    } catch (const Error&) {
      if (files_.exists(path)) throw;  // else its owner has removed it just now
    }
    if (lock == nullptr) continue;
    remove_all_but_lock(files_, path);
    if (!path_.empty()) continue;
    path_ = path;
    lock_ = std::move(lock);
  }
}

PrivateDirectory::~PrivateDirectory() {
  try {
    remove_all_but_lock(files_, path_);
    // Last, for others may have the directory as soon as it is gone. Then it is not empty.
    files_.remove(path_ + "/" + kLock);
    files_.remove_directory(path_);
  } catch (const Error&) {
    // It is removed by the next process that uses the parent.
  }
}

}  // namespace puna
