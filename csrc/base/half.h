// bfloat16 and float16 as 16-bit patterns: exact widening, round-to-nearest-even narrowing.
// Freestanding: also included by the kernels' translation units, hence no <bit> and no STL.
#pragma once

#include <stdint.h>

namespace puna {
namespace {

[[maybe_unused]] inline float float_of_bits(uint32_t bits) {
  union {
    uint32_t u;
    float f;
  } both = {bits};
  return both.f;
}

[[maybe_unused]] inline uint32_t bits_of_float(float value) {
  union {
    float f;
    uint32_t u;
  } both = {value};
  return both.u;
}

[[maybe_unused]] inline float float_of_bf16(uint16_t value) {
  return float_of_bits(static_cast<uint32_t>(value) << 16);
}

[[maybe_unused]] inline uint16_t bf16_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return static_cast<uint16_t>((bits >> 16) | 0x40u);  // quiet NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

[[maybe_unused]] inline float float_of_f16(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16;
  const uint32_t exponent = (value >> 10) & 31u, mantissa = value & 0x3ffu;
  if (exponent == 31) return float_of_bits(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return float_of_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float subnormal = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -subnormal : subnormal;
}

// Beyond 65,504 it gives infinity, as IEEE 754 says.
[[maybe_unused]] inline uint16_t f16_of_float(float value) {
  const uint32_t bits = bits_of_float(value), magnitude = bits & 0x7fffffffu;
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;   // NaN
  if (magnitude >= 0x47800000u) return sign | 0x7c00u;  // 65,536 and more
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves the multiples of 2^-24, rounded, in the low bits.
    const uint32_t rounded = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
    return sign | static_cast<uint16_t>(rounded);
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return sign | static_cast<uint16_t>((rounded >> 13) - (112u << 10));
}

}  // namespace
}  // namespace puna
