// The weight format fp8: e4m3 codes with one fp32 scale per output row. Unlike the formats of
// formats.inc its products take fp32 activations as they are.
//
// A panel is  scales float [kPanelRows], codes uint8 [cols][kPanelRows];  a weight is
// scale * value(code). A row that holds a not-a-number has a scale of NaN, as its products have,
// and codes without any: kernels need not look for them. Rows past the matrix have scales and codes
// of 0.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "base/float8.h"
#include "quant/traits.h"

namespace puna {

constexpr size_t kFp8ScaleBytes = kPanelRows * sizeof(float);

namespace {

// The scale that lets `most`, the largest magnitude of a row, just fit; 0 if all of the row's
// values are so small that they count as zeros.
[[maybe_unused]] inline float fp8_scale(float most) {
  return most < 0x1p-100f ? 0.0f : most / kMostE4M3;
}
// What is quantised: not-a-number counts as 0, infinities as the largest fp32.
[[maybe_unused]] inline float fp8_finite(float value) {
  constexpr float kLargest = 0x1.fffffep127f;
  return value != value      ? 0.0f
         : value > kLargest  ? kLargest
         : value < -kLargest ? -kLargest
                             : value;
}
[[maybe_unused]] inline uint8_t fp8_code(float value, float scale) {
  return scale == 0.0f ? uint8_t{0} : e4m3_of_float(value / scale);
}

}  // namespace
}  // namespace puna
