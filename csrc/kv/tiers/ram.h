// KV pages in ordinary memory, within a budget of bytes.
#pragma once

#include <cstdint>
#include <memory>

#include "kv/kv_tier.h"

namespace puna {

// `budget_bytes` 0: as much as the system gives. Pages of one size are cut from blocks, most of
// which lie in huge pages of the system. Free ones are kept for the next allocation of their size;
// those kept count against the budget as well, and give way where another size is asked for.
std::unique_ptr<KvTier> make_ram_tier(int64_t budget_bytes);

}  // namespace puna
