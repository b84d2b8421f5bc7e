// How one page of the KV cache lies in memory: one layer, kPageTokens consecutive positions, all KV
// heads.
//
// Head h occupies head_bytes() from h * head_bytes(): first its keys, in blocks of kKeyBlockTokens
// tokens, [block][head_dim][kKeyBlockTokens], then its values, [token][head_dim]. Attention then
// reads both strictly in order, with one token per vector lane for scores and one channel per lane
// for values. The scalar truth is key_index / value_index; kernels are tested against it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"

namespace puna {

constexpr int64_t kPageTokens = 256;
constexpr int64_t kKeyBlockTokens = 16;

struct KvPageLayout {
  DType dtype = DType::kF32;  // kF32 or kBF16
  int64_t kv_heads = 0, head_dim = 0;

  size_t part_bytes() const { return static_cast<size_t>(kPageTokens * head_dim) * size_of(dtype); }
  size_t head_bytes() const { return 2 * part_bytes(); }
  size_t page_bytes() const { return static_cast<size_t>(kv_heads) * head_bytes(); }
  size_t key_offset(int64_t head) const { return static_cast<size_t>(head) * head_bytes(); }
  size_t value_offset(int64_t head) const { return key_offset(head) + part_bytes(); }

  // Index, in elements from the start of the head's keys or values.
  int64_t key_index(int64_t token, int64_t channel) const {
    return (token / kKeyBlockTokens * head_dim + channel) * kKeyBlockTokens +
           token % kKeyBlockTokens;
  }
  int64_t value_index(int64_t token, int64_t channel) const { return token * head_dim + channel; }
};

}  // namespace puna
