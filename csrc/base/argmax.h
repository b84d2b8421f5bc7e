// The largest element of a row, by the one rule of all who choose a token by it.
#pragma once

#include <cstdint>
#include <span>

namespace puna {

// Its index: the lowest of equals (-0 equals 0), and a NaN counts as the smallest; 0 if there are
// only NaNs.
inline int32_t argmax(std::span<const float> x) {
  int32_t best = 0;
  for (int32_t i = 1; i < static_cast<int32_t>(x.size()); ++i)
    if (x[i] > x[best] || (x[best] != x[best] && x[i] == x[i])) best = i;
  return best;
}

}  // namespace puna
