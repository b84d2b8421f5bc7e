// Functions of the position: exact at any length of context, where fp32 positions are not.
#include <cmath>
#include <numbers>

#include "check.h"
#include "model/spec.h"

namespace puna {
namespace {

constexpr int64_t kMostTokens = 10485760;       // Scout's context
constexpr int64_t kFp32End = int64_t{1} << 24;  // fp32 holds no odd numbers above

bool near(double got, long double expected, double units) {
  return std::fabs(static_cast<long double>(got) - expected) <=
         units * 0x1p-53L * std::fabs(expected);
}

// 1 + scale * ln(1 + steps), for a number of steps that is known.
long double temperature_after(int64_t steps, double scale) {
  return 1 + static_cast<long double>(scale) * std::log1p(static_cast<long double>(steps));
}

TEST(temperature_steps_where_the_floor_does) {
  for (const int64_t floor_scale : {int64_t{8192}, int64_t{100}, int64_t{3}}) {
    const int64_t steps = std::min<int64_t>(kMostTokens / floor_scale, 5000);
    const int64_t last = kMostTokens / floor_scale;
    for (int64_t i = 0; i <= steps; ++i) {
      const int64_t step = i < steps / 2 ? i : last - (steps - i);
      // Positions count from 0, and the step is one position early: p + 1 reaches the boundary.
      const int64_t first = step * floor_scale - 1;
      const double here = attention_temperature(std::max<int64_t>(first, 0), floor_scale, 0.1);
      CHECK(near(here, temperature_after(step, 0.1), 2));
      CHECK_EQ(attention_temperature(first + floor_scale - 1, floor_scale, 0.1), here);
      CHECK(attention_temperature(first + floor_scale, floor_scale, 0.1) > here);
    }
  }
}

TEST(temperature_has_the_values_of_the_papers_model) {
  CHECK_EQ(attention_temperature(0, 8192, 0.1), 1.0);
  CHECK_EQ(attention_temperature(8190, 8192, 0.1), 1.0);
  CHECK(std::fabs(attention_temperature(8191, 8192, 0.1) - 1.0693147180559945) < 1e-15);
  CHECK(std::fabs(attention_temperature(131071, 8192, 0.1) - 1.2833213344056216) < 1e-15);
  CHECK(std::fabs(attention_temperature(kMostTokens - 1, 8192, 0.1) - 1.7155396301896733) < 1e-15);
}

TEST(temperature_past_the_integers_of_fp32) {
  for (const int64_t base : {kFp32End, kFp32End * 3, int64_t{1} << 31, int64_t{1} << 40}) {
    for (int64_t i = -40; i <= 40; ++i) {
      const int64_t position = base + i;
      // Every position is a step of its own with a floor of 1; fp32 would join pairs of them.
      CHECK(near(attention_temperature(position, 1, 0.1), temperature_after(position + 1, 0.1), 2));
      const int64_t steps = (position + 1) / 3;
      CHECK(near(attention_temperature(position, 3, 0.1), temperature_after(steps, 0.1), 2));
    }
  }
}

TEST(frequencies_without_scaling) {
  for (const int64_t head_dim : {int64_t{16}, int64_t{24}, int64_t{128}}) {
    const std::vector<double> found = inverse_frequencies({.theta = 500000}, head_dim);
    CHECK_EQ(static_cast<int64_t>(found.size()), head_dim / 2);
    for (int64_t i = 0; i < head_dim / 2; ++i) {
      const long double exponent = -2.0L * i / head_dim;
      // The exponent is rounded, by half a unit of at most 1, and multiplied by ln(theta) = 13.
      CHECK(near(found[i], std::pow(500000.0L, exponent), 16));
    }
  }
}

TEST(frequencies_of_scout) {
  const RopeSpec scout{.theta = 500000, .llama3 = true, .factor = 16};
  const std::vector<double> plain = inverse_frequencies({.theta = 500000}, 128);
  const std::vector<double> scaled = inverse_frequencies(scout, 128);
  for (int64_t i = 0; i < 64; ++i) CHECK_EQ(scaled[i], i < 35 ? plain[i] : plain[i] / 16);
}

TEST(frequencies_with_a_band_that_is_mixed) {
  const RopeSpec llama31{.theta = 500000,
                         .llama3 = true,
                         .factor = 8,
                         .low_freq_factor = 1,
                         .high_freq_factor = 4,
                         .original_max_position = 8192};
  const std::vector<double> plain = inverse_frequencies({.theta = 500000}, 128);
  const std::vector<double> scaled = inverse_frequencies(llama31, 128);
  int mixed = 0;
  for (int64_t i = 0; i < 64; ++i) {
    const long double turns =
        8192 * static_cast<long double>(plain[i]) / (2 * std::numbers::pi_v<long double>);
    long double expected = plain[i];
    if (turns < 1) {
      expected /= 8;
    } else if (turns <= 4) {
      const long double share = (turns - 1) / 3;
      expected = (1 - share) * expected / 8 + share * expected;
      ++mixed;
    }
    CHECK(near(scaled[i], expected, 16));
  }
  CHECK(mixed > 3);
}

// What TextModel does with them: the angle of a chunked layer is (position mod chunk) * frequency
// in double, its cosine and sine rounded to fp32.
TEST(angles_within_a_chunk_are_those_of_absolute_positions) {
  constexpr int64_t kChunk = 8192;
  const std::vector<double> frequencies = inverse_frequencies({.theta = 500000}, 128);
  for (const int64_t query :
       {kChunk + 5, kMostTokens - 1, kFp32End + 8191, (int64_t{1} << 33) + 77}) {
    const int64_t start = query / kChunk * kChunk;
    for (const int64_t key : {start, start + (query - start) / 2, query}) {
      for (const double frequency : frequencies) {
        // Attention sees only the difference of two angles; this one is exact to 64 bits.
        const long double exact = static_cast<long double>(query - key) * frequency;
        const double a = static_cast<double>(query % kChunk) * frequency;
        const double b = static_cast<double>(key % kChunk) * frequency;
        const double cosine = std::cos(a) * std::cos(b) + std::sin(a) * std::sin(b);
        const double sine = std::sin(a) * std::cos(b) - std::cos(a) * std::sin(b);
        // Angles below 8192 are rounded by 2^-41; two of them, and four roundings of products.
        CHECK(std::fabs(cosine - std::cos(exact)) < 0x1p-39);
        CHECK(std::fabs(sine - std::sin(exact)) < 0x1p-39);
      }
    }
  }
}

}  // namespace
}  // namespace puna
