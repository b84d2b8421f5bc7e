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
constexpr KernelTable kernels_as(const char* isa, bool (*supported)()) {
  return {.isa = isa,
          .supported = supported,
          .gemm_f32 = gemm_f32,
          .gemm_bf16 = gemm_bf16,
          .gemm_fp8 = gemm_fp8,
          .gemm_quantized =
              {
#define PUNA_FORMAT(Traits, name) gemm_quantized<Traits>,
#include "quant/formats.inc"
#undef PUNA_FORMAT
              },
          .quantize_row = quantize_row,
          .attend_page_f32 = attend_page_f32,
          .attend_page_bf16 = attend_page_bf16,
          .attend_sealed_int8 = attend_sealed_int8,
          .attend_sealed_int4 = attend_sealed_int4,
          .screen_sealed_int8 = screen_sealed_int8,
          .screen_sealed_int4 = screen_sealed_int4,
          .rank_sealed = rank_sealed,
          .rms_norm = rms_norm,
          .layer_norm = layer_norm,
          .silu_mul = silu_mul,
          .gelu = gelu,
          .add = add,
          .scale = scale,
          .rope = rope,
          .bf16_from_f32 = bf16_from_f32,
          .f32_from_bf16 = f32_from_bf16,
          .read_bytes = read_bytes,
          .peak_bf16 = peak_bf16,
          .peak_f32 = peak_f32,
          .peak_int8 = peak_int8};
}

}  // namespace
}  // namespace puna
