// A chunk of the cache: one unit of tokens of one prefix, the sealed pages of all global layers.
// Its pages are in memory, in a file, or both; sequences that share the prefix share the chunk.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kv/page_file.h"
#include "platform/file_system.h"

namespace puna {

// The file of a chunk, whole and durable.
struct ChunkFile {
  std::string path;
  PageFileHeader header;
  FileFacts facts;  // as it was written; another file under its name is not read
  // A read of it has failed.
  mutable std::atomic<bool> unreadable{false};
};

struct KvChunk {
  int64_t index = 0;        // of the unit
  bool named = false;       // the text is known
  Digest parent{}, name{};  // names of the prefixes up to its begin and end
  // pages[g]: of the g-th global layer, in order; empty if they are in the file alone.
  std::vector<std::vector<std::shared_ptr<void>>> pages;
  // By global layer: whether its pages are in the host's memory, while attention reads a device's.
  std::vector<uint8_t> offloaded;
  // Of the g-th global layer, where they are known while its pages are in the file alone: the
  // scales and zero points of the pages' keys (AttentionSegment::key_scales), one after another.
  std::vector<std::shared_ptr<void>> key_scales;
  std::shared_ptr<const ChunkFile> file;     // null until durable
  int writing = 0;                           // jobs of the writer that need its pages
  std::shared_ptr<const ChunkFile> written;  // the same, for the writer's thread alone

  // Whether attention reads the layer's pages where they are.
  bool in_reach(size_t g) const { return !pages[g].empty() && offloaded[g] == 0; }
  // Whether it reads every page where it is; whether any page is in memory.
  bool resident() const {
    for (size_t g = 0; g < pages.size(); ++g)
      if (!in_reach(g)) return false;
    return true;
  }
  // Whether pages are nowhere but in a file that could not be read.
  bool is_lost() const {
    if (!file || !file->unreadable) return false;
    for (const auto& layer : pages)
      if (layer.empty()) return true;
    return false;
  }
  bool holds_memory() const {
    for (const auto& layer : pages)
      if (!layer.empty()) return true;
    return false;
  }
};

}  // namespace puna
