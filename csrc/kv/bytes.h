// Little-endian records of files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "base/sha256.h"

namespace puna {

class ByteWriter {
 public:
  template <class T>
  ByteWriter& put(T value) {
    const auto wide = static_cast<uint64_t>(value);
    for (size_t i = 0; i < sizeof(T); ++i) bytes_.push_back(static_cast<std::byte>(wide >> 8 * i));
    return *this;
  }
  ByteWriter& put(const Digest& digest) {
    for (const uint8_t byte : digest) bytes_.push_back(static_cast<std::byte>(byte));
    return *this;
  }
  ByteWriter& pad(size_t size) {
    bytes_.resize(size);
    return *this;
  }
  size_t size() const { return bytes_.size(); }
  const std::vector<std::byte>& bytes() const { return bytes_; }

 private:
  std::vector<std::byte> bytes_;
};

// Reads what is there; beyond the end, zeros and ok() false.
class ByteReader {
 public:
  explicit ByteReader(std::span<const std::byte> bytes) : left_(bytes) {}

  template <class T>
  T get() {
    uint64_t value = 0;
    if (!take(sizeof(T))) return T{};
    for (size_t i = 0; i < sizeof(T); ++i) value |= uint64_t(taken_[i]) << 8 * i;
    return static_cast<T>(value);
  }
  Digest digest() {
    Digest digest{};
    if (take(digest.size())) std::memcpy(digest.data(), taken_.data(), digest.size());
    return digest;
  }
  bool ok() const { return ok_; }

 private:
  bool take(size_t bytes) {
    ok_ = ok_ && left_.size() >= bytes;
    if (!ok_) return false;
    taken_ = left_.first(bytes);
    left_ = left_.subspan(bytes);
    return true;
  }
  std::span<const std::byte> left_, taken_;
  bool ok_ = true;
};

}  // namespace puna
