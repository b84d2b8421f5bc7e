// Weights from checkpoint order into the panels that the products read; see kernel_table.h.
#pragma once

#include <span>

#include "backend/buffer.h"
#include "backend/checks.h"
#include "platform/thread_pool.h"

namespace puna {

// `shape` is that of the parts stacked by rows. `packed` is zeroed memory for all panels.
void pack_panels(ThreadPool& pool, std::span<const MatrixSource> parts, const MatrixShape& shape,
                 WeightFormat format, void* packed);

}  // namespace puna
