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
  // By the processor's instructions if it has any for this; `plainly`: without them.
  explicit Sha256(bool plainly = false);
  Sha256& update(const void* data, size_t bytes);
  // A number as little-endian bytes.
  Sha256& number(uint64_t value);
  Digest digest();  // ends it

  static Digest of(const void* data, size_t bytes) { return Sha256().update(data, bytes).digest(); }
  static Digest of(std::string_view text) { return of(text.data(), text.size()); }

 private:
  static constexpr size_t kBlock = 64;

  std::array<uint32_t, 8> state_;
  // Takes in a number of blocks.
  void (*add_blocks_)(std::array<uint32_t, 8>& state, const uint8_t* data, size_t count);
  std::array<uint8_t, kBlock> pending_;
  uint64_t bytes_ = 0;
};

std::string hex(const Digest& digest);

}  // namespace puna
