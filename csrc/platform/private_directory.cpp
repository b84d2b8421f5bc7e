#include "platform/private_directory.h"

#include <utility>

#include "base/error.h"

namespace puna {

PrivateDirectory::PrivateDirectory(FileSystem& files, const std::string& parent) : files_(files) {
  constexpr const char* kPrefix = "puna-";
  constexpr const char* kLock = "lock";
  files_.make_directory(parent);
  // Whose lock can be had belongs to nobody any more; the first such one, or a new one, is ours.
  for (int number = 0;
       path_.empty() || files_.exists(parent + "/" + kPrefix + std::to_string(number)); ++number) {
    const std::string path = parent + "/" + kPrefix + std::to_string(number);
    files_.make_directory(path);
    std::unique_ptr<File> lock = files_.lock(path + "/" + kLock);
    if (lock == nullptr) continue;
    for (const std::string& name : files_.list(path))
      if (name != kLock) files_.remove(path + "/" + name);
    if (!path_.empty()) continue;
    path_ = path;
    lock_ = std::move(lock);
  }
}

PrivateDirectory::~PrivateDirectory() {
  try {
    files_.remove_directory(path_);
  } catch (const Error&) {
    // It is removed by the next process that uses the parent.
  }
}

}  // namespace puna
