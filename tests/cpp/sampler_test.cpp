// The sampler on a row's largest elements: the token of the whole row, or none.
#include "engine/sampler.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <random>

#include "check.h"

using namespace puna;

namespace {

constexpr int64_t kVocab = 3000;

// The likeliest `count` of a row, as a backend would give them, with a total that is as far off as
// it may be.
Candidates candidates_of(const std::vector<float>& row, size_t count, double temperature,
                         double error, bool is_high) {
  std::vector<Candidate> order;
  for (size_t i = 0; i < row.size(); ++i) order.push_back({row[i], static_cast<int32_t>(i)});
  std::sort(order.begin(), order.end(), is_likelier);
  // None that is left out is as large.
  while (count < order.size() && count > 0 && order[count].logit == order[count - 1].logit) ++count;
  Candidates made;
  made.error = error;
  for (const float x : row)
    made.total += std::exp((static_cast<double>(x) - order[0].logit) / temperature);
  made.total *= is_high ? 1 + 0.999 * error : 1 - 0.999 * error;
  made.largest.assign(order.begin(), order.begin() + static_cast<int64_t>(count));
  std::reverse(made.largest.begin(), made.largest.end());
  return made;
}

std::vector<float> random_row(std::mt19937& random, bool with_ties) {
  std::normal_distribution<float> normal(0, 3);
  std::vector<float> row(kVocab);
  for (float& x : row) x = with_ties ? std::floor(4 * normal(random)) / 4 : normal(random);
  return row;
}

}  // namespace

TEST(candidates_give_the_token_of_the_whole_row) {
  std::mt19937 random(1);
  int known = 0, left = 0;
  for (int trial = 0; trial < check::trials(400); ++trial) {
    SamplingOptions options;
    options.temperature = std::array{0.3, 0.6, 1.0, 2.0}[random() % 4];
    options.top_p = std::array{0.1, 0.9, 0.99, 1.0}[random() % 4];
    options.top_k = std::array{0, 2, 40, 5000}[random() % 4];
    options.min_p = std::array{0.0, 0.0, 0.05, 0.5}[random() % 4];
    options.seed = random();
    Sampler whole(options), few(options);
    if (whole.choice({}) != Sampler::Choice::kOfCandidates) {
      CHECK(options.top_p == 1 && options.top_k == 0 && options.min_p == 0);
      continue;
    }
    for (int token = 0; token < 6; ++token) {
      std::vector<float> row = random_row(random, trial % 2 == 0);
      // The error is far more than a backend's, so that it matters.
      const Candidates candidates =
          candidates_of(row, std::array{1, 30, 300, 3000}[random() % 4], options.temperature,
                        std::array{1e-10, 0.01}[random() % 2], random() % 2 == 0);
      const std::optional<int32_t> got = few.sample(candidates, kVocab);
      std::vector<float> again = row;
      const int32_t expected = whole.sample(row, TokenList(), {});
      ++(got ? known : left);
      if (got) CHECK_EQ(*got, expected);
      // As the engine does: the random numbers go on as if nothing had been tried.
      if (!got) CHECK_EQ(few.sample(again, TokenList(), {}), expected);
    }
  }
  CHECK(known > left && left > 0);
}

// A total known as well as a backend knows it decides, wherever there are enough candidates.
TEST(a_total_to_many_digits_decides) {
  std::mt19937 random(2);
  SamplingOptions options;  // the defaults
  for (int trial = 0; trial < 100; ++trial) {
    options.seed = random();
    std::vector<float> row = random_row(random, false);
    const Candidates candidates = candidates_of(row, 2000, options.temperature, 1e-10, trial % 2);
    const std::optional<int32_t> got = Sampler(options).sample(candidates, kVocab);
    CHECK(got.has_value());
    if (got) CHECK_EQ(*got, Sampler(options).sample(row, TokenList(), {}));
  }
}

TEST(rows_without_candidates_are_left) {
  CHECK(!Sampler(SamplingOptions()).sample(Candidates(), kVocab));
}

// What changes logits, or looks at all of them, takes the whole row.
TEST(what_a_token_is_chosen_by) {
  using Choice = Sampler::Choice;
  const auto choice = [](auto change, std::span<const int32_t> banned = {}) {
    SamplingOptions options;
    change(options);
    return Sampler(options).choice(banned);
  };
  const int32_t banned[] = {3};
  const auto greedy = [](SamplingOptions& o) { o.temperature = 0; };
  const auto nothing = [](SamplingOptions&) {};
  CHECK(choice(nothing) == Choice::kOfCandidates);
  CHECK(choice(nothing, banned) == Choice::kOfWhole);
  CHECK(choice(greedy) == Choice::kLargest);
  CHECK(choice(greedy, banned) == Choice::kOfWhole);
  CHECK(choice([](SamplingOptions& o) { o.top_k = 1; }) == Choice::kLargest);
  CHECK(choice([](SamplingOptions& o) { o.top_p = 1; }) == Choice::kOfWhole);
  for (const bool is_greedy : {false, true}) {
    const auto with = [&](auto change) {
      return choice([&](SamplingOptions& o) {
        o.temperature = is_greedy ? 0 : 0.6;
        change(o);
      });
    };
    CHECK(with([](SamplingOptions& o) { o.repetition_penalty = 1.1; }) == Choice::kOfWhole);
    CHECK(with([](SamplingOptions& o) { o.presence_penalty = 0.1; }) == Choice::kOfWhole);
    CHECK(with([](SamplingOptions& o) { o.frequency_penalty = -0.1; }) == Choice::kOfWhole);
    CHECK(with([](SamplingOptions& o) { o.logit_bias = {{3, 1.0}}; }) == Choice::kOfWhole);
  }
}
