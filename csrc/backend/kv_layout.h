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

inline int64_t pages_for(int64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

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

// A sealed page. Codes are of 8 or 4 bits without sign, value = zero point + scale * code, with a
// scale and a zero point (bfloat16 each) per channel of the page for keys, whose outliers stay in
// their channels, and per token for values. Regions in this order, each with all heads in turn:
//   the upper four bits of the keys' codes, and, for kInt8, the lower four bits,
//   the values' codes, the keys' scales and zero points, the values' scales and zero points.
// So a reader may take the upper bits of the keys alone, or no values.
//
// Codes lie in lines of 128 bytes, in the order in which attention reads them. A line of key bits
// holds 32 tokens by 8 channels, byte [token][channel % 4], channels 0 .. 3 in the lower half of
// the byte and 4 .. 7 in the upper; lines go over the channels of 32 tokens, then on to the next
// 32. A line of value codes holds 32 channels by 4 tokens, byte [channel][token % 4], or, of 4
// bits, 8 tokens as above; lines go over the tokens for 32 channels, then on to the next 32. The
// scalar truth is key_code() / value_code(); what pads head_dim to whole lines has code 0, scale 0
// and zero point 0.
constexpr int64_t kSealedLine = 128;
constexpr int64_t kSealedLineRows = 32;
// Sums over more channels would not be sure to fit 32 bits (kernels/kernel_table.h).
constexpr int64_t kSealedMostDim = 256;

struct KvSealedLayout {
  KvSeal format = KvSeal::kNone;
  int64_t kv_heads = 0, head_dim = 0;

  // Where a code's bits are, from the start of the head's share of a region.
  struct Place {
    int64_t byte;
    int shift;  // of the lowest bit
  };

  int bits() const { return format == KvSeal::kInt8 ? 8 : 4; }
  int64_t padded_dim() const {
    return (head_dim + kSealedLineRows - 1) / kSealedLineRows * kSealedLineRows;
  }

  // Bytes of one head.
  size_t plane_bytes() const { return static_cast<size_t>(kPageTokens * padded_dim() / 2); }
  size_t code_bytes() const {  // of the keys, and of the values
    return plane_bytes() * static_cast<size_t>(bits() / 4);
  }
  size_t key_scale_bytes() const { return static_cast<size_t>(padded_dim()) * 4; }
  static constexpr size_t value_scale_bytes() { return kPageTokens * 4; }

  size_t upper_offset(int64_t head) const { return of_head(head, plane_bytes()); }
  size_t lower_offset(int64_t head) const {  // kInt8
    return of_head(kv_heads, plane_bytes()) + of_head(head, plane_bytes());
  }
  size_t value_offset(int64_t head) const {
    return of_head(kv_heads, code_bytes()) + of_head(head, code_bytes());
  }
  // [padded_dim] scales, then as many zero points.
  size_t key_scale_offset(int64_t head) const {
    return value_offset(kv_heads) + of_head(head, key_scale_bytes());
  }
  // [kPageTokens] scales, then as many zero points.
  size_t value_scale_offset(int64_t head) const {
    return key_scale_offset(kv_heads) + of_head(head, value_scale_bytes());
  }
  // Whole blocks of direct I/O.
  size_t page_bytes() const {
    constexpr size_t kBlock = 4096;
    return (value_scale_offset(kv_heads) + kBlock - 1) / kBlock * kBlock;
  }

  // Four bits of a key's code, in the plane of the upper or of the lower ones.
  Place key_code(int64_t token, int64_t channel) const {
    const int64_t line = token / kSealedLineRows * (padded_dim() / 8) + channel / 8;
    return {line * kSealedLine + token % kSealedLineRows * 4 + channel % 4,
            static_cast<int>(channel / 4 % 2 * 4)};
  }
  // All bits of a value's code.
  Place value_code(int64_t token, int64_t channel) const {
    const int64_t tokens = 4 * (8 / bits());  // of a line
    const int64_t line = channel / kSealedLineRows * (kPageTokens / tokens) + token / tokens;
    return {line * kSealedLine + channel % kSealedLineRows * 4 + token % 4,
            static_cast<int>(token % tokens / 4 * 4)};
  }

 private:
  static size_t of_head(int64_t head, size_t bytes) { return static_cast<size_t>(head) * bytes; }
};

}  // namespace puna
