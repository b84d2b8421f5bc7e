// 4-bit codes that index llama.cpp's table of 16 unevenly spaced values: GGUF's IQ4_NL (fp16 scale
// per 32) and IQ4_XS (blocks of 256 with integer scales per 32).
#pragma once

#include "quant/traits.h"

namespace puna {

struct Table4 : FormatTraits {
  static constexpr int kBits = 4, kZero = 128;
  static constexpr bool kTable = true;
  static constexpr int64_t kGroup = 32, kBlock = 32;
};
struct Table4K : FormatTraits {
  static constexpr int kBits = 4, kZero = 128;
  static constexpr bool kTable = true, kSubScales = true;  // signed, -32 to 31
  static constexpr int64_t kGroup = 32, kBlock = 256;
};

}  // namespace puna
