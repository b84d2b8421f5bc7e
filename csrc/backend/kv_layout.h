// How one page of the KV cache lies in memory: one layer, kPageTokens consecutive positions, all KV
// heads. A page is written while open; layers that keep everything may seal a full one into fewer
// bits.
//
// An open page. Head h occupies head_bytes() from h * head_bytes(): first its keys, in blocks of
// kKeyBlockTokens tokens, [block][head_dim][kKeyBlockTokens], then its values, [token][head_dim].
// Attention then reads both strictly in order, with one token per vector lane for scores and one
// channel per lane for values. The scalar truth is key_index / value_index; kernels are tested
// against it.
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

// What full pages of layers that keep everything are sealed into; kNone leaves them as they are.
enum class KvSeal { kNone, kInt8, kInt4 };

// A sealed page. Codes are of 8 or 4 bits with a scale and a zero point, per channel of the page
// for keys, whose outliers stay in their channels, and per token for values. Regions in this order,
// each with all heads in turn:
//   the upper four bits of the keys' codes, and, for kInt8, the lower four bits,
//   the values' codes, the keys' scales and zero points, the values' scales and zero points.
// So a reader may take the upper bits of the keys alone, or no values.
struct KvSealedLayout {
  KvSeal format = KvSeal::kNone;
  int64_t kv_heads = 0, head_dim = 0;

  // Four channels of a token lie together.
  int64_t padded_dim() const { return (head_dim + 3) / 4 * 4; }
  size_t plane_bytes() const { return static_cast<size_t>(kPageTokens * padded_dim() / 2); }
  size_t key_bytes() const { return plane_bytes() * (format == KvSeal::kInt8 ? 2 : 1); }
  size_t value_bytes() const { return plane_bytes() * (format == KvSeal::kInt8 ? 2 : 1); }
  // A scale and a zero point, bfloat16 each.
  size_t scale_bytes() const { return static_cast<size_t>(padded_dim() + kPageTokens) * 4; }
  // Whole blocks of direct I/O.
  size_t page_bytes() const {
    constexpr size_t kBlock = 4096;
    const size_t bytes =
        static_cast<size_t>(kv_heads) * (key_bytes() + value_bytes() + scale_bytes());
    return (bytes + kBlock - 1) / kBlock * kBlock;
  }
};

}  // namespace puna
