#include "backend/routing.h"

#include <algorithm>
#include <cmath>

namespace puna {
namespace {

// Whether logit `a` goes before `b`. Equal ones keep their order.
bool before(float a, float b) { return a > b || (std::isnan(b) && !std::isnan(a)); }

float sigmoid(float x) {
  return static_cast<float>(1.0 / (1.0 + std::exp(-static_cast<double>(x))));
}

}  // namespace

void Routing::reserve(int64_t rows, int64_t experts, int64_t top_k) {
  const auto slots = static_cast<size_t>(rows * top_k);
  row.resize(slots);
  score.resize(slots);
  chosen_.resize(slots);
  offset.resize(static_cast<size_t>(experts) + 1);
  next_.resize(static_cast<size_t>(experts));
  occupied.reserve(static_cast<size_t>(experts));
}

void Routing::adopt(std::span<const int32_t> rows, std::span<const float> scores,
                    std::span<const int32_t> offsets) {
  row.assign(rows.begin(), rows.end());
  score.assign(scores.begin(), scores.end());
  offset.assign(offsets.begin(), offsets.end());
  occupied.clear();
  for (size_t e = 0; e + 1 < offset.size(); ++e)
    if (offset[e + 1] > offset[e]) occupied.push_back(static_cast<int64_t>(e));
}

void Routing::assign(const float* logits, int64_t rows, int64_t experts, int64_t top_k) {
  std::fill(offset.begin(), offset.end(), 0);
  for (int64_t r = 0; r < rows; ++r) {
    const float* x = logits + r * experts;
    int64_t* best = chosen_.data() + r * top_k;  // descending, by insertion
    int64_t count = 0;
    for (int64_t e = 0; e < experts; ++e) {
      int64_t place = count;
      while (place > 0 && before(x[e], x[best[place - 1]])) --place;
      if (place == top_k) continue;
      count = std::min(count + 1, top_k);
      std::copy_backward(best + place, best + count - 1, best + count);
      best[place] = e;
    }
    for (int64_t i = 0; i < top_k; ++i) ++offset[best[i] + 1];
  }
  occupied.clear();
  for (int64_t e = 0; e < experts; ++e) {
    if (offset[e + 1] > 0) occupied.push_back(e);
    offset[e + 1] += offset[e];
    next_[e] = offset[e];
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < top_k; ++i) {
      const int64_t e = chosen_[r * top_k + i], slot = next_[e]++;
      row[slot] = r;
      score[slot] = sigmoid(logits[r * experts + e]);
    }
}

}  // namespace puna
