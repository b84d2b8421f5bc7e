// Names for prefixes of token sequences: a hash over the model, the format of the pages, and every
// token and picture so far. Equal names mean equal keys and values.
#pragma once

#include <cstdint>
#include <span>

#include "base/sha256.h"
#include "kv/kv_geometry.h"

namespace puna {

// Rows that stand for a picture, or for a part of one: its features are told apart by `key`.
struct KvImageRun {
  int64_t position = 0, rows = 0;
  uint64_t key = 0;
  // Whether it is a picture's first part, also where the same picture comes before it. No part of
  // names.
  bool begins = false;
  bool operator==(const KvImageRun&) const = default;
};

// The text of a sequence, or what of it is asked for.
struct KvText {
  std::span<const int32_t> tokens;     // from position `first` on
  std::span<const KvImageRun> images;  // ascending, not overlapping
  int64_t first = 0;
  // Not 0: keys and values that do not follow from the text alone; no other text's number.
  uint64_t salt = 0;

  int64_t end() const { return first + static_cast<int64_t>(tokens.size()); }
  // The tokens [from, to). Throws Error(kInternal) if they are not all there.
  std::span<const int32_t> part(int64_t from, int64_t to) const;
};

// What must agree between pages and whoever reads them.
struct KvIdentity {
  Digest model{};  // of all that keys and values are computed from: weights, configuration
  KvGeometry geometry;
  // The name of the empty prefix.
  Digest root() const;
};

// The name of a prefix that goes on from one named `parent` by the rows [begin, end).
Digest chain_hash(const Digest& parent, const KvText& text, int64_t begin, int64_t end);

}  // namespace puna
