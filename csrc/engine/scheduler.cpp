// Packing sequences into forward passes, and turning logits into steps of sessions.
#include <algorithm>
#include <chrono>
#include <numeric>
#include <utility>

#include "engine/state.h"

namespace puna {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// FNV-1a over the pixels: an identity, not a defence.
uint64_t key_of(const PreparedPixels& pixels) {
  uint64_t key = 0xcbf29ce484222325ull;
  const auto* bytes = reinterpret_cast<const unsigned char*>(pixels.data.data());
  for (size_t i = 0; i < pixels.data.size() * sizeof(float); ++i)
    key = (key ^ bytes[i]) * 0x100000001b3ull;
  return key;
}

}  // namespace

std::shared_ptr<const ImageFeatures> FeatureCache::find(uint64_t key) {
  for (auto entry = entries_.begin(); entry != entries_.end(); ++entry) {
    if (entry->first != key) continue;
    entries_.splice(entries_.begin(), entries_, entry);
    return entry->second;
  }
  return nullptr;
}

void FeatureCache::make_room(size_t bytes) {
  for (const auto& [key, held] : entries_) bytes += held->buffer.bytes();
  while (!entries_.empty() && (entries_.size() >= kKeptPictures || bytes > kKeptPictureBytes)) {
    bytes -= entries_.back().second->buffer.bytes();
    entries_.pop_back();
  }
}

void FeatureCache::put(uint64_t key, std::shared_ptr<const ImageFeatures> features) {
  entries_.emplace_front(key, std::move(features));
}

void Engine::Impl::require_open() const {
  if (closed) fail(ErrorCode::kEngineClosed, "the engine was closed; load the model again");
}

void Engine::Impl::release_dropped() {
  std::vector<Dropped> gone;
  {
    const std::lock_guard guard(dropped_mutex);
    gone.swap(dropped);
  }
  for (Dropped& item : gone) {
    if (item.reuse && item.text.salt == 0 && kv->length(item.text.sequence) > 0)
      prefixes.put(std::move(item.text), *kv);
    else
      kv->release(item.text.sequence);
  }
}

void Engine::Impl::check_tokens(std::span<const int32_t> tokens, int64_t held) const {
  const int64_t length = held + static_cast<int64_t>(tokens.size());
  if (length > info.context) {
    const ErrorFacts facts{.asked = length, .limit = info.context};
    if (length > info.max_context) {
      fail(ErrorCode::kContextOverflow, facts, "[prompt] the prompt has ", length,
           " tokens, the context holds ", info.context, " and the model allows ", info.max_context,
           "; shorten it");
    }
    fail(ErrorCode::kContextOverflow, facts, "[prompt] the prompt has ", length,
         " tokens, the context holds ", info.context, " (the model allows ", info.max_context,
         "); shorten it or load with context=", length, " or more");
  }
  for (const int32_t token : tokens) {
    if (token < 0 || token >= info.vocab_size) {
      fail(ErrorCode::kInvalidRequest, "[prompt] token id ", token,
           " is outside the vocabulary of ", info.vocab_size);
    }
  }
}

TokenSequence Engine::Impl::place(const Prompt& prompt) const {
  if (prompt.tokens.empty()) {
    fail(ErrorCode::kInvalidRequest, {.param = "prompt"},
         "[prompt] the prompt has no tokens; give at least one");
  }
  check_tokens(prompt.tokens, 0);
  TokenSequence text;
  text.tokens = TokenList(prompt.tokens);
  const int64_t places = std::count(prompt.tokens.begin(), prompt.tokens.end(), info.image_token);
  int64_t rows = 0;
  for (const auto& pixels : prompt.images) {
    if (!vision) {
      fail(ErrorCode::kInvalidRequest,
           "[prompt] an image was given, but this model was loaded without a vision tower",
           spec.vision ? " (vision=False)" : " (a text-only checkpoint)");
    }
    if (pixels->size != info.image_size || static_cast<int64_t>(pixels->data.size()) !=
                                               pixels->tiles * 3 * pixels->size * pixels->size) {
      fail(ErrorCode::kImage, "[prompt] pixel values are (", pixels->tiles, ", 3, ", pixels->size,
           ", ", pixels->size, "), the model wants tiles of (3, ", info.image_size, ", ",
           info.image_size, ")");
    }
    const int64_t count = pixels->tiles * info.tokens_per_tile;
    text.images.push_back({pixels, key_of(*pixels), rows, count});
    rows += count;
  }
  // Without images the token stands for itself, as any other.
  if (!prompt.images.empty() && rows != places) {
    fail(ErrorCode::kInvalidRequest, "[prompt] the images fill ", rows,
         " places, but the prompt has the image token ", info.image_token, " ", places, " times");
  }
  return text;
}

std::shared_ptr<const ImageFeatures> Engine::Impl::features_of(const PlacedImage& image,
                                                               const Poll& poll) {
  if (auto found = features.find(image.key); found && found->rows.rows == image.rows) return found;
  if (image.pixels == nullptr)
    fail(ErrorCode::kInvalidRequest, "[prompt] the session ends within a picture of ", image.rows,
         " rows, whose pixels were not saved; give its whole prompt again");
  auto made = std::make_shared<ImageFeatures>();
  const int64_t hidden = info.hidden_size;
  const size_t bytes = static_cast<size_t>(image.rows * hidden) * sizeof(float);
  features.make_room(bytes);
  made->buffer = backend->allocate(bytes);
  const Rows rows(made->buffer.floats(), image.rows, hidden);
  vision->encode(rows, image.pixels->data, image.pixels->tiles, poll);
  made->rows = rows;
  features.put(image.key, made);
  return made;
}

ConstRows Engine::Impl::forward(std::span<const PassMember> members,
                                std::span<const int32_t> wanted_rows, ModelOutput output,
                                const Poll& poll) {
  std::vector<int32_t> ids;
  std::vector<TextBatch::Segment> segments;
  std::vector<KvStore::Append> appends;
  std::vector<std::vector<int32_t>> texts;
  std::vector<TextBatch::Features> placed;
  std::vector<std::shared_ptr<const ImageFeatures>> alive;
  for (const auto& [member, rows, mode, report] : members) {
    TokenSequence& text = *member;
    const int64_t begin = kv->length(text.sequence);
    segments.push_back({text.sequence, begin, rows, mode, report});
    const uint64_t salt = mode != nullptr ? ++last_salt : text.salt;
    int64_t first = 0;
    texts.push_back(unit_tokens(text, rows, &first));
    appends.push_back({text.sequence, rows, {texts.back(), runs_of(text), first, salt}});
    const auto first_row = static_cast<int64_t>(ids.size());
    text.tokens.copy_to(ids, begin, rows);
    if (text.images.empty()) continue;
    int64_t image_row = 0;
    text.tokens.each(begin, [&](int32_t token) { image_row += token == info.image_token; });
    const PlacedImage* last = nullptr;
    for (int64_t r = 0; r < rows; ++r) {
      const auto batch_row = static_cast<int32_t>(first_row + r);
      if (ids[batch_row] != info.image_token) continue;
      for (const PlacedImage& image : text.images) {
        if (image_row < image.first_row || image_row >= image.first_row + image.rows) continue;
        if (last != &image) {
          last = &image;
          alive.push_back(features_of(image, poll));
          const int64_t skipped = image_row - image.first_row;
          placed.push_back({alive.back()->rows.slice(skipped, image.rows - skipped), {}});
        }
        placed.back().rows.push_back(batch_row);
      }
      ++image_row;
    }
  }
  for (TextBatch::Features& part : placed) {
    part.features.rows = static_cast<int64_t>(part.rows.size());
  }
  const bool hidden_states = output == ModelOutput::kHiddenStates;
  const auto count = static_cast<int64_t>(wanted_rows.size());
  const int64_t columns = hidden_states ? spec.hidden : spec.vocab_size;
  const size_t bytes = static_cast<size_t>(count * columns) * sizeof(float);
  if (outputs.bytes() < bytes) outputs = backend->allocate(bytes);
  const Rows out(outputs.floats(), count, columns);
  const KvStore::Plan plan = with_room([&] {
    KvStore::Plan possible = kv->plan(appends);
    kv->apply(possible);
    return possible;
  });
  text->forward({.ids = ids,
                 .segments = segments,
                 .features = placed,
                 .logit_rows = wanted_rows,
                 .hidden_states = hidden_states},
                *kv, out, poll);
  kv->commit(plan);
  for (size_t i = 0; i < members.size(); ++i) members[i].text->salt = appends[i].text.salt;
  return out;
}

ConstRows Engine::Impl::next_outputs(TokenSequence& text, ModelOutput output, int64_t most,
                                     const Poll& poll) {
  const int64_t pending = text.tokens.size() - kv->length(text.sequence);
  if (pending == 0) return {};
  const int64_t rows = std::min({most, pending, kv->room(text.sequence), kEvaluationRows});
  std::vector<int32_t> wanted(static_cast<size_t>(rows));
  std::iota(wanted.begin(), wanted.end(), 0);
  const PassMember one{&text, rows};
  return forward({&one, 1}, wanted, output, [&] {
    require_open();
    if (poll) poll();
  });
}

std::vector<Engine::Impl::Chosen> Engine::Impl::choose(ConstRows logits,
                                                       std::span<Session::State* const> sessions) {
  using Choice = Sampler::Choice;
  const auto banned = [](const Session::State& session) {
    return session.emitted < session.options.min_tokens ? std::span<const int32_t>(session.stop_ids)
                                                        : std::span<const int32_t>();
  };
  const auto reports = [](const Session::State& session) {
    return session.options.want_logprobs || session.options.logprobs > 0;
  };
  std::vector<Choice> choices;
  std::vector<double> temperatures;  // of those that choose from candidates; else 0
  for (const Session::State* session : sessions) {
    choices.push_back(reports(*session) ? Choice::kOfWhole
                                        : session->sampler.choice(banned(*session)));
    temperatures.push_back(choices.back() == Choice::kOfCandidates ? session->options.temperature
                                                                   : 0);
  }
  const auto any = [&](Choice choice) {
    return std::find(choices.begin(), choices.end(), choice) != choices.end();
  };
  std::vector<int32_t> largest(sessions.size());
  if (any(Choice::kLargest)) backend->argmax(largest, logits);
  std::vector<Candidates> candidates;
  if (any(Choice::kOfCandidates)) candidates = backend->candidates(logits, temperatures);

  std::vector<Chosen> all(sessions.size());
  for (size_t i = 0; i < sessions.size(); ++i) {
    Session::State& session = *sessions[i];
    if (choices[i] == Choice::kLargest) {
      all[i].token = largest[i];
      continue;
    }
    if (choices[i] == Choice::kOfCandidates && !candidates.empty()) {
      if (const auto token = session.sampler.sample(candidates[i], logits.cols)) {
        all[i].token = *token;
        continue;
      }
    }
    std::vector<float> row(static_cast<size_t>(logits.cols));
    backend->to_host(row.data(), logits.slice(static_cast<int64_t>(i), 1));
    if (reports(session)) all[i].logits = row;  // the sampler overwrites the row
    all[i].token = session.sampler.sample(row, session.text.tokens, banned(session));
  }
  return all;
}

StepResult Engine::Impl::emit(Session::State& session, const Chosen& chosen) {
  StepResult result;
  const SamplingOptions& options = session.options;
  const int32_t token = chosen.token;
  session.sampler.accept(token);
  session.text.tokens.push_back(token);
  ++session.emitted;
  result.token = token;
  if (!chosen.logits.empty()) {
    result.logprob = log_probability(chosen.logits, token);
    if (options.logprobs > 0) result.top = top_log_probabilities(chosen.logits, options.logprobs);
  }
  if (std::find(session.stop_ids.begin(), session.stop_ids.end(), token) !=
      session.stop_ids.end()) {
    session.finish = FinishReason::kStop;
  } else if (session.decoder && token < tokenizer->vocab_size()) {
    // An id that only pads the vocabulary has no text.
    result.text = session.decoder->push(token);
    if (session.decoder->stopped()) {
      session.finish = FinishReason::kStop;
      session.stop = session.decoder->stop();
    }
  }
  const bool full = session.text.tokens.size() >= info.context;
  if (session.finish == FinishReason::kNone &&
      (full || (options.max_tokens > 0 && session.emitted >= options.max_tokens))) {
    session.finish = FinishReason::kLength;
  }
  if (session.finish != FinishReason::kNone && session.decoder && !session.decoder->stopped()) {
    result.text += session.decoder->finish();
  }
  result.finish = session.finish;
  result.stop = session.stop;
  return result;
}

int64_t Engine::Impl::prefill(Session::State& session, int64_t most, const Poll& poll) {
  TokenSequence& text = session.text;
  // The last token's logits choose the next one: it is left to step().
  const int64_t pending = text.tokens.size() - kv->length(text.sequence) - 1;
  const int64_t rows = std::min({most, pending, kv->room(text.sequence), plan.batch_rows});
  if (rows <= 0) return std::max<int64_t>(pending, 0);
  const Clock::time_point start = Clock::now();
  const PassMember one{&text, rows};
  forward({&one, 1}, {}, ModelOutput::kLogits, [&] {
    require_open();
    if (poll) poll();
  });
  session.timings.prefill_seconds += seconds_since(start);
  session.timings.prefill_tokens += rows;
  return pending - rows;
}

std::vector<StepResult> Engine::Impl::step(std::span<Session::State* const> sessions,
                                           const Poll& poll) {
  struct Cancelled {};
  std::vector<size_t> waiting;
  std::vector<bool> exact(sessions.size(), true);
  const auto finish_cancelled = [&](size_t i) {
    Session::State& session = *sessions[i];
    session.finish = FinishReason::kCancelled;
    StepResult& result = session.unreturned.emplace();
    if (session.decoder) result.text = session.decoder->finish();
    result.finish = session.finish;
  };
  for (size_t i = 0; i < sessions.size(); ++i) {
    Session::State& session = *sessions[i];
    if (!session.begun)
      fail(ErrorCode::kInvalidRequest, "[step] begin() was not called for this session");
    if (session.text.tokens.empty())
      fail(ErrorCode::kInvalidRequest, "[step] the session has no prompt");
    if (session.unreturned) continue;
    if (session.finish != FinishReason::kNone) {
      StepResult& result = session.unreturned.emplace();
      result.finish = session.finish;
      result.stop = session.stop;
    } else if (session.cancelled) {
      finish_cancelled(i);
    } else if (kv->length(session.text.sequence) == session.text.tokens.size()) {
      fail(ErrorCode::kInvalidRequest,
           "[step] logits() has computed every token of the session; give it a prompt again");
    } else {
      waiting.push_back(i);
      const int64_t pending = session.text.tokens.size() - kv->length(session.text.sequence);
      exact[i] = session.options.attention.kind == AttentionMode::Kind::kExact ||
                 pending > kMostApproximate;
    }
  }
  const Poll layer_poll = [&] {
    require_open();
    for (const size_t i : waiting) {
      if (sessions[i]->cancelled) throw Cancelled{};
    }
    if (poll) poll();
  };

  while (!waiting.empty()) {
    // As many rows of each waiting session as the pass, and its attention chunk, have room for. A
    // sequence whose last pending row is in the pass gets its logits and leaves.
    std::vector<PassMember> pass;
    std::vector<size_t> members, ending;
    std::vector<Session::State*> choosing;  // of `ending`
    std::vector<int32_t> logit_rows;
    int64_t used = 0;
    for (const size_t i : waiting) {
      Session::State& session = *sessions[i];
      TokenSequence& text = session.text;
      const int64_t pending = text.tokens.size() - kv->length(text.sequence);
      const int64_t take = std::min({pending, kv->room(text.sequence), plan.batch_rows - used});
      if (take <= 0) continue;
      used += take;
      pass.push_back(
          {&text, take, exact[i] ? nullptr : &session.options.attention, &session.report});
      members.push_back(i);
      if (take == pending) {
        ending.push_back(i);
        choosing.push_back(&session);
        logit_rows.push_back(static_cast<int32_t>(used - 1));
      }
    }
    const Clock::time_point start = Clock::now();
    ConstRows out;
    try {
      out = forward(pass, logit_rows, ModelOutput::kLogits, layer_poll);
    } catch (const Cancelled&) {
      for (const size_t i : waiting) {
        if (sessions[i]->cancelled) finish_cancelled(i);
      }
      // Not those that were cancelled since.
      std::erase_if(waiting, [&](size_t i) { return sessions[i]->finish != FinishReason::kNone; });
      continue;
    }
    if (ending.empty()) backend->to_host(nullptr, out);  // waits for the pass
    const std::vector<Chosen> chosen = choose(out, choosing);
    const double spent = seconds_since(start);
    for (size_t m = 0; m < members.size(); ++m) {
      Timings& timings = sessions[members[m]]->timings;
      const bool prefill = !sessions[members[m]]->prefilled;
      (prefill ? timings.prefill_seconds : timings.decode_seconds) += spent;
      (prefill ? timings.prefill_tokens : timings.decode_tokens) += pass[m].rows;
    }
    for (size_t e = 0; e < ending.size(); ++e) {
      Session::State& session = *sessions[ending[e]];
      session.unreturned = emit(session, chosen[e]);
      if (!session.prefilled) session.timings.first_token_seconds = session.timings.prefill_seconds;
      session.prefilled = true;
    }
    std::erase_if(waiting, [&](size_t i) {
      return std::find(ending.begin(), ending.end(), i) != ending.end();
    });
  }
  std::vector<StepResult> results(sessions.size());
  for (size_t i = 0; i < sessions.size(); ++i)
    if (sessions[i]->unreturned)  // else it is there twice
      results[i] = *std::exchange(sessions[i]->unreturned, std::nullopt);
  return results;
}

}  // namespace puna
