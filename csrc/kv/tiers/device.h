// KV pages in a backend's own memory, within a budget of bytes.
#pragma once

#include <cstdint>
#include <memory>

#include "backend/backend.h"
#include "kv/kv_tier.h"

namespace puna {

// `budget_bytes` 0: as much as the backend gives. The backend must outlive the tier.
std::unique_ptr<KvTier> make_device_tier(Backend& backend, int64_t budget_bytes);

}  // namespace puna
