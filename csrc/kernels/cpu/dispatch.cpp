#include "kernels/cpu/dispatch.h"

#include "base/env.h"
#include "base/error.h"

namespace puna {

#define PUNA_ISA(symbol) extern const KernelTable symbol;
#include "isa_list.inc"
#undef PUNA_ISA

namespace {

template <class Slot>
void inherit(Slot& slot, Slot lower) {
  if (!slot) slot = lower;
}

void inherit_all(KernelTable& table, const KernelTable& lower) {
  inherit(table.gemm_f32, lower.gemm_f32);
  inherit(table.gemm_bf16, lower.gemm_bf16);
  inherit(table.gemm_fp8, lower.gemm_fp8);
  for (int i = 0; i < kQuantizedKernels; ++i)
    inherit(table.gemm_quantized[i], lower.gemm_quantized[i]);
  inherit(table.quantize_row, lower.quantize_row);
  inherit(table.attend_page_f32, lower.attend_page_f32);
  inherit(table.attend_page_bf16, lower.attend_page_bf16);
  inherit(table.attend_sealed_int8, lower.attend_sealed_int8);
  inherit(table.attend_sealed_int4, lower.attend_sealed_int4);
  inherit(table.rms_norm, lower.rms_norm);
  inherit(table.layer_norm, lower.layer_norm);
  inherit(table.silu_mul, lower.silu_mul);
  inherit(table.gelu, lower.gelu);
  inherit(table.add, lower.add);
  inherit(table.scale, lower.scale);
  inherit(table.rope, lower.rope);
  inherit(table.bf16_from_f32, lower.bf16_from_f32);
  inherit(table.f32_from_bf16, lower.f32_from_bf16);
  inherit(table.read_bytes, lower.read_bytes);
  inherit(table.peak_bf16, lower.peak_bf16);
  inherit(table.peak_f32, lower.peak_f32);
  inherit(table.peak_int8, lower.peak_int8);
}

}  // namespace

std::vector<const KernelTable*> compiled_isas() {
  return {
#define PUNA_ISA(symbol) &symbol,
#include "isa_list.inc"
#undef PUNA_ISA
  };
}

KernelTable resolve_isa(const std::string& isa) {
  const std::string name = isa.empty() ? environment_isa() : isa;
  const std::vector<const KernelTable*> all = compiled_isas();
  std::string runs, built;
  for (const KernelTable* table : all) {
    built += (built.empty() ? "" : ", ") + std::string(table->isa);
    if (table->supported()) runs += (runs.empty() ? "" : ", ") + std::string(table->isa);
  }
  for (size_t i = 0; i < all.size(); ++i) {
    if (name.empty() ? !all[i]->supported() : name != all[i]->isa) continue;
    if (!all[i]->supported()) {
      fail(ErrorCode::kDevice, "[isa] this processor cannot run '", name, "'; it runs ", runs);
    }
    KernelTable table = *all[i];
    for (size_t lower = i + 1; lower < all.size(); ++lower) inherit_all(table, *all[lower]);
    return table;
  }
  fail(ErrorCode::kInvalidRequest, "[isa] there is no instruction set '", name,
       "' in this build; it has ", built);
}

}  // namespace puna
