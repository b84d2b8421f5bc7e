#include "text/token_trie.h"

#include <algorithm>
#include <array>

namespace puna {

namespace {

constexpr uint32_t kBlock = 256;  // children of one node lie within one block
// Nodes with several children look for room in this many blocks before the last.
constexpr uint32_t kSearchedBlocks = 8;

// Ids in the order of their bytes.
std::vector<uint32_t> sorted_tokens(const Vocabulary& vocabulary) {
  struct Entry {
    uint64_t start;  // the first eight bytes, big-endian
    uint32_t token;
  };
  std::vector<Entry> entries, moved;
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
  std::vector<uint32_t> tokens(entries.size());
  std::transform(entries.begin(), entries.end(), tokens.begin(),
                 [](const Entry& entry) { return entry.token; });
  return tokens;
}

}  // namespace

struct TokenTrie::Builder {
  const Vocabulary& vocabulary;
  TokenTrie& trie;
  std::vector<uint32_t> tokens;
  std::vector<uint32_t> bases = {}, parents = {};  // by place; kNone: a free place
  std::vector<uint8_t> labels = {};
  std::vector<bool> is_base = {};
  // The free places as a ring in ascending order; 0 stands for its head.
  std::vector<uint32_t> next_free = {}, previous_free = {};

  // Of the tokens in order, one after the other: every level reads them from front to back.
  ByteStrings sorted = {};

  std::string_view bytes_of(size_t i) const { return sorted[i]; }

  void add_block() {
    const auto begin = static_cast<uint32_t>(parents.size());
    const size_t size = begin + kBlock;
    bases.resize(size);
    parents.resize(size, kNone);
    labels.resize(size);
    is_base.resize(size);
    trie.tokens_.resize(size, kNone);
    trie.depths_.resize(size);
    next_free.resize(size);
    previous_free.resize(size);
    for (uint32_t place = std::max(begin, 1u); place < size; ++place) {
      const uint32_t last = previous_free[0];
      next_free[last] = place;
      previous_free[place] = last;
      next_free[place] = 0;
      previous_free[0] = place;
    }
  }

  // 0 says that there are no children; 1 is nobody's, for the free places of the first block.
  bool may_be_base(uint32_t place) const { return place > 1 && !is_base[place]; }
  bool is_free(uint32_t place) const { return place != kRoot && parents[place] == kNone; }

  void take(uint32_t place, uint32_t parent, uint8_t label) {
    next_free[previous_free[place]] = next_free[place];
    previous_free[next_free[place]] = previous_free[place];
    parents[place] = parent;
    labels[place] = label;
    trie.depths_[place] = static_cast<uint16_t>(trie.depths_[parent] + 1);
  }

  // A base at which all `wanted` have room.
  uint32_t base_for(const std::vector<uint8_t>& wanted) {
    const auto fits = [&](uint32_t base) {
      return may_be_base(base) && std::all_of(wanted.begin(), wanted.end(),
                                              [&](uint8_t label) { return is_free(base ^ label); });
    };
    const auto size = static_cast<uint32_t>(parents.size());
    if (wanted.size() == 1) {
      for (uint32_t place = next_free[0]; place != 0; place = next_free[place]) {
        if (may_be_base(place ^ wanted[0])) return place ^ wanted[0];
      }
    } else {
      for (uint32_t place = previous_free[0];
           place != 0 && place + kSearchedBlocks * kBlock >= size; place = previous_free[place]) {
        if (fits(place ^ wanted[0])) return place ^ wanted[0];
      }
    }
    add_block();
    return size;
  }

  // Tokens [begin, end) share the bytes of `node`; `prefix` is the longest token among the nodes
  // above it.
  struct Range {
    uint32_t node, begin, end, prefix;
  };

  // False if there are too many places.
  bool build() {
    for (const uint32_t token : tokens) sorted.add(vocabulary.ordinary(token));
    add_block();
    is_base[0] = true;
    // Breadth first: a node comes before its children, and what is common is near the front.
    std::vector<Range> ranges = {{kRoot, 0, static_cast<uint32_t>(tokens.size()), kNone}};
    std::vector<uint8_t> wanted;
    std::vector<uint32_t> starts;
    for (size_t i = 0; i < ranges.size(); ++i) {
      auto [node, begin, end, prefix] = ranges[i];
      const uint32_t depth = trie.depths_[node];
      if (node != kRoot) trie.by_depth_.push_back(node);
      if (bytes_of(begin).size() == depth) {  // the shortest comes first
        const uint32_t token = tokens[begin];
        trie.tokens_[node] = token;
        trie.node_of_[token] = node;
        trie.longest_prefix_[token] = prefix;
        prefix = token;
        if (++begin == end) continue;
      }
      wanted.clear();
      starts.clear();
      for (uint32_t at = begin; at < end; ++at) {
        const auto label = static_cast<uint8_t>(bytes_of(at)[depth]);
        if (!wanted.empty() && wanted.back() == label) continue;
        wanted.push_back(label);
        starts.push_back(at);
      }
      starts.push_back(end);
      const uint32_t base = base_for(wanted);
      if (parents.size() > kMostPlaces) return false;
      bases[node] = base;
      is_base[base] = true;
      for (size_t k = 0; k < wanted.size(); ++k) {
        take(base ^ wanted[k], node, wanted[k]);
        ranges.push_back({base ^ wanted[k], starts[k], starts[k + 1], prefix});
      }
    }
    finish();
    return true;
  }

  void finish() {
    const auto size = static_cast<uint32_t>(parents.size());
    trie.places_.resize(size);
    for (uint32_t place = 0; place < size; ++place) {
      // Another block in which every place is a base has a child for each, hence no free place.
      if (parents[place] == kNone) {
        while (is_base[place ^ labels[place]]) ++labels[place];
      }
      trie.places_[place] = bases[place] << kBaseBit |
                            static_cast<uint32_t>(labels[place]) << kLabelBit |
                            (trie.tokens_[place] != kNone ? kHasToken : 0);
    }
    trie.fails_.assign(size, kRoot);
    for (const uint32_t node : trie.by_depth_) {
      const uint32_t parent = parents[node];
      if (parent != kRoot) trie.fails_[node] = trie.step(trie.fails_[parent], labels[node]);
    }
  }
};

std::optional<TokenTrie> TokenTrie::of(const Vocabulary& vocabulary) {
  TokenTrie trie;
  trie.node_of_.assign(vocabulary.size(), kNone);
  trie.longest_prefix_.assign(vocabulary.size(), kNone);
  Builder builder{vocabulary, trie, sorted_tokens(vocabulary)};
  if (!builder.build()) return std::nullopt;
  return trie;
}

}  // namespace puna
