// The formats themselves: panels, GGUF's blocks against the formulas of their specification,
// quantising, and the plain product kernel against double.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "base/half.h"
#include "check.h"
#include "kernels/cpu/dispatch.h"
#include "quant/blocks.h"
#include "quant/encode.h"
#include "quant/repack.h"

namespace {

using namespace puna;

std::mt19937 random_source(20261125);

int64_t random_int(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random_source);
}
float random_normal() { return std::normal_distribution<float>()(random_source); }

std::vector<WeightFormat> quantized_formats() {
  std::vector<WeightFormat> formats = all_formats();
  std::erase_if(formats, [](WeightFormat format) { return !is_quantized(format); });
  return formats;
}

template <class Format>
RowBlock random_row_block() {
  using Layout = PanelLayout<Format>;
  RowBlock block{};
  block.scale = f16_of_float(random_normal() * 0.01f);
  block.offset = f16_of_float(random_normal() * 0.01f);
  for (int64_t g = 0; g < kMaxGroups; ++g) {
    block.sub_scale[g] = static_cast<int8_t>(random_int(Layout::kLeastSub, Layout::kMostSub));
    block.sub_offset[g] = static_cast<uint8_t>(random_int(Layout::kLeastSub, Layout::kMostSub));
  }
  for (int64_t c = 0; c < Format::kBlock; ++c)
    block.codes[c] = static_cast<uint8_t>(random_int(0, (1 << Format::kBits) - 1));
  return block;
}

// float16 narrowing: every half survives the round trip, and midpoints go to even.
TEST(half_precision_rounds_to_even) {
  for (uint32_t h = 0; h < 0x10000; ++h) {
    const float value = float_of_f16(static_cast<uint16_t>(h));
    if (std::isnan(value)) {
      CHECK(std::isnan(float_of_f16(f16_of_float(value))));
      continue;
    }
    CHECK(f16_of_float(value) == h);
    if (h % 0x8000 >= 0x7bff) continue;
    const float next = float_of_f16(static_cast<uint16_t>(h + 1));
    const float middle = (value + next) / 2;
    CHECK(f16_of_float(middle) == (h % 2 ? h + 1 : h));
    CHECK(f16_of_float(std::nextafterf(middle, value)) == h);
    CHECK(f16_of_float(std::nextafterf(middle, next)) == h + 1);
  }
  CHECK(f16_of_float(65520.0f) == 0x7c00);
  CHECK(f16_of_float(65519.0f) == 0x7bff);
  CHECK(f16_of_float(-1e30f) == 0xfc00);
}

// Rows written to a block come back whole, in any order of writing, and nothing else changes.
TEST(rows_come_back_from_panels) {
  for (const WeightFormat format : quantized_formats()) {
    with_traits(format, [&](auto traits) {
      using Format = decltype(traits);
      std::vector<uint8_t> memory(PanelLayout<Format>::kBytes + 64, 0xa5);
      std::vector<RowBlock> rows;
      std::vector<int64_t> order;
      for (int64_t r = 0; r < kPanelRows; ++r) {
        rows.push_back(random_row_block<Format>());
        order.push_back(r);
      }
      std::shuffle(order.begin(), order.end(), random_source);
      for (const int64_t r : order) put_row_block<Format>(memory.data(), r, rows[r]);
      for (int64_t r = 0; r < kPanelRows; ++r) {
        RowBlock back{};
        get_row_block<Format>(memory.data(), r, &back);
        CHECK(back.scale == rows[r].scale);
        if (Format::kOffset) CHECK(back.offset == rows[r].offset);
        CHECK(!std::memcmp(back.codes, rows[r].codes, Format::kBlock));
        if (Format::kSubBits > 0)
          CHECK(!std::memcmp(back.sub_scale, rows[r].sub_scale, PanelLayout<Format>::kGroups));
        if (Format::kSubBits > 0 && Format::kOffset)
          CHECK(!std::memcmp(back.sub_offset, rows[r].sub_offset, PanelLayout<Format>::kGroups));
      }
      for (size_t i = PanelLayout<Format>::kBytes; i < memory.size(); ++i) CHECK(memory[i] == 0xa5);
      CHECK(PanelLayout<Format>::kBytes % 64 == 0);
    });
  }
}

// Blocks moved into panels directly: the bytes of taking them apart, in every row, and no others.
TEST(blocks_are_repacked_as_taken_apart) {
  for (const DType dtype :
       {DType::kQ4_0, DType::kQ4_1, DType::kQ5_0, DType::kQ5_1, DType::kQ8_0, DType::kQ2_K,
        DType::kQ3_K, DType::kQ4_K, DType::kQ5_K, DType::kQ6_K, DType::kIQ4_NL, DType::kIQ4_XS}) {
    const WeightFormat format = exact_format(dtype).value();
    with_traits(format, [&](auto traits) {
      using Format = decltype(traits);
      constexpr int64_t kBlocks = 3;
      const size_t block_bytes = info_of(dtype).block_bytes;
      std::vector<uint8_t> blocks(kBlocks * block_bytes);
      std::vector<uint8_t> panel(kBlocks * PanelLayout<Format>::kBytes, 0xa5), expected = panel;
      for (int64_t r = 0; r < kPanelRows; ++r) {
        for (uint8_t& byte : blocks) byte = static_cast<uint8_t>(random_int(0, 255));
        for (int64_t b = 0; b < kBlocks; ++b) {
          RowBlock block{};
          unpack_block(dtype, &blocks[b * block_bytes], &block);
          put_row_block<Format>(&expected[b * PanelLayout<Format>::kBytes], r, block);
        }
        repack_blocks(dtype, blocks.data(), kBlocks, r, panel.data());
        CHECK(panel == expected);
      }
    });
  }
}

TEST(formats_have_names_and_sizes) {
  std::set<std::string> names;
  for (const WeightFormat format : all_formats()) {
    CHECK(names.insert(name_of(format)).second);
    CHECK(format_of(name_of(format)) == format);
  }
  CHECK(!format_of("int7"));
  CHECK(bits_per_weight(WeightFormat::kInt4G32) == 4.5);
  CHECK(bits_per_weight(WeightFormat::kInt4G128) == 4.125);
  CHECK(bits_per_weight(WeightFormat::kInt6K) == 6.5625);
  CHECK(packed_bytes(WeightFormat::kBF16, 65, 3) == 2 * 2 * 64 * 4);
}

// The quantiser: error no larger than that of plain rounding, zero for what a format can say
// exactly, importance respected, hostile values survived.
TEST(quantising_is_no_worse_than_rounding) {
  for (const WeightFormat format : quantized_formats()) {
    if (!can_encode(format)) continue;
    with_traits(format, [&](auto traits) {
      using Format = decltype(traits);
      for (int round = 0; round < 200; ++round) {
        const int64_t count = round % 3 ? Format::kBlock : random_int(1, Format::kBlock);
        std::vector<float> x(count), importance(count);
        for (int64_t c = 0; c < count; ++c) {
          x[c] = random_normal() * (round % 5 == 0 && c % 17 == 0 ? 0.3f : 0.02f);
          importance[c] = std::exp(random_normal());
        }
        const bool weighted = round % 2;
        RowBlock block{};
        encode_block(format, x.data(), weighted ? importance.data() : nullptr, count, &block);
        // Plain rounding between the extremes; of a table, to the values it has.
        const auto [low, high] = std::minmax_element(x.begin(), x.end());
        constexpr int kTop = Format::kTable ? kTable16[15] : (1 << Format::kBits) - 1;
        const float scale = Format::kOffset
                                ? (*high - *low) / kTop
                                : std::max(-*low, *high) / static_cast<float>(kTop - Format::kZero);
        const float offset = Format::kOffset ? *low : 0.0f;
        double error = 0, plain = 0, narrowing = 0;
        for (int64_t c = 0; c < count; ++c) {
          const double w = weighted ? importance[c] : 1.0;
          const double exact = scale > 0 ? (x[c] - offset) / static_cast<double>(scale) : 0.0;
          double code = std::rint(exact);
          if (Format::kTable) {
            code = kTable16[0] - Format::kZero;
            for (const int value : kTable16)
              if (std::fabs(value - Format::kZero - exact) < std::fabs(code - exact))
                code = value - Format::kZero;
          }
          error += w * std::pow(weight_of<Format>(block, c) - x[c], 2);
          plain += w * std::pow(code * scale + offset - x[c], 2);
          narrowing += w * std::pow((std::fabs(code * scale) + std::fabs(offset)) * 0x1p-11, 2);
        }
        // Scale and offset are rounded to fp16 (2^-11), which plain rounding is spared here.
        CHECK(std::sqrt(error) <= std::sqrt(plain) + std::sqrt(narrowing) + 1e-7);
        for (int64_t c = count; c < Format::kBlock; ++c)
          CHECK(Format::kOffset ? block.codes[c] == 0
                                : std::abs(code_value<Format>(block.codes[c])) <= Format::kTable);
      }
      std::vector<float> x(Format::kBlock, 0.0f);
      RowBlock block{};
      encode_block(format, x.data(), nullptr, Format::kBlock, &block);
      for (int64_t c = 0; c < Format::kBlock; ++c) CHECK(weight_of<Format>(block, c) == 0.0f);
      x[0] = std::nanf("");
      x[1] = -INFINITY;
      x[2] = 3e38f;
      encode_block(format, x.data(), nullptr, Format::kBlock, &block);
      for (int64_t c = 0; c < Format::kBlock; ++c)
        CHECK(std::isfinite(weight_of<Format>(block, c)));
    });
  }
}

// What is chosen is the same wherever and however it is computed: these are the bits of the plain
// loops, one weight at a time, with which quantising began.
TEST(quantising_finds_the_same_bits) {
  const std::map<std::string, uint64_t> expected = {
      {"int8", 0x01bd626b437e9522u},         {"int4_32", 0xeec834cd1b58ee91u},
      {"int4_64", 0x1ede7653f740bf34u},      {"int4_128", 0x6b9479f8f508e77au},
      {"int4_min_32", 0x5b554833a2694434u},  {"int4_min_64", 0xbfbe4583322b631du},
      {"int4_min_128", 0x7fd310d0f67ea9a4u}, {"int5_32", 0x852c28b174ca4dfdu},
      {"int5_min_32", 0x5248c496aed15d31u},  {"table4_32", 0x788a1632a4e5f6efu},
      {"table4_64", 0x3310dc6a9bf98524u},    {"table4_128", 0xabe7bbc63c7a6b7bu},
  };
  for (const WeightFormat format : quantized_formats()) {
    if (!can_encode(format)) continue;
    std::mt19937 random(7);
    const auto uniform = [&] { return static_cast<float>(random() >> 8) * 0x1p-24f; };
    uint64_t hash = 1469598103934665603u;  // FNV-1a
    const auto add = [&](unsigned value) { hash = (hash ^ value) * 1099511628211u; };
    for (int round = 0; round < 300; ++round) {
      const int64_t group = group_of(format);
      const int64_t count = round % 4 ? group : 1 + static_cast<int64_t>(random() % group);
      std::vector<float> x(count), importance(count);
      for (int64_t c = 0; c < count; ++c) {
        x[c] = (uniform() + uniform() + uniform() - 1.5f) * 0.02f;
        importance[c] = uniform();
      }
      RowBlock block{};
      encode_block(format, x.data(), round % 2 ? importance.data() : nullptr, count, &block);
      add(block.scale);
      add(block.offset);
      for (int64_t c = 0; c < group; ++c) add(block.codes[c]);
    }
    CHECK_EQ(hash, expected.at(name_of(format)));
  }
}

// The plain kernel (what every instruction set must equal) against double on the decoded weights.
TEST(plain_product_is_close_to_double) {
  const KernelTable kernels = resolve_isa("scalar");
  for (const WeightFormat format : quantized_formats()) {
    with_traits(format, [&](auto traits) {
      using Format = decltype(traits);
      using Layout = PanelLayout<Format>;
      const int64_t blocks = Format::kBlock == 256 ? 2 : 5, padded = blocks * Format::kBlock;
      const int64_t cols = padded - random_int(0, Format::kBlock - 1), rows = 3, width = 37;
      const int64_t groups = padded / Format::kGroup;
      const int64_t spans = (padded + kActivationGroup - 1) / kActivationGroup;
      std::vector<uint8_t> panel(blocks * Layout::kBytes);
      std::vector<double> weights(width * padded);
      for (int64_t n = 0; n < kPanelRows; ++n)
        for (int64_t b = 0; b < blocks; ++b) {
          const RowBlock block = random_row_block<Format>();
          put_row_block<Format>(panel.data() + b * Layout::kBytes, n, block);
          for (int64_t c = 0; n < width && c < Format::kBlock; ++c) {
            const int64_t g = c / Format::kGroup;
            weights[n * padded + b * Format::kBlock + c] =
                static_cast<double>(group_scale<Format>(block, g)) *
                    code_value<Format>(block.codes[c]) +
                group_offset<Format>(block, g);
          }
        }
      std::vector<int8_t> codes(rows * padded, 99);
      std::vector<float> scales(rows * spans), out(rows * 40, 7.0f), bias(width);
      std::vector<int32_t> sums(rows * groups);
      std::vector<double> x(rows * padded);
      for (float& b : bias) b = random_normal();
      for (int64_t r = 0; r < rows; ++r) {
        std::vector<float> row(cols);
        for (float& value : row) value = random_normal();
        kernels.quantize_row(&codes[r * padded], &scales[r * spans], &sums[r * groups], row.data(),
                             cols, padded, Format::kGroup);
        for (int64_t c = 0; c < padded; ++c) {
          const float scale = scales[r * spans + c / kActivationGroup];
          x[r * padded + c] = static_cast<double>(codes[r * padded + c]) * scale;
          if (c < cols)
            CHECK(std::fabs(x[r * padded + c] - row[c]) <= 0.5000001 * scale);
          else
            CHECK(codes[r * padded + c] == 0);
        }
      }
      kernels.gemm_quantized[quantized_index(format)](
          out.data(), 40, {codes.data(), scales.data(), sums.data(), padded, spans, groups},
          panel.data(), bias.data(), rows, width);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t n = 0; n < width; ++n) {
          double sum = bias[n], size = std::fabs(bias[n]);
          for (int64_t c = 0; c < padded; ++c) {
            const double term = x[r * padded + c] * weights[n * padded + c];
            sum += term;
            size += std::fabs(term);
          }
          // Two roundings a group with an offset, one for each scale of the activations, one for
          // the bias.
          const double tolerance =
              size * std::ldexp(static_cast<double>(2 * groups + spans + 2), -24);
          CHECK(std::fabs(out[r * 40 + n] - sum) <= tolerance);
        }
        for (int64_t n = width; n < 40; ++n) CHECK(out[r * 40 + n] == 7.0f);
      }
    });
  }
}

}  // namespace
