// Keys and values of all live sequences: a page table over tiers.
//
// Layers that attend in absolute chunks keep the current chunk only; its pages are dropped whole
// when the sequence steps over a multiple of the chunk length. Other layers keep everything. Pages
// are shared between forks and copied when one of the owners writes.
//
// Use: plan() says what an append needs and refuses what cannot be had, changing nothing; apply()
// makes the room; the forward pass writes through view(); commit() moves the length on.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "backend/kv_layout.h"
#include "kv/kv_tier.h"

namespace puna {

struct KvGeometry {
  KvPageLayout layout;
  std::vector<int64_t>
      chunk;  // per layer: length of its absolute chunks, 0 = attends to everything
};

struct KvView {
  int64_t first_position = 0;    // of token 0 of pages[0]
  std::span<void* const> pages;  // valid until the next apply() or release()
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
    int64_t new_pages = 0;
  };

  // The store owns the tier.
  KvStore(KvGeometry geometry, std::unique_ptr<KvTier> tier);
  ~KvStore();
  KvStore(const KvStore&) = delete;
  KvStore& operator=(const KvStore&) = delete;

  const KvPageLayout& layout() const { return geometry_.layout; }

  Sequence create();
  Sequence fork(Sequence source);  // shares every page
  void release(Sequence sequence);
  int64_t length(Sequence sequence) const;

  // How many tokens may be appended at once: up to the next multiple of the smallest chunk.
  int64_t room(Sequence sequence) const;
  // The longest length <= `length` that truncate() can restore: chunked layers cannot go back into
  // a chunk whose pages were dropped, so below the current chunk only its boundaries can be reached
  // (where those layers hold nothing).
  int64_t restorable(Sequence sequence, int64_t length) const;
  void truncate(Sequence sequence, int64_t length);  // `length` must be restorable

  // Throws OutOfMemory, with the bytes asked and left, if the pages cannot be had.
  Plan plan(std::span<const Append> appends) const;
  void apply(const Plan& plan);
  KvView view(Sequence sequence, int64_t layer) const;
  void commit(const Plan& plan);

  size_t bytes_in_use() const;
  // Bytes that one sequence of `tokens` tokens needs.
  size_t bytes_for(int64_t tokens) const;

 private:
  struct Layer;
  struct State;
  State& state(Sequence sequence) const;

  KvGeometry geometry_;
  std::unique_ptr<KvTier> tier_;
  std::map<Sequence, std::unique_ptr<State>> sequences_;
  Sequence next_ = 1;
};

}  // namespace puna
