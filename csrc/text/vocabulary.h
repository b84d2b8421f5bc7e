// The tokens of a vocabulary: the bytes of an id, and the id of bytes.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "platform/memory.h"

namespace puna {

class TableReader;
class TableWriter;

// Up to 15 bytes and their number in the last byte, as two registers: what short pieces and tokens
// are compared by.
struct ShortKey {
  static constexpr size_t kBytes = 15;

  uint64_t low, high;

  bool operator==(const ShortKey&) const = default;

  // `size` <= kBytes bytes.
  static ShortKey of(const char* bytes, size_t size) {
    // Of fixed numbers of bytes, which may overlap: a copy of any number takes longer.
    ShortKey key{0, static_cast<uint64_t>(size) << 56};
    if (size >= 8) {
      key.low = word_at<uint64_t>(bytes);
      if (size > 8) key.high |= word_at<uint64_t>(bytes + size - 8) >> (8 * (16 - size));
    } else if (size >= 4) {
      key.low = word_at<uint32_t>(bytes) | word_at<uint32_t>(bytes + size - 4) << (8 * (size - 4));
    } else if (size > 0) {
      key.low = word_at<uint8_t>(bytes) | word_at<uint8_t>(bytes + size / 2) << (8 * (size / 2)) |
                word_at<uint8_t>(bytes + size - 1) << (8 * (size - 1));
    }
    return key;
  }
  // The same where 16 bytes can be read at `bytes`.
  static ShortKey of_readable(const char* bytes, size_t size) {
    uint64_t words[2];
    std::memcpy(words, bytes, 16);
    return {words[0] & kKept[size][0], (words[1] & kKept[size][1]) | static_cast<uint64_t>(size)
                                                                         << 56};
  }

  uint64_t hash() const { return mixed(low ^ kSalt[0], high ^ kSalt[1]); }

  // The two halves of a 128-bit product, folded.
  static uint64_t mixed(uint64_t a, uint64_t b) {
    const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
  }
  // Odd constants without structure: from the fraction of pi.
  static constexpr uint64_t kSalt[2] = {0x243f6a8885a308d3, 0x13198a2e03707345};

 private:
  template <class Word>
  static uint64_t word_at(const char* bytes) {
    Word word;
    std::memcpy(&word, bytes, sizeof(word));
    return word;
  }
  // Of two words, the bits of their first bytes, by how many those are.
  static constexpr std::array<std::array<uint64_t, 2>, kBytes + 1> kKept = [] {
    std::array<std::array<uint64_t, 2>, kBytes + 1> kept{};
    for (size_t size = 0; size <= kBytes; ++size) {
      for (size_t byte = 0; byte < size; ++byte) {
        kept[size][byte / 8] |= uint64_t{0xff} << (byte % 8 * 8);
      }
    }
    return kept;
  }();
};
static_assert(sizeof(ShortKey) == 16);

// Byte strings one after the other, by number.
class ByteStrings {
 public:
  size_t size() const { return ends_.size(); }
  // One after the other.
  std::string_view joined() const { return {arena_.data(), arena_.size()}; }
  std::string_view operator[](size_t i) const {
    const uint32_t begin = i == 0 ? 0 : ends_[i - 1];
    return {arena_.data() + begin, ends_[i] - begin};
  }
  void reserve(size_t count, size_t bytes) {
    ends_.reserve(count);
    arena_.reserve(bytes);
  }
  // Throws ModelFormat beyond 4 GiB in all.
  void add(std::string_view bytes);

  void save(TableWriter& out) const;
  // False if the file holds something else.
  bool load(TableReader& in);

 private:
  Table<char> arena_;
  Table<uint32_t> ends_;
};

class Vocabulary {
 public:
  static constexpr int32_t kNone = -1;
  // Bounds for files, which keep the work on any to seconds. Llama 4 has 202,048 tokens, the
  // longest of 113 bytes; what looks at every cut of every token reads the sum of their squared
  // lengths.
  static constexpr size_t kMostTokens = size_t{1} << 22, kMostTokenBytes = 1024;
  static constexpr size_t kMostSquaredBytes = size_t{1} << 31;
  // Of searches in tables of hashes that are at most half full: those of numbers without structure
  // look at less than 200.
  static constexpr size_t kLongestSearch = 1024;
  [[noreturn]] static void refuse_collisions(const char* what);

  Vocabulary() = default;
  // By id; an empty one is no token. Those that are `added` do not come of pieces: find() does not
  // know them. Throws ModelFormat naming the ids if two others are the same, or if the others are
  // beyond what can be worked on in seconds.
  Vocabulary(ByteStrings tokens, std::vector<bool> added);

  size_t size() const { return tokens_.size(); }
  // Of all tokens, those of each where bytes_of() has them.
  std::string_view joined_bytes() const { return tokens_.joined(); }
  // Of each token that is not added; 0: of the others.
  Table<uint16_t> ordinary_lengths() const;
  // Of an id below size().
  std::string_view bytes_of(int32_t id) const { return tokens_[static_cast<size_t>(id)]; }
  // Those of a token that is not added; of one that is, none.
  std::string_view ordinary(size_t id) const {
    return added_[id] ? std::string_view() : tokens_[id];
  }
  // The first 15 bytes of a token, and in the last one their number, or what stands for more.
  const ShortKey& key_of(int32_t id) const { return keys_[static_cast<size_t>(id)]; }
  // Whether all of a token is ASCII: whether no byte of its key has the highest bit.
  static bool is_ascii(const ShortKey& key) { return !((key.low | key.high) & 0x8080808080808080); }
  size_t length(int32_t id) const {
    const ShortKey& key = key_of(id);
    return is_long(key) ? bytes_of(id).size() : static_cast<size_t>(key.high >> 56);
  }

  // Writes the bytes of an id at `out`, and where there is room up to `limit` for more than these,
  // anything behind them; returns where they end. Copies of fixed sizes take a fraction of the time
  // of one of any size.
  char* write(int32_t id, char* out, const char* limit) const {
    const ShortKey& key = key_of(id);
    if (static_cast<size_t>(limit - out) < sizeof(key) || is_long(key)) {
      return write_long(id, out, limit);
    }
    std::memcpy(out, &key, sizeof(key));
    return out + (key.high >> 56);
  }

  static uint64_t hash_of(std::string_view bytes);

  int32_t find(std::string_view bytes) const {
    if (bytes.size() > ShortKey::kBytes) return find(bytes, hash_of(bytes));
    const ShortKey key = ShortKey::of(bytes.data(), bytes.size());
    return find(key, key.hash());
  }
  // `hash` is that of the bytes, or of the key.
  int32_t find(std::string_view bytes, uint64_t hash) const;
  int32_t find(const ShortKey& key, uint64_t hash) const {
    const auto tag = static_cast<uint32_t>(hash);
    for (size_t slot = hash >> shift_;; slot = (slot + 1) & mask_) {
      const Slot& found = slots_[slot];
      if (found.id == kNone) return kNone;
      if (found.tag == tag && keys_[static_cast<size_t>(found.id)] == key) return found.id;
    }
  }
  // What find() visits first, what it finds there, and what it visits then.
  void prefetch(uint64_t hash) const { __builtin_prefetch(&slots_[hash >> shift_]); }
  int32_t candidate(uint64_t hash) const { return slots_[hash >> shift_].id; }
  void prefetch_key(int32_t id) const { __builtin_prefetch(keys_.data() + std::max(id, 0)); }

  // find() forgets the tokens for which `keep` is false.
  void restrict_to(const std::vector<bool>& keep);

  // All but which tokens are added.
  void save(TableWriter& out) const;
  // Nothing if the file holds something else.
  static std::optional<Vocabulary> load(TableReader& in, std::span<const uint32_t> added);

 private:
  struct Slot {
    uint32_t tag;  // low bits of the hash
    int32_t id;
  };
  static constexpr uint8_t kLongAscii = 0x7f, kLong = 0xff;
  static bool is_long(const ShortKey& key) { return key.high >> 56 >= kLongAscii; }
  char* write_long(int32_t id, char* out, const char* limit) const;
  void make_keys();
  void set_slot_count();
  uint64_t hash_of_token(size_t id) const;
  void require_bounded_work() const;
  void insert(int32_t id, uint64_t hash);
  // Those for which keep(id) is true.
  template <class Keep>
  void fill_slots(const Keep& keep);

  ByteStrings tokens_;
  std::vector<bool> added_;
  Table<ShortKey> keys_;
  Table<Slot> slots_;  // open addressing, at most half full
  int shift_ = 63;     // a hash's highest bits are its slot
  size_t mask_ = 0;
};

}  // namespace puna
