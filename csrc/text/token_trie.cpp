#include "text/token_trie.h"

#include <algorithm>
#include <array>
#include <bit>
#include <span>
#include <utility>
#include <vector>

#include "text/table_file.h"

namespace puna {

namespace {

constexpr size_t kBlock = 256;  // children of one node lie within one block
// Nodes with several children look for room in this many blocks, the last ones.
constexpr size_t kSearchedBlocks = 2;

// Ids in the order of their bytes.
Table<uint32_t> sorted_tokens(const Vocabulary& vocabulary) {
  struct Entry {
    uint64_t start;  // the first eight bytes, big-endian
    uint32_t token;
  };
  Table<Entry> entries, moved;
  entries.reserve(vocabulary.size());
  for (uint32_t id = 0; id < vocabulary.size(); ++id) {
    if (vocabulary.ordinary(id).empty()) continue;
    entries.push_back({__builtin_bswap64(vocabulary.key_of(static_cast<int32_t>(id)).low), id});
  }
  // By the first eight bytes with a radix sort, by the others where those agree.
  moved.resize(entries.size());
  constexpr int kDigit = 11;
  for (int shift = 0; shift < 64; shift += kDigit) {
    std::array<uint32_t, (1 << kDigit) + 1> places{};
    const auto digit = [&](const Entry& e) { return e.start >> shift & ((1 << kDigit) - 1); };
    for (const Entry& entry : entries) ++places[digit(entry) + 1];
    for (size_t i = 1; i < places.size(); ++i) places[i] += places[i - 1];
    for (const Entry& entry : entries) moved[places[digit(entry)]++] = entry;
    entries.swap(moved);
  }
  for (size_t begin = 0; begin < entries.size();) {
    size_t end = begin + 1;
    while (end < entries.size() && entries[end].start == entries[begin].start) ++end;
    if (end > begin + 1) {
      std::sort(entries.begin() + static_cast<int64_t>(begin),
                entries.begin() + static_cast<int64_t>(end), [&](const Entry& a, const Entry& b) {
                  return vocabulary.bytes_of(static_cast<int32_t>(a.token)) <
                         vocabulary.bytes_of(static_cast<int32_t>(b.token));
                });
    }
    begin = end;
  }
  Table<uint32_t> tokens(entries.size());
  std::transform(entries.begin(), entries.end(), tokens.begin(),
                 [](const Entry& entry) { return entry.token; });
  return tokens;
}

}  // namespace

// A set of places, 64 to a word.
class TokenTrie::PlaceSet {
 public:
  static constexpr size_t kBits = 64;

  size_t words() const { return words_.size(); }
  uint64_t word(size_t i) const { return words_[i]; }
  bool has(size_t place) const { return words_[place / kBits] >> place % kBits & 1; }
  void add_block() { words_.resize(words_.size() + kBlock / kBits, ~uint64_t{0}); }
  void add(size_t place) { words_[place / kBits] |= uint64_t{1} << place % kBits; }
  void remove(size_t place) { words_[place / kBits] &= ~(uint64_t{1} << place % kBits); }

  // Bit b tells whether place (64 i + b) ^ byte is in the set.
  uint64_t word_behind(size_t i, uint8_t byte) const {
    // Neighbours change places, then pairs of them, and so on.
    constexpr uint64_t kFirst[] = {0x5555555555555555, 0x3333333333333333, 0x0f0f0f0f0f0f0f0f,
                                   0x00ff00ff00ff00ff, 0x0000ffff0000ffff, 0x00000000ffffffff};
    uint64_t bits = words_[i ^ byte / kBits];
    for (int k = 0; k < 6; ++k) {
      const int distance = 1 << k;
      const uint64_t moved = (bits >> distance & kFirst[k]) | (bits & kFirst[k]) << distance;
      bits = byte >> k & 1 ? moved : bits;
    }
    return bits;
  }

 private:
  std::vector<uint64_t> words_;
};

class TokenTrie::Builder {
 public:
  Builder(const Vocabulary& vocabulary, Built& built)
      : trie_(built.trie),
        of_tokens_(built.of_tokens),
        by_length_(built.by_length),
        sorted_(sorted_tokens(vocabulary)) {
    text_.reserve(vocabulary.joined_bytes().size());
    begins_.reserve(sorted_.size() + 1);
    for (const uint32_t token : sorted_) {
      const std::string_view part = vocabulary.ordinary(token);
      begins_.push_back(static_cast<uint32_t>(text_.size()));
      text_.insert(text_.end(), part.begin(), part.end());
    }
    begins_.push_back(static_cast<uint32_t>(text_.size()));
    of_tokens_.resize(vocabulary.size());
    by_length_.reserve(sorted_.size());
    // Room for as many nodes as there can be, which is memory only where it is used.
    const size_t most = std::min(text_.size(), kMostPlaces) + 2 * kBlock;
    trie_.places_.reserve(most);
    trie_.tokens_.reserve(most);
    trie_.depths_.reserve(most);
    level_.reserve(sorted_.size());
    next_level_.reserve(sorted_.size());
  }

  // False if there are too many places.
  bool build() {
    add_block();
    free_.remove(kRoot);
    // As a base, 0 says that there are no children, and 1 is nobody's: finish() needs one.
    unused_.remove(0);
    unused_.remove(1);
    // Breadth first, so that what is common is near the front.
    level_.push_back({kRoot, 0, static_cast<uint32_t>(sorted_.size()), kNone});
    for (uint32_t depth = 0; !level_.empty(); ++depth) {
      trie_.deepest_ = depth;
      next_level_.clear();
      for (const Range& range : level_) {
        if (!add_children(range, depth)) return false;
      }
      level_.swap(next_level_);
    }
    finish();
    return true;
  }

 private:
  // Tokens [begin, end) share the bytes of `node`; `prefix` is the longest token among the nodes
  // above it.
  struct Range {
    uint32_t node, begin, end, prefix;
  };

  void add_block() {
    free_.add_block();
    unused_.add_block();
    const size_t size = trie_.places_.size() + kBlock;
    trie_.places_.resize(size);
    trie_.tokens_.resize(size, kNone);
    trie_.depths_.resize(size);
  }

  // A base at which a byte has room.
  uint32_t base_for(uint8_t byte) {
    // Nearly every free place will do. Those of a word in which none did are left for good.
    for (;; ++first_free_) {
      if (first_free_ == free_.words()) add_block();
      for (uint64_t free = free_.word(first_free_); free != 0; free &= free - 1) {
        const size_t place = first_free_ * PlaceSet::kBits + std::countr_zero(free);
        if (unused_.has(place ^ byte)) return static_cast<uint32_t>(place ^ byte);
      }
    }
  }

  // A base at which all bytes have room.
  uint32_t base_for(std::span<const uint8_t> bytes) {
    if (bytes.size() == 1) return base_for(bytes[0]);
    constexpr size_t kSearched = kSearchedBlocks * kBlock / PlaceSet::kBits;
    for (size_t i = free_.words() - std::min(free_.words(), kSearched);; ++i) {
      if (i == free_.words()) add_block();
      uint64_t bases = unused_.word(i);
      for (size_t k = 0; k < bytes.size() && bases != 0; ++k) {
        bases &= free_.word_behind(i, bytes[k]);
      }
      if (bases == 0) continue;
      return static_cast<uint32_t>(i * PlaceSet::kBits) +
             static_cast<uint32_t>(std::countr_zero(bases));
    }
  }

  // Of a range whose node is `depth` bytes below the root. False if there are too many places.
  bool add_children(Range range, uint32_t depth) {
    Place* of_token = nullptr;
    if (begins_[range.begin + 1] - begins_[range.begin] == depth) {  // the shortest comes first
      const uint32_t token = sorted_[range.begin];
      trie_.tokens_[range.node] = token;
      trie_.places_[range.node] |= kHasToken;
      by_length_.push_back(token);
      of_token = &of_tokens_[token];
      of_token->longest_prefix = range.prefix;
      range.prefix = token;
      if (++range.begin == range.end) return true;
    }
    std::array<uint8_t, kBlock> bytes;
    std::array<uint32_t, kBlock + 1> starts;
    size_t count = 0;
    for (uint32_t at = range.begin; at < range.end; ++at) {
      const auto byte = static_cast<uint8_t>(text_[begins_[at] + depth]);
      if (count != 0 && bytes[count - 1] == byte) continue;
      bytes[count] = byte;
      starts[count++] = at;
    }
    starts[count] = range.end;
    const uint32_t base = base_for({bytes.data(), count});
    if (trie_.places_.size() > kMostPlaces) return false;
    unused_.remove(base);
    trie_.places_[range.node] |= base << kBaseBit;
    if (of_token) of_token->base = base;
    for (size_t k = 0; k < count; ++k) {
      const uint32_t child = base ^ bytes[k];
      free_.remove(child);
      trie_.places_[child] = static_cast<uint32_t>(bytes[k]) << kLabelBit;
      trie_.depths_[child] = static_cast<uint16_t>(depth + 1);
      next_level_.push_back({child, starts[k], starts[k + 1], range.prefix});
      if (of_token) of_token->next_bytes |= uint32_t{1} << (bytes[k] & 31);
    }
    return true;
  }

  // Free places, and the root, get a byte that leads to them from no base.
  void finish() {
    free_.add(kRoot);
    unused_.add(1);
    for (size_t i = 0; i < free_.words(); ++i) {
      for (uint64_t free = free_.word(i); free != 0; free &= free - 1) {
        const size_t place = i * PlaceSet::kBits + std::countr_zero(free);
        // In a block in which every place is a base, each has a child: there is no free place.
        uint32_t byte = 0;
        while (!unused_.has(place ^ byte)) ++byte;
        trie_.places_[place] |= byte << kLabelBit;
      }
    }
  }

  TokenTrie& trie_;
  Table<Place>& of_tokens_;
  Table<uint32_t>& by_length_;
  const Table<uint32_t> sorted_;
  // The tokens in order, one after the other: every level reads them from front to back.
  Table<char> text_;
  Table<uint32_t> begins_;
  PlaceSet free_;          // places where no node is
  PlaceSet unused_;        // places that are no node's base
  size_t first_free_ = 0;  // the word before which no node with one child looks
  Table<Range> level_, next_level_;
};

std::optional<TokenTrie::Built> TokenTrie::of(const Vocabulary& vocabulary) {
  Built built;
  Builder builder(vocabulary, built);
  if (!builder.build()) return std::nullopt;
  return built;
}

void TokenTrie::save(TableWriter& out) const {
  out.table(places_);
  out.table(tokens_);
  out.table(depths_);
}

bool TokenTrie::load(TableReader& in, std::span<const uint16_t> lengths) {
  return in.table(places_) && in.table(tokens_) && in.table(depths_) && check(lengths);
}

// Whether no walk leaves the tables, and depths and lengths of tokens are what walks take them for.
// Sets deepest_.
bool TokenTrie::check(std::span<const uint16_t> lengths) {
  const size_t size = places_.size();
  // Whole blocks: base ^ byte is inside if the base is.
  if (size == 0 || size % kBlock != 0 || size > kMostPlaces || tokens_.size() != size ||
      depths_.size() != size) {
    return false;
  }
  Table<uint32_t> parents(size, kNone);  // by base
  for (uint32_t node = 0; node < size; ++node) {
    const uint32_t base = this->base(node), token = tokens_[node];
    if (base >= size || has_token(node) != (token != kNone)) return false;
    if (token != kNone &&
        (depths_[node] == 0 || token >= lengths.size() || lengths[token] != depths_[node])) {
      return false;
    }
    if (base != 0 && std::exchange(parents[base], node) != kNone) return false;
  }
  deepest_ = 0;
  for (uint32_t node = 0; node < size; ++node) {
    const uint32_t base = node ^ label(node);
    if (base == 0) return false;  // a child of what has none
    if (parents[base] == kNone) continue;
    if (depths_[node] != depths_[parents[base]] + 1) return false;
    deepest_ = std::max<uint32_t>(deepest_, depths_[node]);
  }
  if (depths_[kRoot] != 0 || deepest_ > Vocabulary::kMostTokenBytes) return false;
  for (int byte = 0; byte < 256; ++byte) {
    if (child(kRoot, static_cast<uint8_t>(byte)) == kNone) return false;
  }
  return true;
}

}  // namespace puna
