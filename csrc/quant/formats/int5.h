// 5-bit codes in groups of 32 with one fp16 scale: symmetric (GGUF's Q5_0), or with a minimum
// (Q5_1).
#pragma once

#include "quant/traits.h"

namespace puna {

struct Int5G32 : FormatTraits {
  static constexpr int kBits = 5, kZero = 16;
  static constexpr int64_t kGroup = 32, kBlock = 32;
};
struct Int5MinG32 : FormatTraits {
  static constexpr int kBits = 5;
  static constexpr bool kOffset = true;
  static constexpr int64_t kGroup = 32, kBlock = 32;
};

}  // namespace puna
