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
  for (int i = 0; i < kQuantizedKernels; ++i)
    inherit(table.gemm_quantized[i], lower.gemm_quantized[i]);
#define PUNA_KERNEL(slot) inherit(table.slot, lower.slot);
#include "kernels/kernel_slots.inc"
#undef PUNA_KERNEL
}

// kernel_slots.inc leaves out no slot: the rest of a table are its name and its question.
constexpr size_t kListed = 0
#define PUNA_KERNEL(slot) +1
#include "kernels/kernel_slots.inc"
#undef PUNA_KERNEL
    ;
static_assert(sizeof(KernelTable) == (2 + kQuantizedKernels + kListed) * sizeof(void*));

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
