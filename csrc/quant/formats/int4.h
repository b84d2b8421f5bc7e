// 4-bit codes with one fp16 scale per group: symmetric (GGUF's Q4_0 has groups of 32), or with a
// minimum (Q4_1).
#pragma once

#include "quant/traits.h"

namespace puna {

template <int64_t Group>
struct Int4 : FormatTraits {
  static constexpr int kBits = 4, kZero = 8;
  static constexpr int64_t kGroup = Group, kBlock = Group;
};
using Int4G32 = Int4<32>;
using Int4G64 = Int4<64>;
using Int4G128 = Int4<128>;

template <int64_t Group>
struct Int4Min : FormatTraits {
  static constexpr int kBits = 4;
  static constexpr bool kOffset = true;
  static constexpr int64_t kGroup = Group, kBlock = Group;
};
using Int4MinG32 = Int4Min<32>;
using Int4MinG64 = Int4Min<64>;
using Int4MinG128 = Int4Min<128>;

}  // namespace puna
