// float8 e4m3 (the "fn" form: no infinities, 0x7f and 0xff are not-a-number, the largest is 448) as
// 8-bit patterns. Freestanding: also included by the kernels' translation units.
#pragma once

#include "base/half.h"

namespace puna {
namespace {

constexpr float kMostE4M3 = 448.0f;

[[maybe_unused]] inline bool is_nan_e4m3(uint8_t value) { return (value & 0x7f) == 0x7f; }

[[maybe_unused]] inline float float_of_e4m3(uint8_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x80u) << 24;
  const uint32_t exponent = value >> 3 & 15u, mantissa = value & 7u;
  if (is_nan_e4m3(value)) return float_of_bits(sign | 0x7fc00000u);
  if (exponent != 0) return float_of_bits(sign | (exponent + 120) << 23 | mantissa << 20);
  const float subnormal = static_cast<float>(mantissa) * 0x1p-9f;
  return sign ? -subnormal : subnormal;
}

// To nearest, ties to even; beyond 448, and infinity, it gives 448 with the sign (no infinity to
// give).
[[maybe_unused]] inline uint8_t e4m3_of_float(float value) {
  const uint32_t bits = bits_of_float(value), magnitude = bits & 0x7fffffffu;
  const auto sign = static_cast<uint8_t>(bits >> 24 & 0x80u);
  if (magnitude > 0x7f800000u) return sign | 0x7fu;  // NaN
  uint32_t code;
  if (magnitude < 0x3c800000u) {
    // Below 2^-6: adding 2^14 leaves the multiples of 2^-9, rounded, in the low bits.
    code = bits_of_float(float_of_bits(magnitude) + 0x1p14f) - 0x46800000u;
  } else {
    code = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3);
  }
  return sign | static_cast<uint8_t>(code < 0x7eu ? code : 0x7eu);
}

}  // namespace
}  // namespace puna
