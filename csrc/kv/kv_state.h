// What KvStore knows of a sequence; for its own files alone.
#pragma once

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "kv/kv_store.h"
#include "kv/tiered_stream.h"

namespace puna {

// Pages in order. Forks share a page through its owner; the last owner gives it back to the tier.
struct KvStore::Pages {
  std::vector<void*> table;
  std::vector<Page> owners;  // of table[i]

  int64_t count() const { return static_cast<int64_t>(table.size()); }
  void push(Page page) {
    table.push_back(page.get());
    owners.push_back(std::move(page));
  }
  void replace(int64_t index, Page page) {
    table[index] = page.get();
    owners[index] = std::move(page);
  }
  // Forgets the pages from `count` on.
  void keep(int64_t count) {
    if (count >= this->count()) return;
    table.resize(static_cast<size_t>(count));
    owners.resize(static_cast<size_t>(count));
  }
  void drop_front(int64_t count) {
    table.erase(table.begin(), table.begin() + count);
    owners.erase(owners.begin(), owners.begin() + count);
  }
};

// The pages of one layer of one sequence. Between passes a global layer has its full pages sealed
// and one open page, if the last is not full; a chunked layer has open pages only, from the start
// of its chunk. apply() adds pages to both lists: open ones for the rows of the pass, sealed ones
// for the open ones that it will fill.
struct KvStore::Layer {
  int64_t first_position = 0;
  // All sealed pages; those of chunks, which own them, null where they are in a file alone.
  std::vector<void*> sealed;
  std::vector<Page> tail;  // owners of the sealed pages after the chunks
  // Of a pass that may leave pages out: of sealed pages in files alone, where they are known.
  std::vector<const void*> key_scales;
  Pages open;

  int64_t sealed_count() const { return static_cast<int64_t>(sealed.size()); }
  int64_t chunk_pages() const { return sealed_count() - static_cast<int64_t>(tail.size()); }
  void push_sealed(Page page) {
    sealed.push_back(page.get());
    tail.push_back(std::move(page));
  }
  // Forgets the sealed pages from `count` on, which lie after the chunks.
  void keep_sealed(int64_t count) {
    if (count >= sealed_count()) return;
    tail.resize(static_cast<size_t>(count - chunk_pages()));
    sealed.resize(static_cast<size_t>(count));
  }
};

struct KvStore::State {
  int64_t length = 0;
  std::vector<std::shared_ptr<KvChunk>> chunks;
  std::vector<Layer> layers;
  std::shared_ptr<SessionDirectory> session;  // that its chunks are told to
};

// What a layer needs for an append.
struct KvStore::Growth {
  int64_t sealed = 0, open = 0;   // pages beyond those of the tokens held
  int64_t left_over = 0;          // bytes of pages of a pass not committed
  const Page* at_hand = nullptr;  // the open page that will be written on, if any
};

// A chunk's pages of one layer that are read, of which something stays in memory.
struct KvStore::Kept {
  std::shared_ptr<KvChunk> chunk;
  size_t global = 0;                 // of KvChunk::pages
  std::optional<size_t> plan = {};   // of the reader, if they come from the file;
  size_t part = 0;                   // the part of that plan
  size_t stream = 0;                 // of streams_
  std::vector<Page> on_device = {};  // where they stay, if that is the device's memory
};

// Pages that a layer of some sequences reads in a pass, and are not where attention reads them.
struct KvStore::PassStream {
  std::optional<size_t> plan;            // of the reader
  std::unique_ptr<TieredStream> tiered;  // if there is a tier of the host's memory
};

}  // namespace puna
