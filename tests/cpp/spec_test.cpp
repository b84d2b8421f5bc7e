// Functions of the position: exact at any length of context, where fp32 positions are not.
#include <algorithm>
#include <cmath>
#include <numbers>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
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

// A specification that no model has, of any mixture of what one may say.
ModelSpec any_spec(std::mt19937& random) {
  const auto pick = [&](int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(random);
  };
  const auto fraction = [&] { return std::uniform_real_distribution<double>(0.001, 1)(random); };
  ModelSpec spec;
  spec.multimodal = pick(0, 1) == 1;
  spec.vocab_size = pick(1, 300000);
  spec.hidden = pick(1, 8192);
  spec.kv_heads = pick(1, 8);
  spec.heads = spec.kv_heads * pick(1, 8);
  spec.head_dim = 2 * pick(1, 64);
  spec.rms_eps = fraction() / 1000;
  spec.tied_embeddings = pick(0, 1) == 1;
  spec.max_position = pick(1, kMostTokens);
  spec.temperature_floor = pick(1, 10000);
  spec.temperature_scale = fraction();
  spec.rope.theta = 1 + 1e6 * fraction();
  if (const int64_t kind = pick(0, 2); kind == 1) {
    spec.rope.llama3 = true;
    spec.rope.factor = 1 + 32 * fraction();
    spec.rope.low_freq_factor = fraction();
    spec.rope.high_freq_factor = 1 + fraction();
    spec.rope.original_max_position = static_cast<double>(pick(1, 8192));
  } else if (kind == 2) {
    for (int64_t i = 0; i < spec.head_dim / 2; ++i)
      spec.rope.divisors.push_back(static_cast<float>(fraction() * 16));
  }
  const int64_t experts = pick(1, 128), top_k = pick(1, experts),
                chunk = pick(0, 1) * pick(1, 9000);
  const int64_t expert_width = pick(1, 16384), dense_width = pick(1, 16384);
  const bool qk_norm = pick(0, 1) == 1, temperature = pick(0, 1) == 1;
  for (int64_t layers = pick(1, 9); layers > 0; --layers) {
    LayerSpec layer;
    layer.rope = pick(0, 1) == 1;
    layer.chunk = pick(0, 1) * chunk;
    layer.qk_norm = layer.rope && qk_norm;
    layer.temperature = !layer.rope && temperature;
    layer.moe = pick(0, 1) == 1;
    layer.experts = layer.moe ? experts : 0;
    layer.top_k = layer.moe ? top_k : 0;
    layer.intermediate = layer.moe ? expert_width : dense_width;
    spec.layers.push_back(layer);
  }
  const auto token = [&] { return static_cast<int32_t>(pick(-1, spec.vocab_size - 1)); };
  spec.bos_token = token();
  spec.pad_token = token();
  for (int64_t count = pick(0, 3); count > 0; --count)
    spec.eos_tokens.push_back(std::max(token(), 0));
  if (spec.multimodal) spec.image_token = token();
  if (spec.multimodal && pick(0, 1) == 1) {
    VisionSpec vision;
    vision.shuffle_factor = pick(1, 3);
    vision.patch_size = pick(1, 16);
    vision.image_size = vision.patch_size * vision.shuffle_factor * pick(1, 12);
    vision.heads = pick(1, 4);
    vision.hidden = vision.heads * 4 * pick(1, 16);
    vision.layers = pick(0, 40);
    vision.intermediate = vision.hidden * vision.shuffle_factor * vision.shuffle_factor;
    vision.adapter_width = vision.output_width = pick(1, 5000);
    vision.rope_theta = 1 + 1e5 * fraction();
    spec.vision = vision;
  }
  if (pick(0, 1) == 1) spec.generation.temperature = fraction();
  if (pick(0, 1) == 1) spec.generation.top_p = fraction();
  if (pick(0, 1) == 1) spec.generation.top_k = pick(0, 100);
  return spec;
}

TEST(a_specification_written_and_read_again_is_the_same) {
  std::mt19937 random(5);
  for (int i = 0; i < 2000; ++i) {
    const ModelSpec spec = any_spec(random);
    const ConfigTexts texts = config_texts(spec);
    ModelSpec again = parse_model_spec(texts.config, texts.generation_config);
    again.warnings.clear();
    CHECK(again == spec);
  }
}

TEST(divisors_of_rope_are_checked) {
  ModelSpec spec;
  spec.vocab_size = spec.hidden = 16;
  spec.heads = spec.kv_heads = 1;
  spec.head_dim = 4;
  spec.max_position = 64;
  spec.layers.resize(1);
  spec.layers[0].intermediate = 8;
  for (const std::vector<double>& divisors :
       {std::vector<double>{1}, {1, 2, 3}, {1, 0}, {1, -1}, {1, 1e7}}) {
    spec.rope.divisors = divisors;
    const std::string config = config_texts(spec).config;
    CHECK_THROWS(ErrorCode::kModelFormat, parse_model_spec(config));
  }
}

}  // namespace
}  // namespace puna
