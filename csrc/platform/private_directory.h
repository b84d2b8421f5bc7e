// A directory of one process below a shared one, for files that end with the process.
#pragma once

#include <memory>
#include <string>

#include "platform/file_system.h"

namespace puna {

class PrivateDirectory {
 public:
  // Below `parent`, which is made if need be. What processes that were killed left there is
  // removed.
  PrivateDirectory(FileSystem& files, const std::string& parent);
  ~PrivateDirectory();  // removes it
  PrivateDirectory(const PrivateDirectory&) = delete;
  PrivateDirectory& operator=(const PrivateDirectory&) = delete;

  const std::string& path() const { return path_; }

 private:
  FileSystem& files_;
  std::string path_;
  std::unique_ptr<File> lock_;
};

}  // namespace puna
