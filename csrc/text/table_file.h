// Tables written to a file one after the other, and read back from a file that may hold anything.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <type_traits>
#include <vector>

#include "base/crc32c.h"
#include "platform/cache_directory.h"

namespace puna {

// Gathers what is to be written.
class TableWriter {
 public:
  void number(uint64_t value) { copy(std::as_bytes(std::span(&value, 1))); }
  // A vector, which must outlive this.
  template <class Values>
  void table(const Values& values) {
    append(sized(values));
  }
  // A vector that need not.
  template <class Values>
  void copied(const Values& values) {
    copy(sized(values));
  }

  const std::vector<CacheDirectory::Part>& parts() const { return parts_; }
  size_t bytes() const { return bytes_; }
  uint32_t crc() const { return crc_; }

 private:
  template <class Values>
  CacheDirectory::Part sized(const Values& values) {
    // Without padding, whose bytes would be anything.
    static_assert(std::has_unique_object_representations_v<typename Values::value_type>);
    number(values.size());
    return std::as_bytes(std::span(values));
  }
  void copy(CacheDirectory::Part part) { append(copies_.emplace_back(part.begin(), part.end())); }
  void append(CacheDirectory::Part part) {
    crc_ = crc32c(part.data(), part.size(), crc_);
    bytes_ += part.size();
    parts_.push_back(part);
  }

  std::deque<std::vector<std::byte>> copies_;
  std::vector<CacheDirectory::Part> parts_;
  size_t bytes_ = 0;
  uint32_t crc_ = 0;
};

// Methods are false if the file ends before.
class TableReader {
 public:
  explicit TableReader(CacheDirectory::Reader& file) : file_(file) {}

  bool number(uint64_t& value) { return bytes(&value, sizeof value); }
  template <class Values>  // a vector
  bool table(Values& values) {
    using T = typename Values::value_type;
    static_assert(std::has_unique_object_representations_v<T>);
    uint64_t count = 0;
    if (!number(count) || count > file_.left() / sizeof(T)) return false;
    values.resize(count);
    return bytes(values.data(), count * sizeof(T));
  }

  // Of all that was read.
  uint32_t crc() const { return crc_; }

 private:
  bool bytes(void* to, size_t size) {
    // Summed up while they are in the processor's caches.
    constexpr size_t kAtOnce = size_t{256} << 10;
    for (auto* at = static_cast<std::byte*>(to); size > 0;) {
      const size_t part = size < kAtOnce ? size : kAtOnce;
      if (!file_.read(at, part)) return false;
      crc_ = crc32c(at, part, crc_);
      at += part;
      size -= part;
    }
    return true;
  }

  CacheDirectory::Reader& file_;
  uint32_t crc_ = 0;
};

}  // namespace puna
