// KV pages in ordinary memory, within a budget of bytes.
#pragma once

#include <cstddef>
#include <memory>

#include "kv/kv_tier.h"

namespace puna {

// `budget_bytes` 0: as much as the system gives. Freed pages are kept for the next allocation and
// go back to the system with the tier.
std::unique_ptr<KvTier> make_ram_tier(size_t page_bytes, size_t budget_bytes);

}  // namespace puna
