#include "text/stop_automaton.h"

#include "base/error.h"

namespace puna {

StopAutomaton::StopAutomaton(std::vector<std::string> stops) : stops_(std::move(stops)), nodes_(1) {
  for (size_t i = 0; i < stops_.size(); ++i) {
    if (stops_[i].empty())
      fail(ErrorCode::kInvalidRequest, "[stop] a stop string is empty; leave it out");
    uint32_t node = 0;
    for (const char c : stops_[i]) {
      const auto byte = static_cast<uint8_t>(c);
      if (child(node, byte) == 0) {
        const auto added = static_cast<uint32_t>(nodes_.size());
        nodes_[node].children[byte] = added;
        nodes_.push_back({static_cast<uint32_t>(i), nodes_[node].length + 1, {}, 0, -1});
      }
      node = child(node, byte);
    }
    nodes_[node].stop = static_cast<int32_t>(i);
  }
  // Breadth first: a node's shorter end has its own links by then.
  std::vector<uint32_t> queue = {0};
  for (size_t i = 0; i < queue.size(); ++i) {
    const uint32_t node = queue[i];
    for (const auto& [byte, next] : nodes_[node].children) {
      nodes_[next].fail = node == 0 ? 0 : step(nodes_[node].fail, byte);
      if (nodes_[next].stop < 0) nodes_[next].stop = nodes_[nodes_[next].fail].stop;
      queue.push_back(next);
    }
  }
}

uint32_t StopAutomaton::child(uint32_t node, uint8_t byte) const {
  const auto found = nodes_[node].children.find(byte);
  return found == nodes_[node].children.end() ? 0 : found->second;
}

uint32_t StopAutomaton::step(uint32_t node, uint8_t byte) const {
  for (;;) {
    const uint32_t next = child(node, byte);
    if (next != 0 || node == 0) return next;
    node = nodes_[node].fail;
  }
}

}  // namespace puna
