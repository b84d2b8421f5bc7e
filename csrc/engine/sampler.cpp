#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <unordered_set>

#include "base/argmax.h"
#include "base/error.h"

namespace puna {

namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// The finaliser of splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators).
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

double log_sum_exp(std::span<const float> logits) {
  const float top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float x : logits) sum += std::exp(static_cast<double>(x) - top);
  return top + std::log(sum);
}

template <class Number>
void require(bool ok, const char* name, Number value, const char* range) {
  if (ok) return;
  fail(ErrorCode::kInvalidRequest, {.param = name}, "[sampling] ", name, " is ", value,
       "; it must be ", range);
}

// An id that an option holds.
void require_token(int32_t token, int64_t vocab_size, const char* name) {
  if (token >= 0 && token < vocab_size) return;
  fail(ErrorCode::kInvalidRequest, {.param = name}, "[sampling] ", name, " holds the token id ",
       token, "; the vocabulary has the ids 0 to ", vocab_size - 1);
}

}  // namespace

double uniform_random(uint64_t seed, uint64_t index) {
  return static_cast<double>(mix(mix(seed) ^ mix(index + 0x6a09e667f3bcc909ull)) >> 11) * 0x1p-53;
}

void check_sampling(const SamplingOptions& o, int64_t vocab_size) {
  // Written so that NaN fails each test.
  require(o.temperature >= 0 && o.temperature <= 100, "temperature", o.temperature,
          "from 0 to 100");
  require(o.top_p > 0 && o.top_p <= 1, "top_p", o.top_p, "above 0 and at most 1");
  require(o.top_k >= 0, "top_k", o.top_k, "0 (off) or more");
  require(o.min_p >= 0 && o.min_p < 1, "min_p", o.min_p, "from 0 (off) to below 1");
  require(o.repetition_penalty > 0 && o.repetition_penalty <= 100, "repetition_penalty",
          o.repetition_penalty, "above 0 and at most 100");
  require(std::abs(o.presence_penalty) <= 100, "presence_penalty", o.presence_penalty,
          "from -100 to 100");
  require(std::abs(o.frequency_penalty) <= 100, "frequency_penalty", o.frequency_penalty,
          "from -100 to 100");
  require(o.max_tokens >= 0, "max_tokens", o.max_tokens, "1 or more");
  require(o.min_tokens >= 0, "min_tokens", o.min_tokens, "0 or more");
  if (o.max_tokens > 0 && o.min_tokens > o.max_tokens) {
    fail(ErrorCode::kInvalidRequest, {.param = "min_tokens"}, "[sampling] min_tokens is ",
         o.min_tokens, ", more than max_tokens, which is ", o.max_tokens);
  }
  require(o.logprobs >= 0 && o.logprobs <= vocab_size, "logprobs", o.logprobs,
          "from 0 to the vocabulary's size");
  for (const auto& [token, bias] : o.logit_bias) {
    require_token(token, vocab_size, "logit_bias");
    if (!(bias >= -1e9 && bias <= 1e9)) {
      fail(ErrorCode::kInvalidRequest, {.param = "logit_bias"}, "[sampling] logit_bias of token ",
           token, " is ", bias, "; it must be from -1e9 (bans the token) to 1e9");
    }
  }
  const AttentionMode& attention = o.attention;
  require(attention.tau > 0 && attention.tau <= 1, "tau", attention.tau, "above 0 and at most 1");
  require(attention.delta >= 0 && attention.delta < 1, "delta", attention.delta,
          "from 0 (the worst case) to below 1");
  require(attention.fraction >= 0 && attention.fraction <= 1, "fraction", attention.fraction,
          "from 0 to 1");
  require(attention.sample >= 0 && attention.sample <= 1, "sample", attention.sample,
          "from 0 (none) to 1");
  require(attention.sink_pages >= 0, "sink_pages", attention.sink_pages, "0 or more");
  require(attention.recent_pages >= 0, "recent_pages", attention.recent_pages, "0 or more");
  for (const int32_t token : o.stop_ids) require_token(token, vocab_size, "stop");
  for (const std::string& stop : o.stop) {
    if (stop.empty()) {
      fail(ErrorCode::kInvalidRequest, {.param = "stop"},
           "[sampling] a stop string is empty; leave it out");
    }
  }
}

Sampler::Sampler(const SamplingOptions& options) : options_(options) {}

void Sampler::accept(int32_t token) { ++emitted_[token]; }

bool Sampler::changes_logits(std::span<const int32_t> banned) const {
  return options_.repetition_penalty != 1.0 || options_.presence_penalty != 0 ||
         options_.frequency_penalty != 0 || !options_.logit_bias.empty() || !banned.empty();
}

Sampler::Choice Sampler::choice(std::span<const int32_t> banned) const {
  if (changes_logits(banned)) return Choice::kOfWhole;
  if (is_greedy()) return Choice::kLargest;
  return is_cut() ? Choice::kOfCandidates : Choice::kOfWhole;
}

int32_t Sampler::sample(std::span<float> logits, const TokenList& context,
                        std::span<const int32_t> banned) {
  if (options_.repetition_penalty != 1.0) {
    // Keskar et al. 2019 (CTRL): a seen token's logit is divided if positive and multiplied if
    // negative.
    const float penalty = static_cast<float>(options_.repetition_penalty);
    std::unordered_set<int32_t> seen;
    context.each(context.size(), [&](int32_t token) { seen.insert(token); });
    for (const int32_t token : seen) {
      float& x = logits[token];
      x = x > 0 ? x / penalty : x * penalty;
    }
  }
  if (options_.presence_penalty != 0 || options_.frequency_penalty != 0) {
    for (const auto& [token, count] : emitted_) {
      logits[token] -= static_cast<float>(options_.presence_penalty +
                                          options_.frequency_penalty * static_cast<double>(count));
    }
  }
  for (const auto& [token, bias] : options_.logit_bias) logits[token] += static_cast<float>(bias);
  for (const int32_t token : banned) logits[token] = kMinusInfinity;

  if (is_greedy()) return argmax(logits);
  if (!is_cut()) return draw(logits);

  const size_t vocab = logits.size();
  heap_.resize(vocab);
  for (size_t i = 0; i < vocab; ++i) heap_[i] = {logits[i], static_cast<int32_t>(i)};
  double total = 0;
  if (keep_of(vocab) == vocab) {
    const float top = logits[argmax(logits)];
    for (const float x : logits) total += weight_of(x, top);
  }
  return *draw_cut(vocab, {total, total});  // there is one: all candidates are there
}

std::optional<int32_t> Sampler::sample(const Candidates& candidates, int64_t vocab_size) {
  if (candidates.largest.empty()) return std::nullopt;
  heap_ = candidates.largest;
  return draw_cut(static_cast<size_t>(vocab_size), {candidates.total * (1 - candidates.error),
                                                    candidates.total * (1 + candidates.error)});
}

size_t Sampler::keep_of(size_t vocab) const {
  return options_.top_k > 0 ? std::min<size_t>(options_.top_k, vocab) : vocab;
}

double Sampler::weight_of(float logit, float top) const {
  return std::exp((static_cast<double>(logit) - top) / options_.temperature);
}

// From heap_, the likeliest of `vocab` tokens. The weights of all, summed as sample() does, are
// within `total`: where a comparison is the same with both bounds, it is with that sum. None: it
// takes more candidates, or a sum that is better known.
std::optional<int32_t> Sampler::draw_cut(size_t vocab, Bounds total) {
  const size_t keep = keep_of(vocab), size = heap_.size();
  const auto worse = [](const Candidate& a, const Candidate& b) { return is_likelier(b, a); };
  // A heap gives the candidates in order and stops as soon as top_p or min_p is met: the nucleus is
  // usually a few hundred of 200,000 tokens.
  std::make_heap(heap_.begin(), heap_.end(), worse);
  const float top = heap_.front().logit;
  // The one that comes after so many.
  const auto pop = [&](size_t taken) -> const Candidate& {
    std::pop_heap(heap_.begin(), heap_.end() - static_cast<int64_t>(taken), worse);
    return heap_[size - 1 - taken];
  };
  weights_.clear();
  const bool is_top_k = keep < vocab;
  if (is_top_k) {
    if (keep > size) return std::nullopt;
    double sum = 0;
    for (size_t taken = 0; taken < keep; ++taken) {
      weights_.push_back(weight_of(pop(taken).logit, top));
      sum += weights_.back();
    }
    total = {sum, sum};
  }
  double kept = 0;
  size_t count = 0;
  while (count < keep) {
    if (count == size) return std::nullopt;
    if (!is_top_k) weights_.push_back(weight_of(pop(count).logit, top));
    // The most likely token has weight 1, so min_p compares with the weights directly.
    if (count > 0) {
      if (weights_[count] < options_.min_p) break;
      if (options_.top_p < 1) {
        if (kept >= options_.top_p * total.high) break;
        if (kept >= options_.top_p * total.low) return std::nullopt;
      }
    }
    kept += weights_[count++];
  }
  double left = uniform_random(options_.seed, drawn_++) * kept;
  for (size_t i = 0; i < count; ++i) {
    left -= weights_[i];
    if (left < 0) return heap_[size - 1 - i].id;
  }
  return heap_[size - count].id;  // rounding left nothing over: the last candidate
}

// The whole distribution: no order is needed, so the draw walks the vocabulary by id.
int32_t Sampler::draw(std::span<const float> logits) {
  const float top = *std::max_element(logits.begin(), logits.end());
  double total = 0;
  for (const float x : logits) total += weight_of(x, top);
  double left = uniform_random(options_.seed, drawn_++) * total;
  int32_t last = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    const double weight = weight_of(logits[i], top);
    if (weight == 0) continue;
    last = static_cast<int32_t>(i);
    left -= weight;
    if (left < 0) break;
  }
  return last;
}

double log_probability(std::span<const float> logits, int32_t token) {
  return static_cast<double>(logits[token]) - log_sum_exp(logits);
}

std::vector<TokenLogprob> top_log_probabilities(std::span<const float> logits, int count) {
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto n = std::min<size_t>(count, order.size());
  std::partial_sort(
      order.begin(), order.begin() + static_cast<int64_t>(n), order.end(),
      [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
  const double total = log_sum_exp(logits);
  std::vector<TokenLogprob> top;
  for (size_t i = 0; i < n; ++i)
    top.push_back({order[i], static_cast<double>(logits[order[i]]) - total});
  return top;
}

}  // namespace puna
