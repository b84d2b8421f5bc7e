// llama.cpp's K-quants: blocks of 256 columns with fp16 factors, whose groups have integer scales
// (and minima) of their own. Q2_K, Q3_K, Q4_K, Q5_K and Q6_K without loss.
#pragma once

#include "quant/traits.h"

namespace puna {

struct Int2K : FormatTraits {
  static constexpr int kBits = 2, kSubBits = 4;
  static constexpr bool kOffset = true;
  static constexpr int64_t kGroup = 16, kBlock = 256;
};
struct Int3K : FormatTraits {
  static constexpr int kBits = 3, kZero = 4, kSubBits = 6;
  static constexpr int64_t kGroup = 16, kBlock = 256;
};
struct Int4K : FormatTraits {
  static constexpr int kBits = 4, kSubBits = 6;
  static constexpr bool kOffset = true;
  static constexpr int64_t kGroup = 32, kBlock = 256;
};
struct Int5K : FormatTraits {
  static constexpr int kBits = 5, kSubBits = 6;
  static constexpr bool kOffset = true;
  static constexpr int64_t kGroup = 32, kBlock = 256;
};
struct Int6K : FormatTraits {
  static constexpr int kBits = 6, kZero = 32, kSubBits = 8;
  static constexpr int64_t kGroup = 16, kBlock = 256;
};

}  // namespace puna
