// The reduction of attention.
//
// Tokens are counted from the first one a layer still holds. The 8 pages (2048 tokens) from a
// multiple of 2048 on form a leaf: the kernels walk them in order from a fresh state (m, l, o), all
// fp32. Leaves are merged in order into the row's running state (m fp32, l fp64, o fp32):
//   m' = max(m, m_leaf); l' = l * exp(m - m') + l_leaf * exp(m_leaf - m'); o' likewise;
//   out = o / l.
// A single running fp32 sum over millions of tokens would stop growing; sums of 2048 and their fp64
// total do not. What is added to what depends on positions only: not on lanes, on the query rows
// beside, on where pages lie, or on the cuts of the prompt.
#pragma once

#include <cstdint>

#include "backend/carver.h"
#include "kernels/kernel_table.h"

namespace puna {

// Query rows (of all heads in a group) handled together, so that a page is read once for all of
// them; their states and scores stay in L2.
constexpr int64_t kTaskRows = 160;

// A leaf's softmax state of some rows.
struct LeafState {
  float* m;  // [rows]
  float* l;  // [rows]
  float* o;  // [rows][head_dim]

  static LeafState take(Carver& carver, int64_t rows, int64_t head_dim);
  static int64_t bytes(int64_t rows, int64_t head_dim);
  void clear(int64_t rows, int64_t head_dim) const;
};

// The running state of one row; o is where the output will be.
struct RunningRow {
  float& m;
  double& l;
  float* o;

  void clear(int64_t head_dim);
  // `shift`: log of how many times the leaf counts.
  void merge(const LeafState& leaf, int64_t row, int64_t head_dim, float shift = 0);
  void finish(int64_t head_dim);
};

// What a lane needs for `rows` query rows.
struct LaneScratch {
  LaneScratch(char* memory, int64_t rows, int64_t head_dim);
  static int64_t bytes(int64_t rows, int64_t head_dim) {
    return LaneScratch(nullptr, rows, head_dim).used;
  }

  int64_t used;
  float* q;          // [rows][head_dim], scaled
  int32_t* visible;  // [rows]: tokens that the row sees of the page at hand
  float* scores;     // of a page; also the scratch of sealed ones
  LeafState leaf;
};

}  // namespace puna
