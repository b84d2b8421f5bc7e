// Stop strings as an automaton of Aho and Corasick over bytes.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace puna {

// A node is the longest end of the text so far with which a stop string begins. Node 0: none.
class StopAutomaton {
 public:
  // Throws InvalidRequest for an empty stop string.
  explicit StopAutomaton(std::vector<std::string> stops);

  bool empty() const { return stops_.empty(); }
  uint32_t step(uint32_t node, uint8_t byte) const;
  // The text that a node stands for.
  std::string_view text(uint32_t node) const {
    if (node == 0) return {};
    return std::string_view(stops_[nodes_[node].through]).substr(0, nodes_[node].length);
  }
  bool may_grow(uint32_t node) const { return !nodes_[node].children.empty(); }
  // The longest stop string with which a node's text ends, or -1.
  int32_t stop_at(uint32_t node) const { return nodes_[node].stop; }
  const std::string& stop(int32_t index) const { return stops_[static_cast<size_t>(index)]; }

 private:
  struct Node {
    uint32_t through = 0;  // a stop string that begins with its text
    uint32_t length = 0;   // of its text
    std::map<uint8_t, uint32_t> children;
    uint32_t fail = 0;
    int32_t stop = -1;
  };
  uint32_t child(uint32_t node, uint8_t byte) const;

  std::vector<std::string> stops_;
  std::vector<Node> nodes_;
};

}  // namespace puna
