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
  // The free places as a ring in ascending order; 0 stands for its head.
  std::vector<uint32_t> next_free, previous_free;

  // Of the tokens in order, one after the other: every level reads them from front to back.
  ByteStrings sorted;

  std::string_view bytes_of(size_t i) const { return sorted[i]; }

  void add_block() {
    const auto begin = static_cast<uint32_t>(trie.nodes_.size());
    trie.nodes_.resize(begin + kBlock);
    trie.depths_.resize(begin + kBlock);
    next_free.resize(begin + kBlock);
    previous_free.resize(begin + kBlock);
    for (uint32_t place = std::max(begin, 1u); place < begin + kBlock; ++place) {
      const uint32_t last = previous_free[0];
      next_free[last] = place;
      previous_free[place] = last;
      next_free[place] = 0;
      previous_free[0] = place;
    }
  }

  bool is_free(uint32_t place) const { return place != 0 && trie.nodes_[place].parent == kNone; }

  void take(uint32_t place, uint32_t parent) {
    next_free[previous_free[place]] = next_free[place];
    previous_free[next_free[place]] = previous_free[place];
    trie.nodes_[place].parent = parent;
    trie.depths_[place] = static_cast<uint16_t>(trie.depths_[parent] + 1);
  }

  // A base at which all `labels` have room.
  uint32_t base_for(const std::vector<uint8_t>& labels) {
    const auto fits = [&](uint32_t base) {
      return base != 0 && std::all_of(labels.begin(), labels.end(),
                                      [&](uint8_t label) { return is_free(base ^ label); });
    };
    const auto size = static_cast<uint32_t>(trie.nodes_.size());
    if (labels.size() == 1) {
      // Any free place will do; a base of 0 would say that there are no children.
      for (uint32_t place = next_free[0]; place != 0; place = next_free[place]) {
        if (place != labels[0]) return place ^ labels[0];
      }
    } else {
      for (uint32_t place = previous_free[0];
           place != 0 && place + kSearchedBlocks * kBlock >= size; place = previous_free[place]) {
        if (fits(place ^ labels[0])) return place ^ labels[0];
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

  void build() {
    for (const uint32_t token : tokens) sorted.add(vocabulary.ordinary(token));
    add_block();
    trie.nodes_[0].parent = kNone - 1;  // taken, and nobody's child
    // Breadth first: a node comes before its children, and what is common is near the front.
    std::vector<Range> ranges = {{kRoot, 0, static_cast<uint32_t>(tokens.size()), kNone}};
    std::vector<uint8_t> labels;
    std::vector<uint32_t> starts;
    for (size_t i = 0; i < ranges.size(); ++i) {
      auto [node, begin, end, prefix] = ranges[i];
      const uint32_t depth = trie.depths_[node];
      if (node != kRoot) trie.by_depth_.push_back(node);
      if (bytes_of(begin).size() == depth) {  // the shortest comes first
        const uint32_t token = tokens[begin];
        trie.nodes_[node].token = token;
        trie.node_of_[token] = node;
        trie.longest_prefix_[token] = prefix;
        prefix = token;
        if (++begin == end) continue;
      }
      labels.clear();
      starts.clear();
      for (uint32_t at = begin; at < end; ++at) {
        const auto label = static_cast<uint8_t>(bytes_of(at)[depth]);
        if (!labels.empty() && labels.back() == label) continue;
        labels.push_back(label);
        starts.push_back(at);
      }
      starts.push_back(end);
      const uint32_t base = base_for(labels);
      trie.nodes_[node].base = base;
      for (size_t k = 0; k < labels.size(); ++k) {
        take(base ^ labels[k], node);
        ranges.push_back({base ^ labels[k], starts[k], starts[k + 1], prefix});
      }
    }
  }
};

TokenTrie::TokenTrie(const Vocabulary& vocabulary) {
  node_of_.assign(vocabulary.size(), kNone);
  longest_prefix_.assign(vocabulary.size(), kNone);
  Builder builder{vocabulary, *this, sorted_tokens(vocabulary), {}, {}, {}};
  builder.build();
  link();
}

void TokenTrie::link() {
  for (const uint32_t node : by_depth_) {
    const uint32_t parent = nodes_[node].parent;
    const auto byte = static_cast<uint8_t>(node ^ nodes_[parent].base);
    nodes_[node].fail = parent == kRoot ? kRoot : step(nodes_[parent].fail, byte);
  }
}

}  // namespace puna
