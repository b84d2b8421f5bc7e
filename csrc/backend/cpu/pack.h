// Weights from checkpoint order into the panels that the products read; see kernel_table.h.
#pragma once

#include <span>

#include "backend/buffer.h"
#include "backend/checks.h"
#include "platform/thread_pool.h"

namespace puna {

// To a quantised format: rows of the same format are taken apart and laid out anew, others are
// decoded and quantised. `importance` [cols] or null.
void pack_quantized(ThreadPool& pool, std::span<const MatrixSource> parts, const MatrixShape& shape,
                    WeightFormat format, const float* importance, void* packed);

// To fp8: float8 codes and scales as they are, other types quantised row by row. `packed` is zeroed
// memory for all panels.
void pack_fp8(ThreadPool& pool, std::span<const MatrixSource> parts, const MatrixShape& shape,
              void* packed);

// To fp32 or bfloat16. `shape` is that of the parts stacked by rows. `packed` is zeroed memory for
// all panels.
void pack_panels(ThreadPool& pool, std::span<const MatrixSource> parts, const MatrixShape& shape,
                 WeightFormat format, void* packed);

}  // namespace puna
