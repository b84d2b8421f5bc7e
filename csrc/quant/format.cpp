#include "quant/format.h"

namespace puna {
namespace {

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Columns and bytes of one block of a panel.
struct BlockSize {
  int64_t cols, bytes, group;
  int64_t header = 0;  // bytes of a panel before its blocks
};
BlockSize block_of(WeightFormat format) {
  switch (format) {
    case WeightFormat::kF32:
      return {1, 4 * kPanelRows, 1};
    case WeightFormat::kBF16:
      return {2, 4 * kPanelRows, 1};
    case WeightFormat::kFP8:
      return {1, kPanelRows, 1, kFp8ScaleBytes};
    default:
      return with_traits(format, [](auto traits) -> BlockSize {
        using Format = decltype(traits);
        return {Format::kBlock, PanelLayout<Format>::kBytes, Format::kGroup};
      });
  }
}

}  // namespace

const char* name_of(WeightFormat format) {
  switch (format) {
    case WeightFormat::kF32:
      return "fp32";
    case WeightFormat::kBF16:
      return "bf16";
    case WeightFormat::kFP8:
      return "fp8";
#define PUNA_FORMAT(Traits, name) \
  case WeightFormat::k##Traits:   \
    return name;
#include "quant/formats.inc"
#undef PUNA_FORMAT
  }
  return "?";
}

std::vector<WeightFormat> all_formats() {
  std::vector<WeightFormat> formats;
  for (int i = 0; i < kFirstQuantized + kQuantizedFormats; ++i)
    formats.push_back(static_cast<WeightFormat>(i));
  return formats;
}

std::optional<WeightFormat> format_of(std::string_view name) {
  for (const WeightFormat format : all_formats())
    if (name == name_of(format)) return format;
  return std::nullopt;
}

size_t panel_bytes(WeightFormat format, int64_t cols) {
  const BlockSize block = block_of(format);
  return static_cast<size_t>(block.header + (cols + block.cols - 1) / block.cols * block.bytes);
}

size_t packed_bytes(WeightFormat format, int64_t rows, int64_t cols) {
  return static_cast<size_t>((rows + kPanelRows - 1) / kPanelRows) * panel_bytes(format, cols);
}

int64_t group_of(WeightFormat format) { return block_of(format).group; }

int64_t padded_cols(WeightFormat format, int64_t cols) {
  return round_up(cols, block_of(format).cols);
}

double bits_per_weight(WeightFormat format) {
  const BlockSize block = block_of(format);
  return 8.0 * static_cast<double>(block.bytes) / static_cast<double>(block.cols * kPanelRows);
}

}  // namespace puna
