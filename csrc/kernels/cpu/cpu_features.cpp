#include "kernels/cpu/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace puna {

namespace {

struct CpuFeatures {
  bool avx2 = false;
  bool avx_vnni = false;
  bool avx512 = false;
  bool avx512_vnni = false;
  bool avx512_vnni_bf16 = false;
  bool avx512_amx = false;
  bool neon_dotprod = false;
  bool neon_i8mm_bf16 = false;
};

constexpr bool has_all(unsigned long bits, unsigned long wanted) {
  return (bits & wanted) == wanted;
}
constexpr unsigned long bit(int position) { return 1ul << position; }

#if defined(__x86_64__)

// Linux saves the tiles of those processes only that have asked for it: its
// Documentation/arch/x86/xstate.rst, from where the numbers are.
bool may_use_tiles() {
#if defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Bit positions from Intel's manual, volume 2, CPUID; state components from volume 1, XCR0.
CpuFeatures detect() {
  CpuFeatures features;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return features;
  constexpr unsigned long kFma = bit(12), kOsXsave = bit(27), kAvx = bit(28), kF16c = bit(29);
  if (!has_all(ecx, kFma | kOsXsave | kAvx | kF16c)) return features;
  unsigned saved = 0, saved_high = 0;
  asm volatile("xgetbv" : "=a"(saved), "=d"(saved_high) : "c"(0));
  constexpr unsigned long kYmmState = bit(1) | bit(2);                       // SSE, AVX
  constexpr unsigned long kZmmState = kYmmState | bit(5) | bit(6) | bit(7);  // masks, upper zmm

  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return features;
  const unsigned last_subleaf = eax;
  constexpr unsigned long kTileState = bit(17) | bit(18), kAmxTile = bit(24), kAmxInt8 = bit(25);
  const bool tiles = has_all(saved, kTileState) && has_all(edx, kAmxTile | kAmxInt8);
  constexpr unsigned long kAvx2 = bit(5), kBmi2 = bit(8);
  constexpr unsigned long kF = bit(16), kDq = bit(17), kBw = bit(30), kVl = bit(31);
  features.avx2 = has_all(saved, kYmmState) && has_all(ebx, kAvx2 | kBmi2);
  features.avx512 =
      features.avx2 && has_all(saved, kZmmState) && has_all(ebx, kF | kDq | kBw | kVl);
  features.avx512_vnni = features.avx512 && has_all(ecx, bit(11));
  if (last_subleaf >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) {
    features.avx_vnni = features.avx2 && has_all(eax, bit(4));
    features.avx512_vnni_bf16 = features.avx512_vnni && has_all(eax, bit(5));
    features.avx512_amx = features.avx512_vnni_bf16 && tiles && may_use_tiles();
  }
  return features;
}

#elif defined(__aarch64__) && defined(__linux__)

// Bit positions from the kernel's asm/hwcap.h, which older systems have without the newer names.
CpuFeatures detect() {
  CpuFeatures features;
  constexpr unsigned long kCrc32 = bit(7), kAtomics = bit(8), kRdm = bit(12), kDotProd = bit(20);
  constexpr unsigned long kI8mm = bit(13), kBf16 = bit(14);
  // The compiler may use all of Armv8.2 where it is told of dot products.
  features.neon_dotprod = has_all(getauxval(AT_HWCAP), kCrc32 | kAtomics | kRdm | kDotProd);
  features.neon_i8mm_bf16 = features.neon_dotprod && has_all(getauxval(AT_HWCAP2), kI8mm | kBf16);
  return features;
}

#else

CpuFeatures detect() { return {}; }

#endif

const CpuFeatures& features() {
  static const CpuFeatures detected = detect();  // once: a virtual machine traps every cpuid
  return detected;
}

}  // namespace

bool has_avx2() { return features().avx2; }
bool has_avx_vnni() { return features().avx_vnni; }
bool has_avx512() { return features().avx512; }
bool has_avx512_vnni() { return features().avx512_vnni; }
bool has_avx512_vnni_bf16() { return features().avx512_vnni_bf16; }
bool has_avx512_amx() { return features().avx512_amx; }
bool has_neon_dotprod() { return features().neon_dotprod; }
bool has_neon_i8mm_bf16() { return features().neon_i8mm_bf16; }

}  // namespace puna
