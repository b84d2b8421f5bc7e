// Session: one sequence of tokens and the turn that is being generated on it.
#include <algorithm>
#include <numeric>

#include "engine/state.h"
#include "platform/system.h"

namespace puna {

namespace {

// Index in `tokens` of the n-th image token (counted from 0), or the size if there are fewer.
int64_t place_of_image_row(const std::vector<int32_t>& tokens, int32_t image_token, int64_t n) {
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] == image_token && n-- == 0) return static_cast<int64_t>(i);
  }
  return static_cast<int64_t>(tokens.size());
}

// Length of the common start of two sequences, images included.
int64_t common_length(const TokenSequence& a, const TokenSequence& b, int32_t image_token) {
  const size_t shorter = std::min(a.tokens.size(), b.tokens.size());
  int64_t common = std::mismatch(a.tokens.begin(), a.tokens.begin() + static_cast<int64_t>(shorter),
                                 b.tokens.begin())
                       .first -
                   a.tokens.begin();
  for (size_t i = 0; i < std::max(a.images.size(), b.images.size()); ++i) {
    if (i < a.images.size() && i < b.images.size() && a.images[i].key == b.images[i].key) continue;
    const PlacedImage& image = i < a.images.size() ? a.images[i] : b.images[i];
    common = std::min(common, place_of_image_row((i < a.images.size() ? a : b).tokens, image_token,
                                                 image.first_row));
    break;
  }
  return common;
}

}  // namespace

Session::Session(std::shared_ptr<Engine> engine, std::unique_ptr<State> state)
    : engine_(std::move(engine)), state_(std::move(state)) {}

Session::~Session() {
  Engine::Impl& impl = *engine_->impl_;
  const std::lock_guard guard(impl.dropped_mutex);
  impl.dropped.push_back(state_->text.sequence);
}

void Session::prompt(const Prompt& prompt) {
  Engine::Impl& impl = *engine_->impl_;
  const std::lock_guard turn(impl.turn);
  impl.require_open();
  impl.release_dropped();
  TokenSequence next = impl.place(prompt);
  TokenSequence& text = state_->text;
  next.sequence = text.sequence;
  // The last token is always computed: its logits choose the next one.
  const int64_t last = static_cast<int64_t>(next.tokens.size()) - 1;
  const int64_t common = std::min(
      {common_length(text, next, impl.info.image_token), last, impl.kv->length(text.sequence)});
  const int64_t kept = impl.kv->restorable(text.sequence, common);
  impl.kv->truncate(text.sequence, kept);
  text = std::move(next);
  state_->begun = false;
  state_->timings = {};
  state_->timings.cached_tokens = kept;
  for (const PlacedImage& image : text.images) state_->timings.image_tokens += image.rows;
}

void Session::begin(const SamplingOptions& options) {
  Engine::Impl& impl = *engine_->impl_;
  engine_->check(options);
  State& state = *state_;
  state.options = options;
  state.sampler = Sampler(options);
  state.decoder.reset();
  if (impl.tokenizer) state.decoder.emplace(*impl.tokenizer, options.stop);
  state.stop_ids = options.stop_ids;
  if (!options.ignore_eos) {
    state.stop_ids.insert(state.stop_ids.end(), impl.info.eos_tokens.begin(),
                          impl.info.eos_tokens.end());
  }
  state.emitted = 0;
  state.finish = FinishReason::kNone;
  state.stop.clear();
  state.prefilled = false;
  state.cancelled = false;
  state.begun = true;
}

StepResult Session::step(const Poll& poll) {
  Session* const self = this;
  return engine_->step({&self, 1}, poll).front();
}

std::vector<float> Session::logits(int64_t most, const Poll& poll) {
  if (most < 1)
    fail(ErrorCode::kInvalidRequest, "[logits] ", most, " rows were asked for; ask for 1 or more");
  Engine::Impl& impl = *engine_->impl_;
  const std::lock_guard turn(impl.turn);
  impl.require_open();
  impl.release_dropped();
  TokenSequence& text = state_->text;
  const int64_t pending = static_cast<int64_t>(text.tokens.size()) - impl.kv->length(text.sequence);
  if (pending == 0) return {};
  const int64_t rows = std::min({most, pending, impl.kv->room(text.sequence), kEvaluationRows});
  std::vector<int32_t> wanted(static_cast<size_t>(rows));
  std::iota(wanted.begin(), wanted.end(), 0);
  TokenSequence* const one = &text;
  const ConstRows out = impl.forward({&one, 1}, {&rows, 1}, wanted, [&] {
    impl.require_open();
    if (poll) poll();
  });
  std::vector<float> host(static_cast<size_t>(out.rows * out.cols));
  impl.backend->to_host(host.data(), out);
  return host;
}

void Session::cancel() { state_->cancelled = true; }

std::shared_ptr<Session> Session::fork() {
  Engine::Impl& impl = *engine_->impl_;
  const std::lock_guard turn(impl.turn);
  impl.require_open();
  auto state = std::make_unique<State>();
  state->text = state_->text;
  state->text.sequence = impl.kv->fork(state_->text.sequence);
  return std::shared_ptr<Session>(new Session(engine_, std::move(state)));
}

int64_t Session::length() const { return static_cast<int64_t>(state_->text.tokens.size()); }

std::vector<int32_t> Session::tokens() const { return state_->text.tokens; }

Timings Session::timings() const {
  Timings timings = state_->timings;
  Engine::Impl& impl = *engine_->impl_;
  timings.load_seconds = impl.info.load_seconds;
  timings.peak_bytes = peak_resident_bytes();
  const std::lock_guard turn(impl.turn);
  if (!impl.closed) timings.kv_bytes = static_cast<int64_t>(impl.kv->bytes_in_use());
  return timings;
}

}  // namespace puna
