// What the processor has and the system saves on a context switch. Freestanding: included by the
// kernels' translation units, which may run on any machine until supported() has said yes.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace puna {
namespace {

struct CpuFeatures {
  bool avx2 = false;    // with fma, f16c and bmi2
  bool avx512 = false;  // f, bw, vl, dq, on top of avx2
  bool avx512_vnni = false;
  bool avx512_bf16 = false;
  bool neon_dotprod = false;
  bool neon_i8mm_bf16 = false;
};

[[maybe_unused]] inline CpuFeatures detect_cpu_features() {
  CpuFeatures features;
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return features;
  const bool os_saves = c & (1u << 27), fma = c & (1u << 12), f16c = c & (1u << 29);
  if (!os_saves) return features;
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const bool ymm = (low & 0x06u) == 0x06u;  // SSE and AVX state
  const bool zmm = (low & 0xe6u) == 0xe6u;  // and the mask and upper zmm state
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
  const unsigned subleaves = a;
  features.avx2 = ymm && fma && f16c && (b & (1u << 5)) && (b & (1u << 8));
  const unsigned needed = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // f, dq, bw, vl
  features.avx512 = features.avx2 && zmm && (b & needed) == needed;
  features.avx512_vnni = features.avx512 && (c & (1u << 11));
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    features.avx512_bf16 = features.avx512 && (a & (1u << 5));
  }
#elif defined(__aarch64__) && defined(__linux__)
  const unsigned long one = getauxval(AT_HWCAP), two = getauxval(AT_HWCAP2);
  features.neon_dotprod = one & (1ul << 20);
  features.neon_i8mm_bf16 = features.neon_dotprod && (two & (1ul << 13)) && (two & (1ul << 14));
#endif
  return features;
}

}  // namespace
}  // namespace puna
