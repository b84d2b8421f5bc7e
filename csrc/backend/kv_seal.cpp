#include "backend/kv_seal.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/half.h"

namespace puna {
namespace {

constexpr uint16_t kNaN = 0x7fc0;

// The largest bfloat16 that is at most `value`, and the smallest that is at least it.
uint16_t bf16_below(float value) {
  const uint32_t bits = bits_of_float(value);
  const bool grows = (bits >> 31) != 0 && (bits & 0xffffu) != 0;
  return static_cast<uint16_t>((bits >> 16) + (grows ? 1 : 0));
}
uint16_t bf16_above(float value) {  // of value >= 0
  const uint32_t bits = bits_of_float(value);
  return static_cast<uint16_t>((bits >> 16) + ((bits & 0xffffu) != 0 ? 1 : 0));
}

struct Range {
  uint16_t scale = kNaN, zero = kNaN;
};

// Codes of values[count], and how they are to be read.
Range encode(uint8_t* codes, const float* values, int64_t count, int bits) {
  float least = values[0], most = values[0], spoilt = 0;
  for (int64_t i = 0; i < count; ++i) {
    least = std::min(least, values[i]);
    most = std::max(most, values[i]);
    spoilt += values[i] * 0.0f;  // NaN if one is not finite
  }
  Range range;
  const float zero = float_of_bf16(bf16_below(least));
  const auto levels = static_cast<float>((1 << bits) - 1);
  // In double, where it neither overflows nor rounds to less.
  const double step = (static_cast<double>(most) - zero) / levels;
  auto above = static_cast<float>(step);
  if (above < step) above = std::nextafter(above, std::numeric_limits<float>::infinity());
  const float scale = float_of_bf16(bf16_above(above));
  if (spoilt != 0 || !std::isfinite(most - zero) || !std::isfinite(scale)) {
    std::fill_n(codes, count, uint8_t{0});
    return range;
  }
  range.zero = bf16_below(least);
  range.scale = bf16_above(above);
  const float divisor = scale > 0 ? scale : 1;
  for (int64_t i = 0; i < count; ++i) {
    const auto code = static_cast<int32_t>((values[i] - zero) / divisor + 0.5f);
    codes[i] = static_cast<uint8_t>(std::min(code, static_cast<int32_t>(levels)));
  }
  return range;
}

// Some elements of an open page that lie together.
void widen(float* to, DType dtype, const void* data, int64_t first, int64_t count) {
  if (dtype == DType::kF32) {
    std::memcpy(to, static_cast<const float*>(data) + first,
                static_cast<size_t>(count) * sizeof(float));
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(data) + first;
  for (int64_t i = 0; i < count; ++i) to[i] = float_of_bf16(from[i]);
}

void seal_keys(char* page, const KvSealedLayout& sealed, const void* keys, const KvPageLayout& open,
               int64_t head) {
  auto* upper = reinterpret_cast<uint8_t*>(page + sealed.upper_offset(head));
  auto* lower = reinterpret_cast<uint8_t*>(page + sealed.lower_offset(head));
  auto* scales = reinterpret_cast<uint16_t*>(page + sealed.key_scale_offset(head));
  const bool both = sealed.format == KvSeal::kInt8;
  float values[kPageTokens];
  uint8_t codes[kPageTokens];
  for (int64_t c = 0; c < open.head_dim; ++c) {
    for (int64_t t = 0; t < kPageTokens; t += kKeyBlockTokens)
      widen(values + t, open.dtype, keys, open.key_index(t, c), kKeyBlockTokens);
    const Range range = encode(codes, values, kPageTokens, sealed.bits());
    scales[c] = range.scale;
    scales[sealed.padded_dim() + c] = range.zero;
    for (int64_t t = 0; t < kPageTokens; t += kSealedLineRows) {
      const auto [first, shift] = sealed.key_code(t, c);
      for (int64_t i = 0; i < kSealedLineRows; ++i) {
        const uint8_t code = codes[t + i];
        const uint8_t upper_bits = both ? code >> 4 : code;
        upper[first + 4 * i] = static_cast<uint8_t>(upper[first + 4 * i] | upper_bits << shift);
        if (both)
          lower[first + 4 * i] = static_cast<uint8_t>(lower[first + 4 * i] | (code & 15) << shift);
      }
    }
  }
}

void seal_values(char* page, const KvSealedLayout& sealed, const void* data,
                 const KvPageLayout& open, int64_t head) {
  auto* region = reinterpret_cast<uint8_t*>(page + sealed.value_offset(head));
  auto* scales = reinterpret_cast<uint16_t*>(page + sealed.value_scale_offset(head));
  std::vector<float> values(static_cast<size_t>(open.head_dim));
  std::vector<uint8_t> codes(values.size());
  for (int64_t t = 0; t < kPageTokens; ++t) {
    widen(values.data(), open.dtype, data, open.value_index(t, 0), open.head_dim);
    const Range range = encode(codes.data(), values.data(), open.head_dim, sealed.bits());
    scales[t] = range.scale;
    scales[kPageTokens + t] = range.zero;
    for (int64_t c = 0; c < open.head_dim; c += kSealedLineRows) {
      const auto [first, shift] = sealed.value_code(t, c);
      const int64_t count = std::min(kSealedLineRows, open.head_dim - c);
      for (int64_t i = 0; i < count; ++i)
        region[first + 4 * i] = static_cast<uint8_t>(region[first + 4 * i] | codes[c + i] << shift);
    }
  }
}

}  // namespace

void seal_head(void* sealed_page, const KvSealedLayout& sealed, const void* open_page,
               const KvPageLayout& open, int64_t head) {
  auto* page = static_cast<char*>(sealed_page);
  // Codes are added bit by bit; what pads the lines stays zero.
  std::memset(page + sealed.upper_offset(head), 0, sealed.plane_bytes());
  if (sealed.format == KvSeal::kInt8)
    std::memset(page + sealed.lower_offset(head), 0, sealed.plane_bytes());
  std::memset(page + sealed.value_offset(head), 0, sealed.code_bytes());
  std::memset(page + sealed.key_scale_offset(head), 0, sealed.key_scale_bytes());
  const auto* data = static_cast<const char*>(open_page);
  seal_keys(page, sealed, data + open.key_offset(head), open, head);
  seal_values(page, sealed, data + open.value_offset(head), open, head);
  // The last head also clears the space up to the next block, so that a page's bytes are a function
  // of its contents.
  if (head == sealed.kv_heads - 1) {
    const size_t used = sealed.value_scale_offset(sealed.kv_heads);
    std::memset(page + used, 0, sealed.page_bytes() - used);
  }
}

double sealed_key(const void* page, const KvSealedLayout& layout, int64_t head, int64_t token,
                  int64_t channel) {
  const auto* bytes = static_cast<const uint8_t*>(page);
  const auto* scales =
      reinterpret_cast<const uint16_t*>(bytes + layout.key_scale_offset(head)) + channel;
  const auto [byte, shift] = layout.key_code(token, channel);
  int code = bytes[layout.upper_offset(head) + byte] >> shift & 15;
  if (layout.format == KvSeal::kInt8)
    code = code << 4 | (bytes[layout.lower_offset(head) + byte] >> shift & 15);
  return float_of_bf16(scales[layout.padded_dim()]) +
         static_cast<double>(float_of_bf16(scales[0])) * code;
}

double sealed_value(const void* page, const KvSealedLayout& layout, int64_t head, int64_t token,
                    int64_t channel) {
  const auto* bytes = static_cast<const uint8_t*>(page);
  const auto* scales =
      reinterpret_cast<const uint16_t*>(bytes + layout.value_scale_offset(head)) + token;
  const auto [byte, shift] = layout.value_code(token, channel);
  const int code = bytes[layout.value_offset(head) + byte] >> shift & ((1 << layout.bits()) - 1);
  return float_of_bf16(scales[kPageTokens]) + static_cast<double>(float_of_bf16(scales[0])) * code;
}

}  // namespace puna
