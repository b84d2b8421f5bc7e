#include "quant/blocks.h"

#include <cstring>

#include "base/error.h"
#include "base/float8.h"

namespace puna {
namespace {

uint16_t half_at(const uint8_t* bytes) {
  uint16_t value;
  std::memcpy(&value, bytes, sizeof(value));
  return value;
}

// The additive offset -m for a stored minimum m: the sign bit turned.
uint16_t negated(uint16_t half) { return half ^ 0x8000u; }

// 32 codes from 16 bytes: the lower halves, then the upper ones.
void split_nibbles(const uint8_t* bytes, uint8_t* codes) {
  for (int j = 0; j < 16; ++j) {
    codes[j] = bytes[j] & 15;
    codes[j + 16] = bytes[j] >> 4;
  }
}

// Q4_0 { d, 16 bytes }, Q4_1 { d, m, 16 bytes }; IQ4_NL as Q4_0.
void unpack_q4(const uint8_t* block, bool offset, RowBlock* to) {
  to->scale = half_at(block);
  if (offset) to->offset = half_at(block + 2);
  split_nibbles(block + (offset ? 4 : 2), to->codes);
}

// Q5_0 { d, 32 high bits, 16 bytes }, Q5_1 { d, m, 32 high bits, 16 bytes }.
void unpack_q5(const uint8_t* block, bool offset, RowBlock* to) {
  to->scale = half_at(block);
  if (offset) to->offset = half_at(block + 2);
  const uint8_t* high = block + (offset ? 4 : 2);
  split_nibbles(high + 4, to->codes);
  for (int j = 0; j < 32; ++j)
    to->codes[j] = static_cast<uint8_t>(to->codes[j] | (high[j / 8] >> j % 8 & 1) << 4);
}

// Q8_0 { d, 32 signed bytes }.
void unpack_q8(const uint8_t* block, RowBlock* to) {
  to->scale = half_at(block);
  for (int j = 0; j < 32; ++j) to->codes[j] = block[2 + j] ^ 0x80u;
}

// Q2_K { 16 bytes of scale and minimum, 64 bytes of codes, d, dmin }.
void unpack_q2_k(const uint8_t* block, RowBlock* to) {
  to->scale = half_at(block + 80);
  to->offset = negated(half_at(block + 82));
  for (int g = 0; g < 16; ++g) {
    to->sub_scale[g] = static_cast<int8_t>(block[g] & 15);
    to->sub_offset[g] = block[g] >> 4;
  }
  for (int g = 0; g < 8; ++g)
    for (int j = 0; j < 32; ++j)
      to->codes[32 * g + j] = block[16 + g / 4 * 32 + j] >> 2 * (g % 4) & 3;
}

// Q3_K { 32 bytes of high bits, 64 of low pairs, 12 of 6-bit scales, d }.
void unpack_q3_k(const uint8_t* block, RowBlock* to) {
  const uint8_t *low = block + 32, *scales = block + 96;
  to->scale = half_at(block + 108);
  for (int g = 0; g < 16; ++g) {
    const int four = g < 8 ? scales[g] & 15 : scales[g - 8] >> 4;
    const int two = scales[8 + g % 4] >> 2 * (g / 4) & 3;
    to->sub_scale[g] = static_cast<int8_t>((four | two << 4) - 32);
  }
  for (int g = 0; g < 8; ++g) {
    for (int j = 0; j < 32; ++j) {
      const int pair = low[g / 4 * 32 + j] >> 2 * (g % 4) & 3;
      to->codes[32 * g + j] = static_cast<uint8_t>(pair | (block[j] >> g & 1) << 2);
    }
  }
}

// The eight 6-bit scales and minima of Q4_K and Q5_K, in 12 bytes.
void unpack_scales_k4(const uint8_t* bytes, RowBlock* to) {
  for (int g = 0; g < 4; ++g) {
    to->sub_scale[g] = static_cast<int8_t>(bytes[g] & 63);
    to->sub_offset[g] = bytes[g + 4] & 63;
    to->sub_scale[g + 4] = static_cast<int8_t>((bytes[g + 8] & 15) | bytes[g] >> 6 << 4);
    to->sub_offset[g + 4] = static_cast<uint8_t>(bytes[g + 8] >> 4 | bytes[g + 4] >> 6 << 4);
  }
}

// Q4_K { d, dmin, 12 bytes of scales, 128 bytes }, Q5_K with 32 bytes of high bits before the
// codes.
void unpack_q45_k(const uint8_t* block, bool five, RowBlock* to) {
  to->scale = half_at(block);
  to->offset = negated(half_at(block + 2));
  unpack_scales_k4(block + 4, to);
  const uint8_t* high = block + 16;
  const uint8_t* low = high + (five ? 32 : 0);
  for (int g = 0; g < 8; ++g) {
    uint8_t* codes = to->codes + 32 * g;
    for (int j = 0; j < 32; ++j) codes[j] = low[g / 2 * 32 + j] >> 4 * (g % 2) & 15;
    if (!five) continue;
    for (int j = 0; j < 32; ++j)
      codes[j] = static_cast<uint8_t>(codes[j] | (high[j] >> g & 1) << 4);
  }
}

// Q6_K { 128 bytes of low halves, 64 of high pairs, 16 signed scales, d }.
void unpack_q6_k(const uint8_t* block, RowBlock* to) {
  to->scale = half_at(block + 208);
  for (int g = 0; g < 16; ++g) to->sub_scale[g] = static_cast<int8_t>(block[192 + g]);
  for (int g = 0; g < 8; ++g) {
    const int half = g / 4, quarter = g % 4;
    for (int j = 0; j < 32; ++j) {
      const int four = block[half * 64 + quarter % 2 * 32 + j] >> 4 * (quarter / 2) & 15;
      const int two = block[128 + half * 32 + j] >> 2 * quarter & 3;
      to->codes[32 * g + j] = static_cast<uint8_t>(four | two << 4);
    }
  }
}

// IQ4_XS { d, 16 high bits of the scales, 4 bytes of their low halves, 128 bytes }.
void unpack_iq4_xs(const uint8_t* block, RowBlock* to) {
  to->scale = half_at(block);
  const unsigned high = half_at(block + 2);
  for (int g = 0; g < 8; ++g) {
    const unsigned low = block[4 + g / 2] >> 4 * (g % 2) & 15u;
    to->sub_scale[g] = static_cast<int8_t>((low | (high >> 2 * g & 3u) << 4) - 32);
    split_nibbles(block + 8 + 16 * g, to->codes + 32 * g);
  }
}

}  // namespace

std::optional<WeightFormat> exact_format(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return WeightFormat::kF32;
    case DType::kBF16:
      return WeightFormat::kBF16;
    case DType::kF8E4M3:
      return WeightFormat::kFP8;
    case DType::kQ4_0:
      return WeightFormat::kInt4G32;
    case DType::kQ4_1:
      return WeightFormat::kInt4MinG32;
    case DType::kQ5_0:
      return WeightFormat::kInt5G32;
    case DType::kQ5_1:
      return WeightFormat::kInt5MinG32;
    case DType::kQ8_0:
      return WeightFormat::kInt8G32;
    case DType::kQ2_K:
      return WeightFormat::kInt2K;
    case DType::kQ3_K:
      return WeightFormat::kInt3K;
    case DType::kQ4_K:
      return WeightFormat::kInt4K;
    case DType::kQ5_K:
      return WeightFormat::kInt5K;
    case DType::kQ6_K:
      return WeightFormat::kInt6K;
    case DType::kIQ4_NL:
      return WeightFormat::kTable4G32;
    case DType::kIQ4_XS:
      return WeightFormat::kTable4K;
    default:
      return std::nullopt;
  }
}

void unpack_block(DType dtype, const void* block, RowBlock* to) {
  const auto* bytes = static_cast<const uint8_t*>(block);
  switch (dtype) {
    case DType::kQ4_0:
    case DType::kIQ4_NL:
      return unpack_q4(bytes, false, to);
    case DType::kQ4_1:
      return unpack_q4(bytes, true, to);
    case DType::kQ5_0:
      return unpack_q5(bytes, false, to);
    case DType::kQ5_1:
      return unpack_q5(bytes, true, to);
    case DType::kQ8_0:
      return unpack_q8(bytes, to);
    case DType::kQ2_K:
      return unpack_q2_k(bytes, to);
    case DType::kQ3_K:
      return unpack_q3_k(bytes, to);
    case DType::kQ4_K:
      return unpack_q45_k(bytes, false, to);
    case DType::kQ5_K:
      return unpack_q45_k(bytes, true, to);
    case DType::kQ6_K:
      return unpack_q6_k(bytes, to);
    case DType::kIQ4_XS:
      return unpack_iq4_xs(bytes, to);
    default:
      fail(ErrorCode::kInternal, "[quant] ", name_of(dtype), " has no blocks");
  }
}

void decode_elements(DType dtype, const void* data, int64_t first, int64_t count, float* out) {
  switch (dtype) {
    case DType::kF32:
      std::memcpy(out, static_cast<const float*>(data) + first,
                  static_cast<size_t>(count) * sizeof(float));
      return;
    case DType::kF16:
      for (int64_t i = 0; i < count; ++i)
        out[i] = float_of_f16(static_cast<const uint16_t*>(data)[first + i]);
      return;
    case DType::kBF16:
      for (int64_t i = 0; i < count; ++i)
        out[i] = float_of_bf16(static_cast<const uint16_t*>(data)[first + i]);
      return;
    case DType::kF8E4M3:
      for (int64_t i = 0; i < count; ++i)
        out[i] = float_of_e4m3(static_cast<const uint8_t*>(data)[first + i]);
      return;
    default:
      break;
  }
  const DTypeInfo info = info_of(dtype);
  const std::optional<WeightFormat> format = exact_format(dtype);
  if (!format || !is_quantized(*format) || first % info.block_elements != 0 ||
      count % info.block_elements != 0)
    fail(ErrorCode::kInternal, "[quant] elements ", first, " to ", first + count, " of ", info.name,
         " cannot be decoded");
  const auto* block = static_cast<const uint8_t*>(data) + bytes_of(dtype, first);
  with_traits(*format, [&](auto traits) {
    using Format = decltype(traits);
    RowBlock row{};
    for (int64_t i = 0; i < count; i += info.block_elements, block += info.block_bytes) {
      unpack_block(dtype, block, &row);
      for (int64_t c = 0; c < info.block_elements; ++c) out[i + c] = weight_of<Format>(row, c);
    }
  });
}

void unpack_row(WeightFormat format, const void* packed, int64_t row, int64_t cols, float* out) {
  const int64_t place = row % kPanelRows;
  const auto* panel = static_cast<const uint8_t*>(packed) +
                      static_cast<size_t>(row / kPanelRows) * panel_bytes(format, cols);
  if (format == WeightFormat::kF32) {
    const auto* values = reinterpret_cast<const float*>(panel);
    for (int64_t c = 0; c < cols; ++c) out[c] = values[c * kPanelRows + place];
  } else if (format == WeightFormat::kBF16) {
    const auto* values = reinterpret_cast<const uint16_t*>(panel);
    for (int64_t c = 0; c < cols; ++c)
      out[c] = float_of_bf16(values[(c / 2 * kPanelRows + place) * 2 + c % 2]);
  } else if (format == WeightFormat::kFP8) {
    const float scale = reinterpret_cast<const float*>(panel)[place];
    const uint8_t* codes = panel + kFp8ScaleBytes;
    for (int64_t c = 0; c < cols; ++c)
      out[c] = scale * float_of_e4m3(codes[c * kPanelRows + place]);
  } else {
    with_traits(format, [&](auto traits) {
      using Format = decltype(traits);
      RowBlock block{};
      for (int64_t c = 0; c < cols; ++c) {
        if (c % Format::kBlock == 0)
          get_row_block<Format>(panel + c / Format::kBlock * PanelLayout<Format>::kBytes, place,
                                &block);
        out[c] = weight_of<Format>(block, c % Format::kBlock);
      }
    });
  }
}

}  // namespace puna
