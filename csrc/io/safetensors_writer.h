// Writes one safetensors file in order, without holding its data.
//
// The file appears under its name only when finish() has written it wholly to disk; until then it
// is PATH.partial, which is locked against other writers and which the destructor removes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/tensor.h"
#include "platform/file_system.h"

namespace puna {

class SafetensorsWriter {
 public:
  struct Entry {
    std::string name;
    DType dtype = DType::kU8;
    std::vector<int64_t> shape;
    int64_t bytes() const;
  };

  // `entries` in the order in which their data follow; the data begin at a multiple of `alignment`.
  // Throws InvalidRequest if the file exists or is being written, Storage if it cannot be made or
  // is larger than what is free.
  SafetensorsWriter(const std::string& path, std::vector<Entry> entries,
                    const std::map<std::string, std::string>& metadata, int64_t alignment);

  // The data of the next entry; what is missing to its size becomes zeros. Throws Storage if the
  // system refuses the write.
  void write(const std::string& name, const void* data, size_t bytes);
  void finish();

 private:
  // A file that is open and locked, and gone in the end unless it was given another name.
  class Partial {
   public:
    explicit Partial(const std::string& path) : path_(path) {}
    ~Partial();
    Partial(const Partial&) = delete;
    Partial& operator=(const Partial&) = delete;

    void open();
    void append(std::span<const std::byte> data);
    // Makes it durable and gives it its name.
    void finish(const std::string& path);

   private:
    std::string path_;
    std::unique_ptr<File> file_;
    uint64_t size_ = 0;
  };

  void append(const void* data, size_t bytes);

  std::string path_;
  Partial partial_;
  std::vector<Entry> entries_;
  size_t next_ = 0;
};

}  // namespace puna
