#include "text/token_trie.h"

#include <algorithm>
#include <array>

namespace puna {

namespace {

constexpr uint32_t kBlock = 256;  // children of one node lie within one block
// Nodes with several children look for room in this many blocks before the last.
constexpr uint32_t kSearchedBlocks = 4;
// Those with one child try so many places.
constexpr uint32_t kTriedPlaces = 64;

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

struct TokenTrie::Builder {
  // A place of the array while it fills.
  struct Slot {
    uint32_t base = 0;
    uint32_t parent = kNone;  // kNone: a free place
    // The free places as a ring in ascending order; 0 stands for its head.
    uint32_t next_free = 0, previous_free = 0;
  };
  // Tokens [begin, end) share the bytes of `node`; `prefix` is the longest token among the nodes
  // above it.
  struct Range {
    uint32_t node, begin, end, prefix;
  };

  Builder(const Vocabulary& vocabulary, Built& built) : built(built), trie(built.trie) {
    tokens = sorted_tokens(vocabulary);
    size_t bytes = 0;
    for (const uint32_t token : tokens) bytes += vocabulary.ordinary(token).size();
    text.reserve(bytes);
    begins.reserve(tokens.size() + 1);
    for (const uint32_t token : tokens) {
      const std::string_view part = vocabulary.ordinary(token);
      begins.push_back(static_cast<uint32_t>(text.size()));
      text.insert(text.end(), part.begin(), part.end());
    }
    begins.push_back(static_cast<uint32_t>(text.size()));
    built.of_tokens.resize(vocabulary.size());
    // Room for as many nodes as there can be, which is memory only where it is used.
    const size_t most = std::min(bytes, kMostPlaces) + 2 * kBlock;
    slots.reserve(most);
    labels.reserve(most);
    trie.tokens_.reserve(most);
    trie.depths_.reserve(most);
    built.by_depth.reserve(most);
    ranges.reserve(most);
  }

  void add_block() {
    const auto begin = static_cast<uint32_t>(slots.size());
    const size_t size = begin + kBlock;
    slots.resize(size);
    labels.resize(size);
    is_base.resize(size);
    trie.tokens_.resize(size, kNone);
    trie.depths_.resize(size);
    for (uint32_t place = std::max(begin, 1u); place < size; ++place) {
      const uint32_t last = slots[0].previous_free;
      slots[last].next_free = place;
      slots[place].previous_free = last;
      slots[place].next_free = 0;
      slots[0].previous_free = place;
    }
  }

  // 0 says that there are no children; 1 is nobody's, for the free places of the first block.
  bool may_be_base(uint32_t place) const { return place > 1 && !is_base[place]; }
  bool is_free(uint32_t place) const { return place != kRoot && slots[place].parent == kNone; }

  void take(uint32_t place, uint32_t parent, uint8_t label) {
    Slot& slot = slots[place];
    slots[slot.previous_free].next_free = slot.next_free;
    if (next_try == place) next_try = slot.next_free;
    slots[slot.next_free].previous_free = slot.previous_free;
    slot.parent = parent;
    labels[place] = label;
    trie.depths_[place] = static_cast<uint16_t>(trie.depths_[parent] + 1);
  }

  // A base at which one byte has room.
  uint32_t base_for(uint8_t wanted) {
    // From where the last one ended: places that no base leads to would gather at the front.
    for (uint32_t tried = 0; tried < kTriedPlaces; ++tried) {
      const uint32_t place = next_try != 0 ? next_try : slots[0].next_free;
      if (place == 0) break;
      next_try = slots[place].next_free;
      if (may_be_base(place ^ wanted)) return place ^ wanted;
    }
    const auto size = static_cast<uint32_t>(slots.size());
    add_block();
    return size;
  }

  // A base at which all `wanted` have room.
  uint32_t base_for(const std::vector<uint8_t>& wanted) {
    if (wanted.size() == 1) return base_for(wanted[0]);
    const auto fits = [&](uint32_t base) {
      return may_be_base(base) && std::all_of(wanted.begin(), wanted.end(),
                                              [&](uint8_t label) { return is_free(base ^ label); });
    };
    const auto size = static_cast<uint32_t>(slots.size());
    for (uint32_t place = slots[0].previous_free;
         place != 0 && place + kSearchedBlocks * kBlock >= size;
         place = slots[place].previous_free) {
      if (fits(place ^ wanted[0])) return place ^ wanted[0];
    }
    add_block();
    return size;
  }

  // False if there are too many places.
  bool build() {
    add_block();
    is_base[0] = true;
    // Breadth first: a node comes before its children, and what is common is near the front.
    ranges.push_back({kRoot, 0, static_cast<uint32_t>(tokens.size()), kNone});
    std::vector<uint8_t> wanted;
    std::vector<uint32_t> starts;
    for (size_t i = 0; i < ranges.size(); ++i) {
      auto [node, begin, end, prefix] = ranges[i];
      const uint32_t depth = trie.depths_[node];
      if (node != kRoot) built.by_depth.push_back(node);
      Place* of_token = nullptr;
      if (begins[begin + 1] - begins[begin] == depth) {  // the shortest comes first
        const uint32_t token = tokens[begin];
        trie.tokens_[node] = token;
        of_token = &built.of_tokens[token];
        of_token->node = node;
        of_token->longest_prefix = prefix;
        prefix = token;
        if (++begin == end) continue;
      }
      const auto label_of = [&](uint32_t at) {
        return static_cast<uint8_t>(text[begins[at] + depth]);
      };
      if (begin + 1 == end) {  // as most of the way to the last bytes of long tokens
        const uint8_t label = label_of(begin);
        const uint32_t base = base_for(label);
        if (slots.size() > kMostPlaces) return false;
        slots[node].base = base;
        is_base[base] = true;
        take(base ^ label, node, label);
        ranges.push_back({base ^ label, begin, end, prefix});
        if (of_token) of_token->next_bytes = uint32_t{1} << (label & 31);
        continue;
      }
      wanted.clear();
      starts.clear();
      for (uint32_t at = begin; at < end; ++at) {
        const uint8_t label = label_of(at);
        if (!wanted.empty() && wanted.back() == label) continue;
        wanted.push_back(label);
        starts.push_back(at);
      }
      starts.push_back(end);
      const uint32_t base = base_for(wanted);
      if (slots.size() > kMostPlaces) return false;
      slots[node].base = base;
      is_base[base] = true;
      for (size_t k = 0; k < wanted.size(); ++k) {
        take(base ^ wanted[k], node, wanted[k]);
        ranges.push_back({base ^ wanted[k], starts[k], starts[k + 1], prefix});
        if (of_token) of_token->next_bytes |= uint32_t{1} << (wanted[k] & 31);
      }
    }
    finish();
    return true;
  }

  void finish() {
    trie.deepest_ = trie.depths_[built.by_depth.back()];
    const auto size = static_cast<uint32_t>(slots.size());
    trie.places_.resize(size);
    for (uint32_t place = 0; place < size; ++place) {
      // Another block in which every place is a base has a child for each, hence no free place.
      if (slots[place].parent == kNone) {
        while (is_base[place ^ labels[place]]) ++labels[place];
      }
      trie.places_[place] = slots[place].base << kBaseBit |
                            static_cast<uint32_t>(labels[place]) << kLabelBit |
                            (trie.tokens_[place] != kNone ? kHasToken : 0);
    }
    trie.fails_.assign(size, kRoot);
    for (const uint32_t node : built.by_depth) {
      const uint32_t parent = slots[node].parent;
      if (parent != kRoot) trie.fails_[node] = trie.step(trie.fails_[parent], labels[node]);
    }
  }

  Built& built;
  TokenTrie& trie;
  Table<uint32_t> tokens;
  // The tokens in order, one after the other: every level reads them from front to back.
  Table<char> text;
  Table<uint32_t> begins;
  Table<Slot> slots;
  uint32_t next_try = 0;  // a free place, or 0: the first
  Table<uint8_t> labels;
  std::vector<bool> is_base;
  Table<Range> ranges;
};

std::optional<TokenTrie::Built> TokenTrie::of(const Vocabulary& vocabulary) {
  Built built;
  Builder builder(vocabulary, built);
  if (!builder.build()) return std::nullopt;
  return built;
}

}  // namespace puna
