// SHA-256 (FIPS 180-4): names and chains what is stored in files.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace puna {

using Digest = std::array<uint8_t, 32>;

class Sha256 {
 public:
  Sha256();
  Sha256& update(const void* data, size_t bytes);
  // A number as little-endian bytes.
  Sha256& number(uint64_t value);
  Digest digest();  // ends it

  static Digest of(const void* data, size_t bytes) { return Sha256().update(data, bytes).digest(); }
  static Digest of(std::string_view text) { return of(text.data(), text.size()); }

 private:
  void block(const uint8_t* data);

  std::array<uint32_t, 8> state_;
  std::array<uint8_t, 64> pending_;
  uint64_t bytes_ = 0;
};

std::string hex(const Digest& digest);

}  // namespace puna
