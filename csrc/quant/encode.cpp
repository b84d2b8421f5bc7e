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

// Sums run in eight lanes that are joined in order, so that all compilers find the same bits, in
// vectors of four, which every baseline has: from loops over arrays GCC makes none here, and takes
// three times as long.
constexpr int64_t kLanes = 8;
typedef float Four __attribute__((vector_size(16)));

Four four_at(const float* values) {
  Four four;
  __builtin_memcpy(&four, values, sizeof(four));
  return four;
}

struct Sum {
  Four lane[2] = {};

  double total() const {
    double sum = 0;
    for (const Four& four : lane)
      for (int l = 0; l < 4; ++l) sum += four[l];
    return sum;
  }
};

// The weights of a group over 2^exponent, which makes the largest 0.5 to 1, and their importance
// over the largest one; padded to whole lanes with zeros that weigh nothing.
struct Group {
  float x[kMaxBlock], importance[kMaxBlock];
  int64_t count, padded;
  int exponent;
  float extreme = 0;  // of the largest magnitude
  float lowest, highest;

  Group(const float* values, const float* weights, int64_t n)
      : count(n), padded((n + kLanes - 1) / kLanes * kLanes) {
    float heaviest = 0;
    lowest = highest = values[0];
    for (int64_t i = 0; i < n; ++i) {
      lowest = std::min(lowest, values[i]);
      highest = std::max(highest, values[i]);
      if (weights) heaviest = std::max(heaviest, weights[i]);
    }
    extreme = -lowest > highest ? lowest : highest;
    std::frexp(extreme, &exponent);
    const double unit = std::ldexp(1.0, -exponent);
    for (int64_t i = 0; i < n; ++i) {
      x[i] = static_cast<float>(values[i] * unit);
      importance[i] = heaviest > 0 ? weights[i] / heaviest : 1.0f;
    }
    std::fill(x + n, x + padded, 0.0f);
    std::fill(importance + n, importance + padded, 0.0f);
    for (float* value : {&extreme, &lowest, &highest}) *value = static_cast<float>(*value * unit);
  }

  // A scale or offset of x as it is stored, and what is stored in units of x.
  uint16_t narrowed(double value) const { return stored(std::ldexp(value, exponent)); }
  float widened(uint16_t half) const {
    return static_cast<float>(std::ldexp(static_cast<double>(float_of_f16(half)), -exponent));
  }
};

// The numbers nearest to v that codes of the format stand for, without scale and offset.
template <class Format>
Four nearest(Four v) {
  if constexpr (Format::kTable) {
    // Steps between neighbours: whole numbers, so that their sum is exact.
    Four value = Four{} + static_cast<float>(kTable16[0] - Format::kZero);
    for (int i = 1; i < 16; ++i) {
      const float middle = (kTable16[i - 1] + kTable16[i]) * 0.5f - Format::kZero;
      value += v > middle ? Four{} + static_cast<float>(kTable16[i] - kTable16[i - 1]) : Four{};
    }
    return value;
  } else {
    constexpr float kLow = -Format::kZero, kHigh = (1 << Format::kBits) - 1 - Format::kZero;
    constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding it rounds, ties to even
    v = v < kLow ? Four{} + kLow : v;
    v = v > kHigh ? Four{} + kHigh : v;
    return (v + kToInteger) - kToInteger;
  }
}

template <class Format>
uint8_t code_of(float value) {
  const int number = static_cast<int>(value) + Format::kZero;
  if constexpr (Format::kTable)
    return static_cast<uint8_t>(std::find(kTable16, kTable16 + 16, number) - kTable16);
  else
    return static_cast<uint8_t>(number);
}

// Codes of x at the scale and offset that are stored.
template <class Format>
void round_to(const Group& group, uint16_t scale, uint16_t offset, RowBlock* to) {
  const float step = group.widened(scale), zero = group.widened(offset);
  const float inverse = step != 0.0f ? 1.0f / step : 0.0f;
  to->scale = scale;
  to->offset = offset;
  for (int64_t i = 0; i < Format::kGroup; i += 4) {
    Four exact{};
    for (int64_t l = 0; l < 4; ++l)
      if (i + l < group.count) exact[l] = (group.x[i + l] - zero) * inverse;
    const Four value = nearest<Format>(exact);
    for (int64_t l = 0; l < 4; ++l) to->codes[i + l] = code_of<Format>(value[l]);
  }
}

// How often the best candidate's scale is taken for another one.
constexpr int kRefinements = 2;

// x ~ scale * value. Candidates put the value of largest magnitude at the end of the codes that
// reaches further, a little before it, or beyond it, so that the others get finer steps. For the
// codes that follow, sums weighted by importance give the best scale, xq / qq, and the error that
// it leaves, xx - xq^2 / qq.
template <class Format>
void encode_symmetric(const Group& group, RowBlock* to) {
  constexpr auto value = [](int code) {
    return static_cast<float>((Format::kTable ? kTable16[code & 15] : code) - Format::kZero);
  };
  constexpr float kLow = value(0), kHigh = value((1 << Format::kBits) - 1);
  const float most = std::fabs(group.extreme);
  double scale = most / kHigh;
  // With 8 bits the steps are so fine that only the plain choice is worth its time.
  if (Format::kBits < 8 && most > 0) {
    double explained = 0;
    const auto consider = [&](float inverse) {
      Sum xq, qq;
      for (int64_t i = 0; i < group.padded; i += kLanes) {
        for (int64_t l = 0; l < 2; ++l) {
          const Four x = four_at(group.x + i + 4 * l);
          const Four q = nearest<Format>(x * inverse);
          const Four weighted = four_at(group.importance + i + 4 * l) * q;
          xq.lane[l] += weighted * x;
          qq.lane[l] += weighted * q;
        }
      }
      const double a = xq.total(), b = qq.total();
      if (b > 0 && a * a > explained * b) {
        explained = a * a / b;
        scale = a / b;
      }
    };
    consider(kHigh / most);
    for (int step = -3; step <= 7; ++step)
      consider(kLow * (1 + 0.05f * static_cast<float>(step)) / group.extreme);
    for (int i = 0; i < kRefinements; ++i) consider(static_cast<float>(1 / scale));
  }
  round_to<Format>(group, group.narrowed(scale), 0, to);
}

// With an offset: x ~ scale * code + offset, code in [0, 2^bits - 1]. Candidates take something off
// either end of the range; for their codes, a weighted line through (code, x) gives scale and
// offset. It leaves an error of xx' - qx'^2 / qq', the sums being of differences from the means.
template <class Format>
void encode_offset(const Group& group, RowBlock* to) {
  constexpr int kHigh = (1 << Format::kBits) - 1;
  // Columns past the matrix have code 0 and meet activations of 0: no need for zero to be hit.
  double scale = (static_cast<double>(group.highest) - group.lowest) / kHigh;
  double offset = group.lowest, explained = 0;
  Sum n, x;
  for (int64_t i = 0; i < group.padded; i += kLanes) {
    for (int64_t l = 0; l < 2; ++l) {
      const Four weight = four_at(group.importance + i + 4 * l);
      n.lane[l] += weight;
      x.lane[l] += weight * four_at(group.x + i + 4 * l);
    }
  }
  const double count = n.total(), x_sum = x.total();
  const auto consider = [&](double step, double zero) {
    if (!(step > 0)) return;
    const auto inverse = static_cast<float>(1 / step), shift = static_cast<float>(zero);
    Sum q, qq, qx;
    for (int64_t i = 0; i < group.padded; i += kLanes) {
      for (int64_t l = 0; l < 2; ++l) {
        const Four x = four_at(group.x + i + 4 * l);
        const Four code = nearest<Format>((x - shift) * inverse);
        const Four weighted = four_at(group.importance + i + 4 * l) * code;
        q.lane[l] += weighted;
        qq.lane[l] += weighted * code;
        qx.lane[l] += weighted * x;
      }
    }
    const double code_sum = q.total();
    const double spread = count * qq.total() - code_sum * code_sum;
    const double together = count * qx.total() - code_sum * x_sum;
    if (spread > 1e-6 * count * qq.total() && together * together > explained * spread) {
      explained = together * together / spread;
      scale = together / spread;
      offset = (x_sum - scale * code_sum) / count;
    }
  };
  const double range = static_cast<double>(group.highest) - group.lowest;
  for (int low = 0; low <= 3; ++low)
    for (int high = 0; low + high <= 3; ++high)
      consider(range * (1 - 0.07 * (low + high)) / kHigh, group.lowest + 0.07 * low * range);
  for (int i = 0; i < kRefinements; ++i) consider(scale, offset);
  round_to<Format>(group, group.narrowed(scale), group.narrowed(offset), to);
}

}  // namespace

bool can_encode(WeightFormat format) {
  return format == WeightFormat::kFP8 || can_encode_blocks(format);
}

bool can_encode_blocks(WeightFormat format) {
  return is_quantized(format) &&
         with_traits(format, [](auto traits) { return decltype(traits)::kSubBits == 0; });
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
    if constexpr (Format::kSubBits == 0) {
      const Group group{finite, importance, count};
      if constexpr (Format::kOffset)
        encode_offset<Format>(group, to);
      else
        encode_symmetric<Format>(group, to);
    }
  });
}

}  // namespace puna
