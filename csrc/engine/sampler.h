// From logits to the next token: penalties, bias, temperature, top-k, top-p, min-p, draw.
//
// Order (that of transformers and vLLM): repetition, presence and frequency penalties and
// logit_bias change the logits; then temperature; then top_k, top_p and min_p each cut the
// distribution that the one before left. Ties are broken by the lower token id. The random number
// of the n-th token of a turn is a function of (seed, n) alone, so a seed gives the same text on
// any number of threads.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "backend/backend.h"
#include "base/token_list.h"
#include "puna/types.h"

namespace puna {

// Throws InvalidRequest naming the option that is out of range.
void check_sampling(const SamplingOptions& options, int64_t vocab_size);

class Sampler {
 public:
  Sampler() = default;
  explicit Sampler(const SamplingOptions& options);

  // What sample() would look at: nothing but the largest logit (base/argmax.h), the likeliest ones,
  // or the whole row. `banned` as there.
  enum class Choice { kLargest, kOfCandidates, kOfWhole };
  Choice choice(std::span<const int32_t> banned) const;

  // Where choice() is kOfCandidates: the token that the whole row would give; none: only it can
  // tell, and nothing has changed.
  std::optional<int32_t> sample(const Candidates& candidates, int64_t vocab_size);
  // `context` are the tokens seen so far (prompt and output) for the repetition penalty; `banned`
  // ids are never drawn. `logits` is overwritten.
  int32_t sample(std::span<float> logits, const TokenList& context,
                 std::span<const int32_t> banned);
  // To be told of every token that is emitted (presence and frequency count the output only).
  void accept(int32_t token);

 private:
  struct Bounds {
    double low, high;
  };
  bool is_greedy() const { return options_.temperature == 0 || options_.top_k == 1; }
  bool is_cut() const { return options_.top_k > 0 || options_.top_p < 1 || options_.min_p > 0; }
  bool changes_logits(std::span<const int32_t> banned) const;
  size_t keep_of(size_t vocab) const;
  double weight_of(float logit, float top) const;
  std::optional<int32_t> draw_cut(size_t vocab, Bounds total);
  int32_t draw(std::span<const float> logits);

  SamplingOptions options_;
  uint64_t drawn_ = 0;  // random numbers: one for each token of a turn that is not greedy
  std::unordered_map<int32_t, int64_t> emitted_;
  std::vector<Candidate> heap_;
  std::vector<double> weights_;
};

// log softmax(logits)[token], in double.
double log_probability(std::span<const float> logits, int32_t token);
// The `count` most likely tokens, most likely first.
std::vector<TokenLogprob> top_log_probabilities(std::span<const float> logits, int count);

// Uniform in [0, 1), a function of (seed, index) only.
double uniform_random(uint64_t seed, uint64_t index);

}  // namespace puna
