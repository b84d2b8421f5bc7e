// The weight formats by name and number, and their sizes. What a format is: traits.h; how it lies
// in memory: panel.h.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "quant/fp8.h"
#include "quant/panel.h"

namespace puna {

enum class WeightFormat : uint8_t {
  kF32,   // panel[cols][kPanelRows] float
  kBF16,  // panel[ceil(cols / 2)][kPanelRows][2], pairs (k, k + 1); an odd last column has zero
  kFP8,   // see fp8.h
#define PUNA_FORMAT(Traits, name) k##Traits,
#include "quant/formats.inc"
#undef PUNA_FORMAT
};

constexpr int kFirstQuantized = 3;
constexpr int kQuantizedFormats = 0
#define PUNA_FORMAT(Traits, name) +1
#include "quant/formats.inc"
#undef PUNA_FORMAT
    ;

// Whether it is one of formats.inc, whose products quantise their activations.
constexpr bool is_quantized(WeightFormat format) {
  return static_cast<int>(format) >= kFirstQuantized;
}
// Whether products take the activations as they are.
constexpr bool takes_fp32(WeightFormat format) {
  return format == WeightFormat::kF32 || format == WeightFormat::kFP8;
}
// Index of a quantised format in tables of kQuantizedFormats.
constexpr int quantized_index(WeightFormat format) {
  return static_cast<int>(format) - kFirstQuantized;
}

// Calls function(Traits{}) for the traits of a quantised format.
template <class Function>
decltype(auto) with_traits(WeightFormat format, Function&& function) {
  switch (format) {
#define PUNA_FORMAT(Traits, name) \
  case WeightFormat::k##Traits:   \
    return function(Traits{});
#include "quant/formats.inc"
#undef PUNA_FORMAT
    default:
      break;
  }
  __builtin_unreachable();  // is_quantized() is the caller's to check
}

const char* name_of(WeightFormat format);
std::optional<WeightFormat> format_of(std::string_view name);
std::vector<WeightFormat> all_formats();

// Bytes of one panel of kPanelRows rows.
size_t panel_bytes(WeightFormat format, int64_t cols);
// Bytes of a packed matrix.
size_t packed_bytes(WeightFormat format, int64_t rows, int64_t cols);

// Columns of a quantised format that share a scale.
int64_t group_of(WeightFormat format);
// Columns rounded up to whole blocks (pairs for bf16).
int64_t padded_cols(WeightFormat format, int64_t cols);
// Of a long row: fp8's scale per row is not counted.
double bits_per_weight(WeightFormat format);

}  // namespace puna
