// 4-bit codes that index llama.cpp's table of 16 unevenly spaced values, denser where weights are:
// with one fp16 scale per group (GGUF's IQ4_NL has groups of 32), or in blocks of 256 with integer
// scales per 32 (IQ4_XS).
#pragma once

#include "quant/traits.h"

namespace puna {

template <int64_t Group>
struct Table4 : FormatTraits {
  static constexpr int kBits = 4, kZero = 128;
  static constexpr bool kTable = true;
  static constexpr int64_t kGroup = Group, kBlock = Group;
};
using Table4G32 = Table4<32>;
using Table4G64 = Table4<64>;
using Table4G128 = Table4<128>;

struct Table4K : FormatTraits {
  static constexpr int kBits = 4, kZero = 128, kSubBits = 6;
  static constexpr bool kTable = true;
  static constexpr int64_t kGroup = 32, kBlock = 256;
};

}  // namespace puna
