// What the pages of a model look like, layer by layer.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/kv_layout.h"
#include "kv/kv_tier.h"

namespace puna {

struct KvGeometry {
  KvPageLayout layout;          // of open pages
  std::vector<int64_t> chunk;   // per layer: length of its absolute chunks, 0 = global
  KvSeal seal = KvSeal::kNone;  // what full pages of global layers are sealed into

  bool global(size_t layer) const { return chunk[layer] == 0; }
  KvSealedLayout sealed_layout() const { return {seal, layout.kv_heads, layout.head_dim}; }
  // Bytes that a page takes.
  size_t open_bytes() const { return whole_blocks(layout.page_bytes()); }
  size_t sealed_bytes() const {
    return seal == KvSeal::kNone ? open_bytes() : sealed_layout().page_bytes();
  }
  // Tokens from one point of persistence to the next: where every chunked layer is empty and every
  // page full. 0 if there is none within reach.
  int64_t unit() const;
};

}  // namespace puna
