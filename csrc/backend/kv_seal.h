// Sealing: what a full page of keys and values becomes, in plain code; the scalar truth that
// kernels are tested against.
//
// A channel of keys (over the 256 tokens of the page), or a token of values (over the channels of a
// head), has
//   zero   its smallest value, rounded down to bfloat16
//   scale  (largest value - zero) / (2^bits - 1), rounded up to bfloat16
//   code   (value - zero) / scale, to the nearest whole number
// so that the codes cover the range, and a value comes back within half a scale. What is constant,
// in bfloat16, comes back exactly: its scale is 0. One value that is not finite, or a
// range beyond that of fp32, makes scale and zero point NaN, and with them every result that the
// channel or token takes part in.
#pragma once

#include <cstdint>

#include "backend/kv_layout.h"

namespace puna {

// Writes the share of one head of a full open page into a sealed page.
void seal_head(void* sealed_page, const KvSealedLayout& sealed, const void* open_page,
               const KvPageLayout& open, int64_t head);

// zero + scale * code, exact.
double sealed_key(const void* page, const KvSealedLayout& layout, int64_t head, int64_t token,
                  int64_t channel);
double sealed_value(const void* page, const KvSealedLayout& layout, int64_t head, int64_t token,
                    int64_t channel);

}  // namespace puna
