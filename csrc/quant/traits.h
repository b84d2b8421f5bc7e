// What distinguishes one quantised format from another. A format is a struct derived from
// FormatTraits (formats/<name>.h) and a line in formats.inc.
//
// A weight of column c is   scale(g) * (value(code) - kZero) + offset(g),   g = c / kGroup, where
//   value(code)   the code itself, or kTable16[code] if kTable
//   scale(g)      an fp16 per group; with kSubBits an fp16 per block times a whole number per group
//   offset(g)     0 unless kOffset; an fp16 per group; with kSubBits an fp16 per block times a
//                 whole number per group
// and these whole numbers have kSubBits bits, with kOffset without sign, else with one.
// Freestanding: also compiled by the kernels' translation units.
#pragma once

#include <stdint.h>

namespace puna {

struct FormatTraits {
  static constexpr int kZero = 0;
  static constexpr bool kOffset = false, kTable = false;
  static constexpr int kSubBits = 0;  // 4, 6, 8 or none
};

// Weights are packed into panels of kPanelRows output rows (the last one padded), so that products
// need no horizontal sums and memory is read strictly in order.
constexpr int64_t kPanelRows = 64;

// The values of 4-bit codes with kTable, as kZero + v for llama.cpp's v in -127, -104, ..., 113
// (ggml's kvalues_iq4nl).
constexpr uint8_t kTable16[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                  129, 141, 153, 166, 181, 197, 217, 241};

}  // namespace puna
