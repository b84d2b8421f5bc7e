// Session: one sequence of tokens and the turn that is being generated on it.
#include <algorithm>

#include "engine/state.h"
#include "platform/system.h"

namespace puna {

namespace {

// Index in `tokens` of the n-th image token (counted from 0), or the size if there are fewer.
int64_t place_of_image_row(const TokenList& tokens, int32_t image_token, int64_t n) {
  for (int64_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] == image_token && n-- == 0) return i;
  }
  return tokens.size();
}

}  // namespace

int64_t common_length(const TokenSequence& a, const TokenSequence& b, int32_t image_token) {
  int64_t common = a.tokens.common_length(b.tokens);
  for (size_t i = 0; i < std::max(a.images.size(), b.images.size()); ++i) {
    if (i < a.images.size() && i < b.images.size() && a.images[i].key == b.images[i].key) continue;
    const PlacedImage& image = i < a.images.size() ? a.images[i] : b.images[i];
    common = std::min(common, place_of_image_row((i < a.images.size() ? a : b).tokens, image_token,
                                                 image.first_row));
    break;
  }
  return common;
}

PrefixCache::Match PrefixCache::find(const TokenSequence& text, int64_t most, int32_t image_token,
                                     const KvStore& kv) {
  Match best;
  auto found = entries_.end();
  for (auto entry = entries_.begin(); entry != entries_.end(); ++entry) {
    const int64_t common =
        std::min({common_length(*entry, text, image_token), most, kv.readable(entry->sequence)});
    const int64_t length = kv.restorable(entry->sequence, common);
    if (length <= best.length) continue;
    best = {entry->sequence, length};
    found = entry;
  }
  if (found != entries_.end()) entries_.splice(entries_.begin(), entries_, found);
  return best;
}

void PrefixCache::put(TokenSequence text, KvStore& kv) {
  for (PlacedImage& image : text.images) image.pixels.reset();  // they are compared by their keys
  entries_.push_front(std::move(text));
  if (entries_.size() > kEntries) drop(kv);
}

bool PrefixCache::drop(KvStore& kv) {
  if (entries_.empty()) return false;
  kv.release(entries_.back().sequence);
  entries_.pop_back();
  return true;
}

Session::Session(std::shared_ptr<Engine> engine, std::unique_ptr<State> state)
    : engine_(std::move(engine)), state_(std::move(state)) {}

Session::~Session() {
  Engine::Impl& impl = *engine_->impl_;
  const std::lock_guard guard(impl.dropped_mutex);
  impl.dropped.push_back({std::move(state_->text), state_->reuse});
}

void Session::prompt(const Prompt& prompt, bool reuse) {
  Engine::Impl& impl = *engine_->impl_;
  const std::lock_guard turn(impl.turn);
  impl.require_open();
  impl.release_dropped();
  TokenSequence next = impl.place(prompt);
  TokenSequence& text = state_->text;
  next.sequence = text.sequence;
  // The last token is always computed: its logits choose the next one.
  const int64_t last = next.tokens.size() - 1;
  // What lies in a directory is not given up for a read that failed, which may be the moment's.
  const int64_t held =
      state_->on_disk ? impl.kv->length(text.sequence) : impl.kv->readable(text.sequence);
  const int64_t common = std::min({common_length(text, next, impl.info.image_token), last, held});
  int64_t kept = impl.kv->restorable(text.sequence, common);
  // One that lies in a directory keeps its own sequence: what it would share instead is attached to
  // no directory, and in the cache it would keep its own from others.
  const bool shares = reuse && !state_->on_disk;
  const PrefixCache::Match found =
      shares ? impl.prefixes.find(next, last, impl.info.image_token, *impl.kv)
             : PrefixCache::Match{};
  if (found.length > kept) {
    next.sequence = impl.kv->fork(found.sequence);
    kept = found.length;
    impl.kv->release(text.sequence);
  }
  impl.kv->truncate(next.sequence, kept);
  if (next.sequence == text.sequence && kept > 0) next.salt = text.salt;
  text = std::move(next);
  state_->reuse = shares;
  state_->prefilled = false;
  state_->begun = false;
  state_->timings = {};
  state_->timings.cached_tokens = kept;
  for (const PlacedImage& image : text.images) state_->timings.image_tokens += image.rows;
}

void Session::append(std::span<const int32_t> tokens) {
  Engine::Impl& impl = *engine_->impl_;
  const std::lock_guard turn(impl.turn);
  impl.require_open();
  TokenSequence& text = state_->text;
  impl.check_tokens(tokens, text.tokens.size());
  text.tokens.append(tokens);
  state_->begun = false;
  if (!state_->prefilled) return;  // still the same turn
  state_->prefilled = false;
  state_->timings = {};
  state_->timings.cached_tokens = impl.kv->length(text.sequence);
}

void Session::truncate(int64_t tokens) {
  Engine::Impl& impl = *engine_->impl_;
  const std::lock_guard turn(impl.turn);
  impl.require_open();
  TokenSequence& text = state_->text;
  if (tokens < 0 || tokens > text.tokens.size())
    fail(ErrorCode::kInvalidRequest, "[truncate] ", tokens,
         " tokens were asked for, the session has ", text.tokens.size());
  if (!text.images.empty())
    fail(ErrorCode::kInvalidRequest,
         "[truncate] the session holds pictures; give it a shorter prompt instead");
  const int64_t computed = std::min(tokens, impl.kv->length(text.sequence));
  impl.kv->truncate(text.sequence, impl.kv->restorable(text.sequence, computed));
  text.tokens.truncate(tokens);
  state_->begun = false;
  state_->prefilled = false;
  state_->timings = {};
  state_->timings.cached_tokens = impl.kv->length(text.sequence);
}

int64_t Session::pending() const {
  Engine::Impl& impl = *engine_->impl_;
  const std::lock_guard turn(impl.turn);
  impl.require_open();
  return state_->text.tokens.size() - impl.kv->length(state_->text.sequence);
}

int64_t Session::prefill(int64_t most, const Poll& poll) {
  if (most < 1)
    fail(ErrorCode::kInvalidRequest, "[prefill] ", most,
         " tokens were asked for; ask for 1 or more");
  Engine::Impl& impl = *engine_->impl_;
  const std::lock_guard turn(impl.turn);
  impl.require_open();
  impl.release_dropped();
  return impl.prefill(*state_, most, poll);
}

void Session::begin(const SamplingOptions& options) {
  Engine::Impl& impl = *engine_->impl_;
  engine_->check(options);
  State& state = *state_;
  if (state.attached && options.attention.kind != AttentionMode::Kind::kExact)
    fail(ErrorCode::kInvalidRequest, {.param = "attention"},
         "[begin] the session is on disk, where keys and values must be exact; use branch(), or a "
         "fork()");
  state.options = options;
  state.report = {};
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
  state.unreturned.reset();
  state.cancelled = false;
  state.begun = true;
}

StepResult Session::step(const Poll& poll) {
  Session* const self = this;
  return engine_->step({&self, 1}, poll).front();
}

std::vector<float> Session::outputs(ModelOutput output, int64_t most, const Poll& poll) {
  if (most < 1)
    fail(ErrorCode::kInvalidRequest, "[", name_of(output), "] ", most,
         " rows were asked for; ask for 1 or more");
  Engine::Impl& impl = *engine_->impl_;
  std::vector<float> host;
  impl.take_outputs(state_->text, output, most, poll, [&](ConstRows rows) {
    host.resize(static_cast<size_t>(rows.rows * rows.cols));
    if (rows.rows > 0) impl.backend->to_host(host.data(), rows);
  });
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
  state->timings.cached_tokens = impl.kv->length(state->text.sequence);
  return std::shared_ptr<Session>(new Session(engine_, std::move(state)));
}

int64_t Session::length() const {
  const std::lock_guard turn(engine_->impl_->turn);
  return state_->text.tokens.size();
}

int64_t Session::batch_rows() const { return engine_->impl_->plan.batch_rows; }

std::vector<int32_t> Session::tokens(int64_t first) const {
  const std::lock_guard turn(engine_->impl_->turn);
  const int64_t held = state_->text.tokens.size();
  first = std::clamp<int64_t>(first, 0, held);
  std::vector<int32_t> tokens;
  tokens.reserve(static_cast<size_t>(held - first));
  state_->text.tokens.copy_to(tokens, first, held - first);
  return tokens;
}

AttentionReport Session::attention() const {
  const std::lock_guard turn(engine_->impl_->turn);
  return state_->report;
}

Timings Session::timings() const {
  Engine::Impl& impl = *engine_->impl_;
  const std::lock_guard turn(impl.turn);
  Timings timings = state_->timings;
  timings.load_seconds = impl.info.load_seconds;
  timings.peak_bytes = peak_resident_bytes();
  if (!impl.closed) timings.kv_bytes = static_cast<int64_t>(impl.kv->bytes_in_use());
  return timings;
}

}  // namespace puna
