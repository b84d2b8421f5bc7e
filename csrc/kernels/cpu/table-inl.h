// The kernels of this translation unit's instruction set, as a table. One include per
// isa/<name>.cpp.
#pragma once

#include "kernels/cpu/attention-inl.h"
#include "kernels/cpu/attention-screen-inl.h"
#include "kernels/cpu/attention-sealed-inl.h"
#include "kernels/cpu/ceilings-inl.h"
#include "kernels/cpu/cpu_features.h"
#include "kernels/cpu/elementwise-inl.h"
#include "kernels/cpu/fp8-inl.h"
#include "kernels/cpu/gemm-inl.h"
#include "kernels/cpu/quantized-inl.h"
#include "kernels/kernel_table.h"

namespace puna {
namespace {

// The tables are constant-initialized (constinit): code of an instruction set that ran while the
// library is loaded would end the process on a processor without it.

// The kernels that multiply codes; the others are those of the next instruction set.
constexpr KernelTable kernels_of_codes_as(const char* isa, bool (*supported)()) {
  return {
      .isa = isa,
      .supported = supported,
      .gemm_quantized =
          {
#define PUNA_FORMAT(Traits, name) gemm_quantized<Traits>,
#include "quant/formats.inc"
#undef PUNA_FORMAT
          },
      .attend_sealed_int8 = attend_sealed_int8,
      .attend_sealed_int4 = attend_sealed_int4,
      .screen_sealed_int8 = screen_sealed_int8,
      .screen_sealed_int4 = screen_sealed_int4,
      .peak_int8 = peak_int8,
  };
}

constexpr KernelTable kernels_as(const char* isa, bool (*supported)()) {
  KernelTable table = kernels_of_codes_as(isa, supported);
#define PUNA_KERNEL(slot) table.slot = slot;
#include "kernels/kernel_slots.inc"
#undef PUNA_KERNEL
  return table;
}

}  // namespace
}  // namespace puna
