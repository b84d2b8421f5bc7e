// What every fast form of the quantised products must do, against the plain form: shared by the
// tests of the instruction sets this machine has and of those that are emulated.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/half.h"
#include "check.h"
#include "kernels/cpu/dispatch.h"
#include "quant/format.h"

namespace quantized_checks {

using namespace puna;

// How hard codes and activations are: kExtreme has only the least and the greatest, so that any sum
// that overflows an intermediate shows.
enum class Values { kRandom, kExtreme, kTop };

struct Product {
  WeightFormat format;
  int64_t rows, padded, spans, groups, width;
  std::vector<uint8_t> panel;
  std::vector<int8_t> codes;
  std::vector<float> scales, bias;
  std::vector<int32_t> sums;

  Product(WeightFormat format, int64_t rows, int64_t blocks, int64_t width, Values values,
          std::mt19937_64& random)
      : format(format), rows(rows), width(width) {
    const auto draw = [&](int64_t low, int64_t high) {
      return std::uniform_int_distribution<int64_t>(low, high)(random);
    };
    std::normal_distribution<float> normal;
    with_traits(format, [&](auto traits) {
      using Format = decltype(traits);
      using Layout = PanelLayout<Format>;
      constexpr int64_t kTop = (1 << Format::kBits) - 1;
      padded = blocks * Format::kBlock;
      groups = padded / Format::kGroup;
      spans = (padded + kActivationGroup - 1) / kActivationGroup;
      panel.resize(blocks * Layout::kBytes);
      for (int64_t b = 0; b < blocks; ++b) {
        for (int64_t n = 0; n < kPanelRows; ++n) {
          RowBlock block{};
          block.scale = f16_of_float(normal(random) * 0.01f);
          block.offset = f16_of_float(normal(random) * 0.01f);
          for (int64_t g = 0; g < kMaxGroups; ++g) {
            block.sub_scale[g] = static_cast<int8_t>(draw(Layout::kLeastSub, Layout::kMostSub));
            block.sub_offset[g] = static_cast<uint8_t>(draw(Layout::kLeastSub, Layout::kMostSub));
          }
          for (int64_t c = 0; c < Format::kBlock; ++c) {
            const int64_t code = values == Values::kTop       ? kTop
                                 : values == Values::kExtreme ? draw(0, 1) * kTop
                                                              : draw(0, kTop);
            block.codes[c] = static_cast<uint8_t>(code);
          }
          put_row_block<Format>(panel.data() + b * Layout::kBytes, n, block);
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t g = 0; g < groups; ++g) {
          int32_t sum = 0;
          for (int64_t c = 0; c < Format::kGroup; ++c) {
            const int64_t code = values == Values::kTop       ? (r % 2 ? -127 : 127)
                                 : values == Values::kExtreme ? draw(0, 1) * 254 - 127
                                                              : draw(-127, 127);
            codes.push_back(static_cast<int8_t>(code));
            sum += static_cast<int32_t>(code);
          }
          sums.push_back(sum);
        }
        for (int64_t i = 0; i < spans; ++i) scales.push_back(std::fabs(normal(random)) * 0.02f);
      }
    });
    if (draw(0, 1))
      for (int64_t n = 0; n < width; ++n) bias.push_back(normal(random));
  }

  // Rows [first, first + count).
  std::vector<float> run(KernelTable::GemmQuantized gemm, int64_t first, int64_t count,
                         int64_t out_stride) const {
    std::vector<float> out(count * out_stride, 12345.0f);
    gemm(out.data(), out_stride,
         {codes.data() + first * padded, scales.data() + first * spans,
          sums.data() + first * groups, padded, spans, groups},
         panel.data(), bias.empty() ? nullptr : bias.data(), count, width);
    return out;
  }
};

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](float x, float y) { return bits_of_float(x) == bits_of_float(y); });
}

// Products of `kernels` have the bits of the plain form, and what lies past `width` is left alone.
inline void check_products(const KernelTable& kernels, int trials) {
  const KernelTable plain = resolve_isa("scalar");
  std::mt19937_64 random(20261125);
  const auto draw = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  for (int index = 0; index < kQuantizedFormats; ++index) {
    const auto format = static_cast<WeightFormat>(kFirstQuantized + index);
    const auto compare = [&](int64_t rows, int64_t blocks, int64_t width, Values values) {
      const Product product(format, rows, blocks, width, values, random);
      const int64_t out_stride = width + draw(0, 3);
      check::report(same_bits(product.run(kernels.gemm_quantized[index], 0, rows, out_stride),
                              product.run(plain.gemm_quantized[index], 0, rows, out_stride)),
                    __FILE__, __LINE__,
                    std::string(kernels.isa) + " " + name_of(format) + ": " + std::to_string(rows) +
                        " rows, " + std::to_string(blocks) + " blocks, " + std::to_string(width) +
                        " wide: other bits than the plain form");
    };
    for (const Values values : {Values::kExtreme, Values::kTop}) {
      compare(1, 2, kPanelRows, values);
      compare(9, 2, kPanelRows, values);
    }
    for (int64_t rows = 1; rows <= 9; ++rows)
      compare(rows, draw(1, 10), draw(1, kPanelRows), Values::kRandom);
    for (int i = 0; i < trials; ++i)
      compare(draw(1, 20), draw(1, 20), draw(1, kPanelRows), Values::kRandom);
    compare(133, 3, 7, Values::kRandom);  // more than a block of rows
  }
}

// A row has the same bits alone, among others, and in any place.
inline void check_rows_are_independent(const KernelTable& kernels, int trials) {
  std::mt19937_64 random(7);
  const auto draw = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  for (int index = 0; index < kQuantizedFormats; ++index) {
    const auto format = static_cast<WeightFormat>(kFirstQuantized + index);
    const Product product(format, 140, 5, kPanelRows, Values::kRandom, random);
    const auto gemm = kernels.gemm_quantized[index];
    const std::vector<float> all = product.run(gemm, 0, product.rows, kPanelRows);
    for (int i = 0; i < trials; ++i) {
      const int64_t first = draw(0, product.rows - 1);
      const int64_t count = i % 2 ? 1 : draw(1, product.rows - first);
      const auto start = all.begin() + first * kPanelRows;
      check::report(same_bits(product.run(gemm, first, count, kPanelRows),
                              std::vector<float>(start, start + count * kPanelRows)),
                    __FILE__, __LINE__,
                    std::string(kernels.isa) + " " + name_of(format) + ": rows " +
                        std::to_string(first) + " + " + std::to_string(count) +
                        " have other bits alone");
    }
  }
}

// Codes, scales and sums of `kernels` are those of the plain form. Where a value of a group is not
// finite its scale is NaN, and its codes are anybody's.
inline void check_quantizing(const KernelTable& kernels, int trials) {
  const KernelTable plain = resolve_isa("scalar");
  std::mt19937_64 random(11);
  std::normal_distribution<float> normal;
  const auto draw = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  struct Quantized {
    std::vector<int8_t> codes;
    std::vector<float> scales;
    std::vector<int32_t> sums;
  };
  for (int trial = 0; trial < trials; ++trial) {
    const int64_t group = int64_t{16} << draw(0, 3), block = std::max(group, draw(0, 1) * 256);
    const int64_t cols = draw(1, 700), padded = (cols + block - 1) / block * block;
    const int64_t spans = (padded + kActivationGroup - 1) / kActivationGroup;
    std::vector<float> x(cols);
    for (float& value : x) value = normal(random);
    for (int i = 0; i < 8; ++i) {
      constexpr float kInfinity = std::numeric_limits<float>::infinity();
      const float odd[] = {0x1p-100f, 0x1p-101f, -3.4e38f, 1e-40f, std::nanf(""), kInfinity};
      if (trial % 4 == 0) x[draw(0, cols - 1)] = odd[draw(0, 5)];
    }
    if (trial % 5 == 0)
      std::fill_n(x.begin(), std::min(cols, 2 * kActivationGroup), draw(0, 1) ? 0.0f : 1e-39f);
    if (trial % 3 == 0)  // halves, whose codes are ties
      for (float& value : x) value = std::rint(value * 40) * 0.5f;
    if (trial % 3 == 0) x[0] = 127.0f;
    const auto quantized = [&](const KernelTable& table) {
      Quantized out{std::vector<int8_t>(padded, 99), std::vector<float>(spans, 99),
                    std::vector<int32_t>(padded / group, 99)};
      table.quantize_row(out.codes.data(), out.scales.data(), out.sums.data(), x.data(), cols,
                         padded, group);
      return out;
    };
    const Quantized fast = quantized(kernels), truth = quantized(plain);
    bool same = true;
    for (int64_t g = 0; g < padded / group; ++g) {
      const int64_t span = g * group / kActivationGroup;
      if (std::isnan(truth.scales[span])) {
        same &= std::isnan(fast.scales[span]);
        continue;
      }
      same &= bits_of_float(fast.scales[span]) == bits_of_float(truth.scales[span]);
      same &= fast.sums[g] == truth.sums[g];
      for (int64_t c = g * group; c < (g + 1) * group; ++c) same &= fast.codes[c] == truth.codes[c];
    }
    check::report(same, __FILE__, __LINE__,
                  std::string(kernels.isa) + ": quantising " + std::to_string(cols) +
                      " columns, summed in groups of " + std::to_string(group) +
                      " differs from the plain form");
  }
}

}  // namespace quantized_checks
