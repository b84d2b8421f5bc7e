// A file mapped read-only into memory.
#pragma once

#include <cstddef>
#include <string>

namespace puna {

class MappedFile {
 public:
  // Throws ModelNotFound if there is no such file, ModelFormat if it is not a regular file or
  // empty.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  const std::string& path() const { return path_; }
  const std::byte* data() const { return data_; }
  size_t size() const { return size_; }

  // Whether a pointer leads into the file.
  bool holds(const void* address) const;
  // Hints about a range: it will be read soon, or its pages may be dropped from memory.
  void will_need(size_t offset, size_t bytes) const;
  void dont_need(size_t offset, size_t bytes) const;

 private:
  void advise(size_t offset, size_t bytes, int advice) const;

  std::string path_;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace puna
