// Keys and values of all live sequences: a page table over tiers.
//
// Layers that attend in absolute chunks keep the current chunk only; its pages are dropped whole
// when the sequence steps over a multiple of the chunk length. Other layers ("global" ones) keep
// everything: full pages in their sealed form, and the last, unfinished one open. Pages are shared
// between forks; the open page is copied when one of the owners writes.
//
// Use: plan() says what an append needs and refuses what cannot be had, changing nothing; apply()
// makes the room; the forward pass announces with begin_pass() the layers it will read, in order,
// and reads and writes through view(); commit() moves the length on.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/kv_layout.h"
#include "kv/kv_tier.h"

namespace puna {

struct KvGeometry {
  KvPageLayout layout;          // of open pages
  std::vector<int64_t> chunk;   // per layer: length of its absolute chunks, 0 = global
  KvSeal seal = KvSeal::kNone;  // what full pages of global layers are sealed into

  KvSealedLayout sealed_layout() const { return {seal, layout.kv_heads, layout.head_dim}; }
  // Bytes that a page takes in memory.
  size_t open_bytes() const { return whole_blocks(layout.page_bytes()); }
  size_t sealed_bytes() const {
    return seal == KvSeal::kNone ? open_bytes() : sealed_layout().page_bytes();
  }
};

// One layer of one sequence, as AttentionSegment wants it. Valid until the next apply(), commit()
// or release().
struct KvView {
  int64_t first_position = 0;  // of token 0 of page 0
  std::span<void* const> sealed;
  KvStream* stream = nullptr;
  int64_t first_open = 0;
  std::span<void* const> open;
};

class KvStore {
 public:
  using Sequence = int64_t;
  struct Append {
    Sequence sequence;
    int64_t tokens;
  };
  struct Plan {
    std::vector<Append> appends;
    int64_t open_pages = 0, sealed_pages = 0;
    int64_t new_bytes = 0;  // by which the use of memory grows
  };

  // The store owns the tier.
  KvStore(KvGeometry geometry, std::unique_ptr<KvTier> tier);
  ~KvStore();
  KvStore(const KvStore&) = delete;
  KvStore& operator=(const KvStore&) = delete;

  const KvGeometry& geometry() const { return geometry_; }

  Sequence create();
  Sequence fork(Sequence source);  // shares every page
  void release(Sequence sequence);
  int64_t length(Sequence sequence) const;

  // How many tokens may be appended at once: up to the next multiple of the smallest chunk.
  int64_t room(Sequence sequence) const;
  // The longest length <= `length` that truncate() can restore exactly. Chunked layers cannot go
  // back into a chunk whose pages were dropped, so below the current chunk only its boundaries can
  // be reached (where those layers hold nothing). Where pages are sealed into fewer bits, the open
  // form of a sealed one is gone, so below the open page only page boundaries can be.
  int64_t restorable(Sequence sequence, int64_t length) const;
  void truncate(Sequence sequence, int64_t length);  // `length` must be restorable

  // Throws OutOfMemory, with the bytes asked and left, if the pages cannot be had.
  Plan plan(std::span<const Append> appends) const;
  void apply(const Plan& plan);
  // `layers`: those whose pages this forward pass will read, in that order.
  void begin_pass(std::span<const int64_t> layers);
  KvView view(Sequence sequence, int64_t layer) const;
  void commit(const Plan& plan);

  int64_t bytes_in_use() const;
  // The most bytes that one sequence takes while it grows to `tokens` tokens by passes of at most
  // `pass` tokens.
  int64_t bytes_for(int64_t tokens, int64_t pass = 1) const;

 private:
  struct Pages;
  struct Layer;
  struct State;
  struct Growth;
  State& state(Sequence sequence) const;
  Growth growth(const State& current, size_t layer, int64_t tokens) const;
  void keep(State& current, size_t layer, int64_t length) const;
  std::shared_ptr<void> new_page(size_t bytes);

  KvGeometry geometry_;
  std::unique_ptr<KvTier> tier_;
  std::map<Sequence, std::unique_ptr<State>> sequences_;
  Sequence next_ = 1;
};

}  // namespace puna
