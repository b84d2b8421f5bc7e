// avx512_amx: products of quantised weights with many rows in AMX tiles; the rest is that of
// avx512_vnni_bf16. Flags in CMakeLists.txt; the tile instructions are written out, so that the
// compiler needs to know none.
#include "kernels/cpu/ceilings-inl.h"
#include "kernels/cpu/cpu_features.h"
#include "kernels/cpu/quantized-unit-inl.h"
#include "kernels/kernel_table.h"

namespace puna {

extern const KernelTable kAvx512Vnni;

namespace {

// The tiles of a core. What an operation is: Intel's manual, volume 2, by the names of the
// instructions.
class Amx {
 public:
  explicit Amx(int64_t cols) {
    struct alignas(64) {  // the operand of LDTILECFG
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } tiles;
    static_assert(sizeof(tiles) == 64);
    for (int t = 0; t < 8; ++t) {
      tiles.row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? cols : 64);
      tiles.rows[t] = static_cast<uint8_t>(t >= 6 ? cols / 4 : 16);
    }
    asm volatile("ldtilecfg %0" : : "m"(tiles));
  }
  ~Amx() { asm volatile("tilerelease"); }
  Amx(const Amx&) = delete;
  Amx& operator=(const Amx&) = delete;

  template <int T>
  PUNA_INLINE_MEMBER void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
  }
  template <int T>
  PUNA_INLINE_MEMBER void load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  PUNA_INLINE_MEMBER void store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
  }
  template <bool Signed, int C, int A, int B>
  PUNA_INLINE_MEMBER void multiply() {
    if constexpr (Signed) {
      asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
    } else {
      asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
    }
  }
};

// Fewer rows leave most of a tile empty, while their weights are taken apart all the same.
constexpr int64_t kLeastRows = 12;

template <class Format, int I>
void gemm(float* out, int64_t out_stride, const QuantizedRows& x, const void* panel,
          const float* bias, int64_t rows, int64_t width) {
  if (rows < kLeastRows)
    return kAvx512Vnni.gemm_quantized[I](out, out_stride, x, panel, bias, rows, width);
  gemm_quantized_by<Format, Amx>(out, out_stride, x, panel, bias, rows, width);
}

enum : int {
#define PUNA_FORMAT(Traits, name) kPlaceOf##Traits,
#include "quant/formats.inc"
#undef PUNA_FORMAT
};

// Tiles of 32 columns, as the formats have them; two of the four sums of a block.
float peak(int64_t iterations, int64_t* operations) {
  constexpr int64_t kCols = 32;
  alignas(64) int8_t bytes[16 * 64];
  alignas(64) int32_t sums[16 * 16];
  for (int8_t& byte : bytes) byte = static_cast<int8_t>(iterations & 1);
  Amx unit(kCols);
  unit.zero<0>();
  unit.zero<1>();
  unit.zero<2>();
  unit.zero<3>();
  unit.load<4>(bytes, kCols);
  unit.load<5>(bytes, kCols);
  unit.load<6>(bytes, 64);
  unit.load<7>(bytes, 64);
  for (int64_t i = 0; i < iterations; ++i) {
    unit.multiply<false, 0, 4, 6>();
    unit.multiply<false, 1, 4, 7>();
    unit.multiply<false, 2, 5, 6>();
    unit.multiply<false, 3, 5, 7>();
  }
  unit.store<3>(sums, 64);
  *operations = iterations * 4 * (16 * 16 * kCols) * 2;
  return static_cast<float>(sums[0]);
}

}  // namespace

extern const KernelTable kAvx512Amx;
constinit const KernelTable kAvx512Amx = {.isa = "avx512_amx",
                                          .supported = has_avx512_amx,
                                          .gemm_quantized =
                                              {
#define PUNA_FORMAT(Traits, name) gemm<Traits, kPlaceOf##Traits>,
#include "quant/formats.inc"
#undef PUNA_FORMAT
                                              },
                                          .peak_int8 = peak};

}  // namespace puna
