#include "text/tokenizer.h"

#include <algorithm>
#include <mutex>

#include "base/error.h"
#include "platform/thread_pool.h"
#include "text/meta_cut.h"
#include "text/piece_encoder.h"
#include "text/pretokenizer.h"
#include "text/table_file.h"
#include "text/unicode_classes.h"

namespace puna {

namespace {

// What a thread takes at a time: long enough for its start and end not to matter, short enough for
// threads to end together.
constexpr size_t kBlockBytes = size_t{256} << 10;
// English has 4 to 5 bytes a token. More is made room for as it comes.
constexpr size_t kBytesPerId = 4;
// Of a wide text at a time: stays in the processor's caches.
constexpr size_t kWideBytes = size_t{64} << 10;

bool reads_special(const EncodeOptions& options) {
  return options.special.all || !options.special.names.empty();
}

}  // namespace

struct Tokenizer::Shared {
  explicit Shared(BpeModel m) : model(std::move(m)) {}

  std::shared_ptr<ThreadPool> threads(int lanes) {
    const std::lock_guard lock(mutex);
    if (!pool || (lanes != 0 && pool->lanes() != lanes)) pool = std::make_shared<ThreadPool>(lanes);
    return pool;
  }

  BpeModel model;
  std::mutex mutex;
  std::vector<std::unique_ptr<PieceEncoder>> idle;
  std::shared_ptr<ThreadPool> pool;
};

Tokenizer::Lease::Lease(Shared& shared) : shared_(shared) {
  {
    const std::lock_guard lock(shared_.mutex);
    if (!shared_.idle.empty()) {
      encoder_ = std::move(shared_.idle.back());
      shared_.idle.pop_back();
    }
  }
  if (!encoder_) encoder_ = std::make_unique<PieceEncoder>(shared_.model);
}

Tokenizer::Lease::~Lease() {
  const std::lock_guard lock(shared_.mutex);
  shared_.idle.push_back(std::move(encoder_));
}

Tokenizer::Lease Tokenizer::lease() const { return Lease(*shared_); }

Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Tokenizer::Tokenizer(BpeModel model, std::vector<AddedToken> added)
    : shared_(std::make_unique<Shared>(std::move(model))), added_(std::move(added)) {
  is_special_.assign(static_cast<size_t>(vocab_size()), false);
  for (const AddedToken& token : added_) {
    special_tokens_.emplace_hint(special_tokens_.end(), token.name, token.id);
    is_special_[static_cast<size_t>(token.id)] = token.special;
    begins_added_[static_cast<uint8_t>(token.name[0])] = true;
  }
  if (std::count(begins_added_.begin(), begins_added_.end(), true) == 1) {
    only_begin_ = static_cast<uint8_t>(added_[0].name[0]);
  }
}

void Tokenizer::save(TableWriter& out) const {
  std::vector<uint32_t> marked;
  for (const AddedToken& token : added_) {
    marked.push_back(static_cast<uint32_t>(token.id) << 1 | uint32_t{token.special});
  }
  out.copied(marked);
  model().save(out);
}

std::optional<Tokenizer> Tokenizer::load(TableReader& in) {
  std::vector<uint32_t> marked;
  if (!in.table(marked)) return std::nullopt;
  std::vector<uint32_t> ids(marked.size());
  std::transform(marked.begin(), marked.end(), ids.begin(), [](uint32_t m) { return m >> 1; });
  std::optional<BpeModel> model = BpeModel::load(in, ids);
  if (!model) return std::nullopt;
  std::vector<AddedToken> added;
  added.reserve(marked.size());
  for (const uint32_t mark : marked) {
    const auto id = static_cast<int32_t>(mark >> 1);
    std::string name(model->vocabulary().bytes_of(id));
    if (!added.empty() && added.back().name >= name) return std::nullopt;
    added.push_back({std::move(name), id, (mark & 1) != 0});
  }
  return Tokenizer(std::move(*model), std::move(added));
}

const BpeModel& Tokenizer::model() const { return shared_->model; }

const Tokenizer::AddedToken* Tokenizer::added_at(std::string_view text, size_t at,
                                                 const AllowedSpecial& allowed,
                                                 bool* may_grow) const {
  // [first, last): the names that begin with the `depth` bytes at `at`.
  auto first = added_.begin(), last = added_.end();
  const auto is_allowed = [&](const AddedToken& token) {
    return allowed.all || allowed.names.contains(token.name);
  };
  const AddedToken* found = nullptr;
  if (may_grow) *may_grow = false;
  for (size_t depth = 0; first != last; ++depth) {
    if (first->name.size() == depth) {
      if (is_allowed(*first)) found = &*first;
      ++first;
    }
    if (at + depth == text.size()) {
      if (may_grow) *may_grow = std::any_of(first, last, is_allowed);
      break;
    }
    const auto byte = static_cast<uint8_t>(text[at + depth]);
    const auto byte_of = [depth](const AddedToken& token) {
      return static_cast<uint8_t>(token.name[depth]);
    };
    first = std::partition_point(first, last, [&](const auto& t) { return byte_of(t) < byte; });
    last = std::partition_point(first, last, [&](const auto& t) { return byte_of(t) == byte; });
  }
  return found;
}

size_t Tokenizer::find_added(std::string_view text, size_t at) const {
  if (only_begin_ >= 0) {
    return std::min(text.find(static_cast<char>(only_begin_), at), text.size());
  }
  while (at < text.size() && !begins_added_[static_cast<uint8_t>(text[at])]) ++at;
  return at;
}

void Tokenizer::encode_plain(std::string_view text, int threads, IdBuffer& out) const {
  if (threads == 1 || text.size() < 2 * kBlockBytes) {
    lease().encoder().encode(text, out);
    return;
  }
  // Blocks end at places that no piece spans. Where there is none, two are one.
  std::vector<size_t> ends;
  for (size_t end = kBlockBytes; end < text.size(); end += kBlockBytes) {
    size_t from = end - kCutSearch;
    while (from < end && (text[from] & 0xc0) == 0x80) ++from;
    const size_t cut = last_certain_cut(text, from, end);
    if (cut != from) ends.push_back(cut);
  }
  ends.push_back(text.size());
  std::vector<IdBuffer> blocks(ends.size());
  TileCounter next;
  shared_->threads(threads)->run([&](Lane&) {
    const Lease own(*shared_);
    for (int64_t i; (i = next.next()) < static_cast<int64_t>(ends.size());) {
      const auto block = static_cast<size_t>(i);
      const size_t begin = block == 0 ? 0 : ends[block - 1];
      own.encoder().encode(text.substr(begin, ends[block] - begin), blocks[block]);
    }
  });
  for (const IdBuffer& block : blocks) out.add(block.ids());
}

void Tokenizer::encode_between_cuts(std::string_view text, const EncodeOptions& options,
                                    IdBuffer& out) const {
  if (!reads_special(options)) {
    encode_plain(text, options.threads, out);
    return;
  }
  size_t start = 0;  // of the plain text before the next special token
  for (size_t at = 0; (at = find_added(text, at)) < text.size();) {
    const AddedToken* found = added_at(text, at, options.special);
    if (!found) {
      ++at;
      continue;
    }
    encode_plain(text.substr(start, at - start), options.threads, out);
    out.add(found->id);
    start = at += found->name.size();
  }
  encode_plain(text.substr(start), options.threads, out);
}

void Tokenizer::encode(std::string_view bytes, const EncodeOptions& options, IdBuffer& out) const {
  std::string replaced;
  if (!options.is_valid_utf8 && !is_valid_utf8(bytes)) replaced = to_valid_utf8(bytes);
  std::string_view text = replaced.empty() ? bytes : std::string_view(replaced);
  if (options.cut == Cut::kNone) {
    encode_between_cuts(text, options, out);
    return;
  }
  for (MetaCutter cutter; !text.empty();) {
    const size_t end = cutter.before_cut(text);
    encode_between_cuts(text.substr(0, end), options, out);
    text.remove_prefix(end);
  }
}

bool Tokenizer::encode(WideText text, const EncodeOptions& options, IdBuffer& out) const {
  if (options.threads != 1 || options.cut != Cut::kNone || reads_special(options)) {
    // These look at the whole.
    const size_t room = text.most_bytes();
    const auto bytes = std::make_unique_for_overwrite<char[]>(room);
    const size_t size = text.write(bytes.get(), room);
    if (text.stopped()) return false;
    EncodeOptions valid = options;
    valid.is_valid_utf8 = true;
    encode(std::string_view(bytes.get(), size), valid, out);
    return true;
  }
  size_t room = kWideBytes, used = 0;
  auto bytes = std::make_unique_for_overwrite<char[]>(room);
  const Lease own = lease();
  for (;;) {
    used += text.write(bytes.get() + used, room - used);
    const std::string_view part(bytes.get(), used);
    if (text.stopped()) return false;
    if (text.done()) {
      own.encoder().encode(part, out);
      return true;
    }
    const size_t done = own.encoder().encode_certain(part, out);
    used -= done;
    if (used > room / 2) {  // a long piece
      auto longer = std::make_unique_for_overwrite<char[]>(2 * room);
      std::copy_n(bytes.get() + done, used, longer.get());
      bytes = std::move(longer);
      room *= 2;
    } else {
      std::copy_n(bytes.get() + done, used, bytes.get());
    }
  }
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, const EncodeOptions& options) const {
  IdBuffer ids(IdBuffer::kKeep, text.size() / kBytesPerId);
  encode(text, options, ids);
  return {ids.ids().begin(), ids.ids().end()};
}

size_t Tokenizer::count(std::string_view text, const EncodeOptions& options) const {
  IdBuffer ids(IdBuffer::kCount);
  encode(text, options, ids);
  return ids.size();
}

std::vector<IdBuffer> Tokenizer::encode_all(std::span<const std::string_view> texts,
                                            const EncodeOptions& options) const {
  std::vector<IdBuffer> all(texts.size());
  EncodeOptions alone = options;
  alone.threads = 1;
  TileCounter next;
  const auto work = [&] {
    for (int64_t i; (i = next.next()) < static_cast<int64_t>(texts.size());) {
      encode(texts[static_cast<size_t>(i)], alone, all[static_cast<size_t>(i)]);
    }
  };
  if (options.threads == 1 || texts.size() < 2) {
    work();
  } else {
    shared_->threads(options.threads)->run([&](Lane&) { work(); });
  }
  return all;
}

std::string_view Tokenizer::bytes_of(int32_t id) const {
  if (id < 0 || id >= vocab_size()) {
    fail(ErrorCode::kInvalidRequest, "[tokenizer] there is no token ", id,
         "; the vocabulary goes from 0 to ", vocab_size() - 1);
  }
  return model().vocabulary().bytes_of(id);
}

bool Tokenizer::is_special(int32_t id) const {
  return id >= 0 && id < vocab_size() && is_special_[static_cast<size_t>(id)];
}

Tokenizer::DecodedSize Tokenizer::decoded_size(std::span<const int32_t> ids,
                                               bool skip_special) const {
  const Vocabulary& vocabulary = model().vocabulary();
  const size_t count = vocabulary.size();
  DecodedSize size;
  for (const int32_t id : ids) {
    if (static_cast<uint32_t>(id) >= count) bytes_of(id);  // throws
    if (skip_special && is_special_[static_cast<size_t>(id)]) continue;
    size.bytes += vocabulary.length(id);
    size.is_ascii &= Vocabulary::is_ascii(vocabulary.key_of(id));
  }
  return size;
}

void Tokenizer::decode_into(std::span<const int32_t> ids, bool skip_special,
                            std::span<char> out) const {
  const Vocabulary& vocabulary = model().vocabulary();
  char* end = out.data();
  const char* const limit = end + out.size();
  for (const int32_t id : ids) {
    if (skip_special && is_special_[static_cast<size_t>(id)]) continue;
    end = vocabulary.write(id, end, limit);
  }
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special) const {
  std::string bytes(decoded_size(ids, skip_special).bytes, '\0');
  decode_into(ids, skip_special, bytes);
  return bytes;
}

}  // namespace puna
