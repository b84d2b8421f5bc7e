#include "backend/cpu/attention_leaf.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace puna {

LeafState LeafState::take(Carver& carver, int64_t rows, int64_t head_dim) {
  LeafState leaf;
  leaf.m = carver.take<float>(rows);
  leaf.l = carver.take<float>(rows);
  leaf.o = carver.take<float>(rows * head_dim);
  return leaf;
}

int64_t LeafState::bytes(int64_t rows, int64_t head_dim) {
  Carver size(nullptr);
  take(size, rows, head_dim);
  return size.used();
}

void LeafState::clear(int64_t rows, int64_t head_dim) const {
  std::fill_n(m, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(l, rows, 0.0f);
  std::fill_n(o, rows * head_dim, 0.0f);
}

void RunningRow::clear(int64_t head_dim) {
  m = -std::numeric_limits<float>::infinity();
  l = 0;
  std::fill_n(o, head_dim, 0.0f);
}

void RunningRow::merge(const LeafState& leaf, int64_t row, int64_t head_dim, float shift) {
  if (leaf.l[row] == 0) return;  // the row sees nothing of this leaf
  const float leaf_m = leaf.m[row] + shift;
  const float top = std::max(m, leaf_m);
  const double old_factor = std::exp(static_cast<double>(m) - top);
  const double new_factor = std::exp(static_cast<double>(leaf_m) - top);
  m = top;
  l = l * old_factor + leaf.l[row] * new_factor;
  const float* x = leaf.o + row * head_dim;
  const auto a = static_cast<float>(old_factor), b = static_cast<float>(new_factor);
  for (int64_t c = 0; c < head_dim; ++c) o[c] = o[c] * a + x[c] * b;
}

void RunningRow::finish(int64_t head_dim) {
  const double inverse = 1.0 / l;
  for (int64_t c = 0; c < head_dim; ++c) o[c] = static_cast<float>(o[c] * inverse);
}

LaneScratch::LaneScratch(char* memory, int64_t rows, int64_t head_dim) {
  static_assert(kSealedScratch >= kSealedTokens * static_cast<int64_t>(sizeof(float)));
  Carver carver(memory);
  q = carver.take<float>(rows * head_dim);
  visible = carver.take<int32_t>(rows);
  scores = reinterpret_cast<float*>(carver.take<char>(rows * kSealedScratch));
  leaf = LeafState::take(carver, rows, head_dim);
  used = carver.used();
}

}  // namespace puna
