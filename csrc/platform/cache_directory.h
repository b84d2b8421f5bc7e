// Files that spare work and can be made again, in a directory that is this user's alone to write.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <string>

namespace puna {

// Nothing here throws for what the file system does, or waits: what cannot be read is not there,
// and what cannot be written is left out. Any number of threads and processes may use a directory.
class CacheDirectory {
 public:
  // Made, with its parents, when first written to.
  explicit CacheDirectory(std::string path) : path_(std::move(path)) {}

  // A file, read from front to back. What puts another in its place does not change it.
  class Reader {
   public:
    Reader(int descriptor, size_t bytes) : descriptor_(descriptor), left_(bytes) {}
    ~Reader();
    Reader(Reader&& other) noexcept;
    Reader& operator=(Reader&&) = delete;

    // The next bytes; false if there are not so many.
    bool read(void* to, size_t bytes);
    // How many are left.
    size_t left() const { return left_; }

   private:
    int descriptor_;
    size_t left_;
  };
  // Nothing if there is no such file, or if somebody else may have written it.
  std::optional<Reader> open(const std::string& name) const;

  // Puts a file in its place, the parts one after another, and removes all but the `kept` files
  // that were opened or put last. False if the directory is not this user's alone, or cannot be
  // written: then it is as it was.
  using Part = std::span<const std::byte>;
  bool put(const std::string& name, std::span<const Part> parts, size_t kept) const;

 private:
  std::string path_;
};

}  // namespace puna
