// KV pages in the host's memory, for a device whose own has no room: pinned, so that copies to and
// from the device run at the speed of the link, within a budget of bytes.
#pragma once

#include <cstdint>
#include <memory>

#include "backend/backend.h"
#include "kv/kv_tier.h"

namespace puna {

// The backend must outlive the tier. Pinning takes time, so what was pinned is kept for pages to
// come.
std::unique_ptr<KvTier> make_pinned_tier(Backend& backend, int64_t budget_bytes);

}  // namespace puna
