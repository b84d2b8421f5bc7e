// Sessions on disk: saved, opened, and journaled chunk by chunk as they grow.
#include <filesystem>

#include "engine/state.h"

namespace puna {

namespace {

// Where the rows of pictures stand in a text: a run for each stretch of image tokens.
std::vector<KvImageRun> image_runs(const TokenSequence& text, int32_t image_token) {
  std::vector<KvImageRun> runs;
  if (text.images.empty()) return runs;
  int64_t position = 0, row = 0;
  size_t image = 0;
  text.tokens.each(text.tokens.size(), [&](int32_t token) {
    const int64_t here = position++;
    if (token != image_token) return;
    while (image + 1 < text.images.size() && row >= text.images[image + 1].first_row) ++image;
    const bool starts = row == text.images[image].first_row;
    ++row;
    if (!starts && runs.back().position + runs.back().rows == here)
      ++runs.back().rows;
    else
      runs.push_back({here, 1, text.images[image].key, starts});
  });
  return runs;
}

// The pictures of a text whose rows are computed: their pixels are gone, and not needed. In
// sessions of before runs did not say where a picture begins; there, a repeated one is taken for
// one.
std::vector<PlacedImage> placed_images(const std::vector<KvImageRun>& runs) {
  std::vector<PlacedImage> images;
  int64_t row = 0;
  for (const KvImageRun& run : runs) {
    if (images.empty() || run.begins || images.back().key != run.key)
      images.push_back({nullptr, run.key, row, 0});
    images.back().rows += run.rows;
    row += run.rows;
  }
  return images;
}

}  // namespace

std::vector<int32_t> Engine::Impl::unit_tokens(const TokenSequence& text, int64_t rows,
                                               int64_t* first) const {
  const int64_t unit = kv->geometry().unit();
  const int64_t begin = kv->length(text.sequence);
  *first = unit > 0 ? begin - begin % unit : begin;
  std::vector<int32_t> tokens;
  text.tokens.copy_to(tokens, *first, begin + rows - *first);
  return tokens;
}

const std::vector<KvImageRun>& Engine::Impl::runs_of(TokenSequence& text) const {
  if (text.runs.empty() && !text.images.empty()) text.runs = image_runs(text, info.image_token);
  return text.runs;
}

void Session::save(const std::string& path) {
  Engine::Impl& impl = *engine_->impl_;
  const std::lock_guard turn(impl.turn);
  impl.require_open();
  TokenSequence& text = state_->text;
  if (text.salt != 0)
    fail(ErrorCode::kInvalidRequest,
         "[session] attention that is not exact took part in this session's keys and values, which "
         "cannot be saved as its text's; compute the text again with exact attention");
  std::vector<int32_t> tokens;
  text.tokens.copy_to(tokens, 0, impl.kv->length(text.sequence));
  impl.kv->save(text.sequence, path, {tokens, impl.runs_of(text)});
}

void Session::flush() {
  Engine::Impl& impl = *engine_->impl_;
  const std::lock_guard turn(impl.turn);
  impl.require_open();
  impl.kv->flush(state_->text.sequence);
}

void Session::close() {
  Engine::Impl& impl = *engine_->impl_;
  const std::lock_guard turn(impl.turn);
  if (impl.closed) return;
  const KvStore::Sequence old = state_->text.sequence;
  state_->text = {};
  state_->on_disk = state_->attached = false;
  state_->text.sequence = impl.kv->create();
  impl.kv->release(old);
}

void Engine::Impl::check_opened(std::span<const int32_t> tokens, const std::string& path) const {
  if (const auto held = static_cast<int64_t>(tokens.size()); held > info.context)
    fail(ErrorCode::kContextOverflow, {.asked = held, .limit = info.context}, "[session] ", path,
         " holds ", held, " tokens, the context ", info.context, "; load with context=", held,
         " or more");
  // What is computed anew looks them up.
  for (const int32_t token : tokens)
    if (token < 0 || token >= info.vocab_size)
      fail(ErrorCode::kSessionMismatch, "[session] ", path, " is damaged: token id ", token,
           " is outside the vocabulary of ", info.vocab_size);
}

std::shared_ptr<Session> Engine::open(const std::string& path, bool resume) {
  const std::lock_guard turn(impl_->turn);
  impl_->require_open();
  impl_->release_dropped();
  auto state = std::make_unique<Session::State>();
  state->on_disk = true;
  state->attached = resume;
  TokenSequence& text = state->text;
  std::error_code ignored;  // what is wrong with the path is said when it is made
  if (resume && !std::filesystem::exists(std::filesystem::path(path) / "journal", ignored)) {
    text.sequence = impl_->kv->create();
    try {
      impl_->kv->attach(text.sequence, path, {});
    } catch (...) {
      impl_->kv->release(text.sequence);
      throw;
    }
  } else {
    KvStore::Opened opened = impl_->with_room([&] { return impl_->kv->open(path, resume); });
    text.sequence = opened.sequence;
    text.tokens = TokenList(opened.tokens);
    text.runs = std::move(opened.images);
    text.images = placed_images(text.runs);
    try {
      impl_->check_opened(opened.tokens, path);
    } catch (...) {
      impl_->kv->release(text.sequence);  // and with it the directory, for others to open
      throw;
    }
  }
  state->timings.cached_tokens = text.tokens.size();
  return std::shared_ptr<Session>(new Session(shared_from_this(), std::move(state)));
}

SessionReport Engine::verify(const std::string& path, const std::string& extent) {
  const Verify how = extent == "journal"   ? Verify::kJournal
                     : extent == "sampled" ? Verify::kSampled
                                           : Verify::kFull;
  const std::lock_guard turn(impl_->turn);
  impl_->require_open();
  const VerifyReport report = impl_->kv->verify(path, how);
  return {report.chunks, report.pages, report.good_tokens, report.fault};
}

int64_t Engine::truncate_session(const std::string& path, int64_t tokens) {
  const std::lock_guard turn(impl_->turn);
  impl_->require_open();
  return impl_->kv->truncate_session(path, tokens);
}

}  // namespace puna
