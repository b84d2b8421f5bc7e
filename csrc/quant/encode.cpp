#include "quant/encode.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "base/half.h"

namespace puna {
namespace {

// A scale as it is stored: fp16, never infinite.
uint16_t stored(double value) {
  constexpr double kLargestHalf = 65504.0;
  return f16_of_float(static_cast<float>(std::clamp(value, -kLargestHalf, kLargestHalf)));
}

struct Group {
  const float* x;
  const float* importance;  // or null
  int64_t count;

  double weight(int64_t i) const { return importance ? importance[i] : 1.0; }
};

// Codes of x at scale and offset, and the weighted squared error they leave.
template <int Low, int High>
double round_to(const Group& group, float scale, float offset, int* codes) {
  const double inverse = scale != 0.0f ? 1.0 / scale : 0.0;
  double error = 0;
  for (int64_t i = 0; i < group.count; ++i) {
    const double wanted = (static_cast<double>(group.x[i]) - offset) * inverse;
    codes[i] = static_cast<int>(std::lrint(std::clamp<double>(wanted, Low, High)));
    const double off = static_cast<double>(scale) * codes[i] + offset - group.x[i];
    error += group.weight(i) * off * off;
  }
  return error;
}

// The scale that minimises the error for given codes, by least squares.
double best_scale(const Group& group, const int* codes) {
  double xq = 0, qq = 0;
  for (int64_t i = 0; i < group.count; ++i) {
    xq += group.weight(i) * group.x[i] * codes[i];
    qq += group.weight(i) * codes[i] * codes[i];
  }
  return qq > 0 ? xq / qq : 0.0;
}

// Symmetric: x ~ scale * code with code in [-2^(bits-1), 2^(bits-1) - 1]. Candidates put the value
// of largest magnitude at the end that reaches further, or a little beyond it, so that the others
// get finer steps; each is improved once by least squares.
template <class Format>
void encode_symmetric(const Group& group, RowBlock* to) {
  constexpr int kLow = -Format::kZero, kHigh = (1 << Format::kBits) - 1 - Format::kZero;
  float extreme = 0;
  for (int64_t i = 0; i < group.count; ++i)
    if (std::fabs(group.x[i]) > std::fabs(extreme)) extreme = group.x[i];
  int codes[kMaxBlock], best[kMaxBlock] = {};
  uint16_t scale = 0;
  double least = std::numeric_limits<double>::infinity();
  const auto consider = [&](double candidate) {
    const uint16_t half = stored(candidate);
    const double error = round_to<kLow, kHigh>(group, float_of_f16(half), 0.0f, codes);
    if (error < least) {
      least = error;
      scale = half;
      std::copy_n(codes, group.count, best);
    }
  };
  // With 8 bits the steps are so fine that only the plain choice is worth its time.
  constexpr int kSteps = Format::kBits == 8 ? 0 : 9;
  consider(std::fabs(extreme) / kHigh);
  for (int step = -kSteps; kSteps > 0 && step <= kSteps; ++step) {
    const double reach = kLow - 0.1 * step;
    consider(extreme / reach);
    consider(best_scale(group, codes));
  }
  to->scale = scale;
  for (int64_t i = 0; i < group.count; ++i)
    to->codes[i] = static_cast<uint8_t>(best[i] + Format::kZero);
  for (int64_t i = group.count; i < Format::kGroup; ++i) to->codes[i] = Format::kZero;
}

// With an offset: x ~ scale * code + offset, code in [0, 2^bits - 1]. Candidates shrink the range
// between the extremes; each is improved by a weighted linear fit.
template <class Format>
void encode_offset(const Group& group, RowBlock* to) {
  constexpr int kHigh = (1 << Format::kBits) - 1;
  // Columns past the matrix have code 0 and meet activations of 0: no need for zero to be hit.
  const auto [lowest, highest] = std::minmax_element(group.x, group.x + group.count);
  int codes[kMaxBlock], best[kMaxBlock] = {};
  uint16_t scale = 0, offset = 0;
  double least = std::numeric_limits<double>::infinity();
  const auto consider = [&](double a, double b) {
    const uint16_t a16 = stored(a), b16 = stored(b);
    const double error = round_to<0, kHigh>(group, float_of_f16(a16), float_of_f16(b16), codes);
    if (error < least) {
      least = error;
      scale = a16;
      offset = b16;
      std::copy_n(codes, group.count, best);
    }
  };
  constexpr int kSteps = 10;
  const double middle = (static_cast<double>(*lowest) + *highest) / 2;
  const double half_range = (static_cast<double>(*highest) - *lowest) / 2;
  for (int step = 0; step <= kSteps; ++step) {
    const double reach = half_range * (1 - 0.04 * step);
    consider(2 * reach / kHigh, middle - reach);
    double n = 0, q = 0, qq = 0, x = 0, qx = 0;
    for (int64_t i = 0; i < group.count; ++i) {
      const double w = group.weight(i);
      n += w;
      q += w * codes[i];
      qq += w * codes[i] * codes[i];
      x += w * group.x[i];
      qx += w * codes[i] * group.x[i];
    }
    const double determinant = n * qq - q * q;
    if (determinant > 1e-12 * n * qq) {
      const double a = (n * qx - q * x) / determinant;
      consider(a, (x - a * q) / n);
    }
  }
  to->scale = scale;
  to->offset = offset;
  for (int64_t i = 0; i < Format::kGroup; ++i)
    to->codes[i] = i < group.count ? static_cast<uint8_t>(best[i]) : 0;
}

}  // namespace

bool can_encode(WeightFormat format) {
  return format == WeightFormat::kFP8 || can_encode_blocks(format);
}

bool can_encode_blocks(WeightFormat format) {
  return is_quantized(format) && with_traits(format, [](auto traits) {
           return !decltype(traits)::kSubScales && !decltype(traits)::kTable;
         });
}

void encode_block(WeightFormat format, const float* x, const float* importance, int64_t count,
                  RowBlock* to) {
  if (!can_encode_blocks(format))
    fail(ErrorCode::kUnsupported, "[quant] weights cannot be quantised to ", name_of(format),
         "; it is read from GGUF files only");
  float finite[kMaxBlock];
  constexpr float kLargest = std::numeric_limits<float>::max();
  for (int64_t i = 0; i < count; ++i)
    finite[i] = std::isnan(x[i]) ? 0.0f : std::clamp(x[i], -kLargest, kLargest);
  with_traits(format, [&](auto traits) {
    using Format = decltype(traits);
    if constexpr (!Format::kSubScales && !Format::kTable) {
      const Group group{finite, importance, count};
      if constexpr (Format::kOffset)
        encode_offset<Format>(group, to);
      else
        encode_symmetric<Format>(group, to);
    }
  });
}

}  // namespace puna
