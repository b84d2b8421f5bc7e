// 8-bit codes in groups of 32 with one fp16 scale (GGUF's Q8_0).
#pragma once

#include "quant/traits.h"

namespace puna {

struct Int8G32 : FormatTraits {
  static constexpr int kBits = 8, kZero = 128;
  static constexpr int64_t kGroup = 32, kBlock = 32;
};

}  // namespace puna
