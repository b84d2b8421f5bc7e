// Files that must outlive a crash: reads and writes at positions, what is durable and when. An
// interface, so that tests can put a file system that fails in its place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace puna {

// What tells a file that was changed or replaced from the one that was written.
struct FileFacts {
  uint64_t bytes = 0;
  uint64_t device = 0, inode = 0;
  int64_t modified_ns = 0;
  bool operator==(const FileFacts&) const = default;
};

// All methods throw Error (kStorage), with the path and the system's reason.
class File {
 public:
  using Part = std::span<const std::byte>;

  virtual ~File() = default;
  // Returns fewer bytes than asked for at the end of the file only.
  virtual size_t read(void* to, size_t bytes, uint64_t offset) = 0;
  // The parts one after another.
  virtual void write(std::span<const Part> parts, uint64_t offset) = 0;
  virtual void sync() = 0;                  // contents and size are durable afterwards
  virtual void resize(uint64_t bytes) = 0;  // cuts off, or appends zeros
  // Asks for the blocks of a file of this size, so that a full disk is found before writing.
  virtual void reserve(uint64_t bytes) = 0;
  virtual FileFacts facts() = 0;
  // For asynchronous reads by the system; -1: only read() reads this file.
  virtual int descriptor() const = 0;
  const std::string& path() const { return path_; }

 protected:
  explicit File(std::string path) : path_(std::move(path)) {}

 private:
  std::string path_;
};

enum class OpenMode {
  kRead,
  kReadDirect,   // past the page cache where the file system can: multiples of 4 KiB throughout
  kWrite,        // an existing file, or a new one
  kWriteDirect,  // a new or emptied file, past the page cache likewise
};

class FileSystem {
 public:
  virtual ~FileSystem() = default;
  virtual std::unique_ptr<File> open(const std::string& path, OpenMode mode) = 0;
  virtual bool exists(const std::string& path) = 0;
  virtual std::vector<std::string> list(const std::string& directory) = 0;  // names, sorted
  virtual void make_directory(const std::string& path) = 0;                 // and its parents
  virtual void rename(const std::string& from, const std::string& to) = 0;
  // A second name for a file; false where the file system cannot.
  virtual bool link(const std::string& from, const std::string& to) = 0;
  virtual void remove(const std::string& path) = 0;            // no error if it is not there
  virtual void remove_directory(const std::string& path) = 0;  // which is empty; likewise
  // Names created, renamed or removed in the directory are durable afterwards.
  virtual void sync_directory(const std::string& path) = 0;
  virtual uint64_t free_bytes(const std::string& path) = 0;
  // The file, made if need be and locked until it is destroyed; null while somebody else has the
  // lock, or is about to remove the file. A process that was forked meanwhile does not keep it.
  virtual std::unique_ptr<File> lock(const std::string& path) = 0;
};

// For what another failure is told before: false instead of an error.
bool remove_if_possible(FileSystem& files, const std::string& path) noexcept;

// Writes a file whole: under a temporary name, made durable, then in the place of what has its
// name. `ready` is called before that, when nothing but the directory can refuse it any more. The
// caller syncs the directory.
void replace_file(FileSystem& files, const std::string& path, OpenMode mode,
                  const std::function<void(File&)>& write,
                  const std::function<void()>& ready = nullptr);

// The operating system's.
FileSystem& system_files();

// Fails (kStorage) if the file ends before.
void read_exactly(File& file, void* to, size_t bytes, uint64_t offset);

}  // namespace puna
