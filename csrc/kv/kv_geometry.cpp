#include "kv/kv_geometry.h"

#include <algorithm>
#include <numeric>

namespace puna {
namespace {

// Where no layer has chunks: those of Llama 4.
constexpr int64_t kUsualUnit = 8192;
// Chunk lengths whose common multiple lies beyond have no useful points in common.
constexpr int64_t kLongestUnit = int64_t{1} << 24;

}  // namespace

int64_t KvGeometry::unit() const {
  const bool chunked = std::any_of(chunk.begin(), chunk.end(), [](int64_t c) { return c > 0; });
  int64_t unit = chunked ? kPageTokens : kUsualUnit;
  for (const int64_t length : chunk) {
    if (length == 0) continue;
    if (length > kLongestUnit) return 0;
    unit = std::lcm(unit, length);
    if (unit > kLongestUnit) return 0;
  }
  return unit;
}

}  // namespace puna
