#include "text/vocabulary.h"

#include <algorithm>
#include <array>
#include <limits>

#include "base/error.h"
#include "text/table_file.h"

namespace puna {

void ByteStrings::add(std::string_view bytes) {
  if (bytes.size() > std::numeric_limits<uint32_t>::max() - arena_.size()) {
    fail(ErrorCode::kModelFormat, "[tokenizer] the tokens have more than 4 GiB");
  }
  arena_.insert(arena_.end(), bytes.begin(), bytes.end());
  ends_.push_back(static_cast<uint32_t>(arena_.size()));
}

void ByteStrings::save(TableWriter& out) const {
  out.table(arena_);
  out.table(ends_);
}

bool ByteStrings::load(TableReader& in) {
  return in.table(arena_) && in.table(ends_) && std::is_sorted(ends_.begin(), ends_.end()) &&
         (ends_.empty() ? 0 : ends_.back()) == arena_.size();
}

uint64_t Vocabulary::hash_of(std::string_view bytes) {
  if (bytes.size() <= ShortKey::kBytes) return ShortKey::of(bytes.data(), bytes.size()).hash();
  uint64_t hash = bytes.size();
  for (; bytes.size() >= 16; bytes.remove_prefix(16)) {
    uint64_t words[2];
    std::memcpy(words, bytes.data(), 16);
    hash = ShortKey::mixed(words[0] ^ ShortKey::kSalt[0] ^ hash, words[1] ^ ShortKey::kSalt[1]);
  }
  const ShortKey rest = ShortKey::of(bytes.data(), bytes.size());
  return ShortKey::mixed(rest.low ^ ShortKey::kSalt[0] ^ hash, rest.high ^ ShortKey::kSalt[1]);
}

Vocabulary::Vocabulary(ByteStrings tokens, std::vector<bool> added)
    : tokens_(std::move(tokens)), added_(std::move(added)) {
  require_bounded_work();
  make_keys();
  fill_slots([](size_t) { return true; });
  // Which text is looked up, a file does not tell: every search must end soon.
  size_t run = 0;
  for (const Slot& slot : slots_) {
    run = slot.id == kNone ? 0 : run + 1;
    if (run > kLongestSearch) refuse_collisions("tokens");
  }
}

void Vocabulary::refuse_collisions(const char* what) {
  fail(ErrorCode::kModelFormat, "[tokenizer] more than ", kLongestSearch, " ", what,
       " have neighbouring hashes; a vocabulary that was not made for that has none");
}

void Vocabulary::require_bounded_work() const {
  size_t squares = 0;
  for (size_t id = 0; id < size(); ++id) squares += ordinary(id).size() * ordinary(id).size();
  if (squares > kMostSquaredBytes) {
    fail(ErrorCode::kModelFormat, "[tokenizer] the squared lengths of the tokens add up to ",
         squares, "; ", kMostSquaredBytes, " are the limit: there are too many that are very long");
  }
}

void Vocabulary::make_keys() {
  keys_.reserve(tokens_.size());
  for (size_t id = 0; id < tokens_.size(); ++id) {
    const std::string_view bytes = tokens_[id];
    ShortKey key = ShortKey::of(bytes.data(), std::min(bytes.size(), ShortKey::kBytes));
    if (bytes.size() > ShortKey::kBytes) {
      const bool ascii = std::none_of(bytes.begin(), bytes.end(), [](char c) { return c & 0x80; });
      key.high |= static_cast<uint64_t>(ascii ? kLongAscii : kLong) << 56;
    }
    keys_.push_back(key);
  }
}

char* Vocabulary::write_long(int32_t id, char* out, const char* limit) const {
  constexpr size_t kStep = 16;
  const std::string_view bytes = bytes_of(id), all = joined_bytes();
  const size_t room = static_cast<size_t>(limit - out);
  const size_t readable = static_cast<size_t>(all.data() + all.size() - bytes.data());
  if (std::min(room, readable) < bytes.size() + kStep) {
    std::memcpy(out, bytes.data(), std::min(bytes.size(), room));
  } else {
    for (size_t at = 0; at < bytes.size(); at += kStep) {
      std::memcpy(out + at, bytes.data() + at, kStep);
    }
  }
  return out + bytes.size();
}

void Vocabulary::set_slot_count() {
  int bits = 6;
  while ((size_t{1} << bits) < 2 * size()) ++bits;
  shift_ = 64 - bits;
  mask_ = (size_t{1} << bits) - 1;
}

uint64_t Vocabulary::hash_of_token(size_t id) const {
  return is_long(keys_[id]) ? hash_of(tokens_[id]) : keys_[id].hash();
}

template <class Keep>
void Vocabulary::fill_slots(const Keep& keep) {
  set_slot_count();
  slots_.assign(mask_ + 1, Slot{0, kNone});
  // Slots are asked for some tokens ahead.
  constexpr size_t kAhead = 16;
  std::array<uint64_t, kAhead> hashes;
  const auto is_kept = [&](size_t id) { return !ordinary(id).empty() && keep(id); };
  for (size_t next = 0; next < size() + kAhead; ++next) {
    if (next >= kAhead && is_kept(next - kAhead)) {
      insert(static_cast<int32_t>(next - kAhead), hashes[next % kAhead]);
    }
    if (next < size() && is_kept(next)) {
      hashes[next % kAhead] = hash_of_token(next);
      prefetch(hashes[next % kAhead]);
    }
  }
}

void Vocabulary::insert(int32_t id, uint64_t hash) {
  const std::string_view bytes = bytes_of(id);
  size_t slot = hash >> shift_, searched = 0;
  for (; slots_[slot].id != kNone; slot = (slot + 1) & mask_) {
    if (++searched > kLongestSearch) refuse_collisions("tokens");
    if (slots_[slot].tag == static_cast<uint32_t>(hash) && bytes_of(slots_[slot].id) == bytes) {
      fail(ErrorCode::kModelFormat, "[tokenizer] tokens ", slots_[slot].id, " and ", id,
           " are the same");
    }
  }
  slots_[slot] = {static_cast<uint32_t>(hash), id};
}

int32_t Vocabulary::find(std::string_view bytes, uint64_t hash) const {
  if (bytes.size() <= ShortKey::kBytes) return find(ShortKey::of(bytes.data(), bytes.size()), hash);
  for (size_t slot = hash >> shift_;; slot = (slot + 1) & mask_) {
    const Slot& found = slots_[slot];
    if (found.id == kNone) return kNone;
    if (found.tag == static_cast<uint32_t>(hash) && bytes_of(found.id) == bytes) return found.id;
  }
}

void Vocabulary::restrict_to(const std::vector<bool>& keep) {
  fill_slots([&](size_t id) { return keep[id]; });
}

Table<uint16_t> Vocabulary::ordinary_lengths() const {
  Table<uint16_t> lengths(size());
  for (size_t id = 0; id < size(); ++id) lengths[id] = static_cast<uint16_t>(tokens_[id].size());
  for (size_t id = 0; id < size(); ++id) {
    if (added_[id]) lengths[id] = 0;
  }
  return lengths;
}

void Vocabulary::save(TableWriter& out) const {
  tokens_.save(out);
  out.table(slots_);
}

std::optional<Vocabulary> Vocabulary::load(TableReader& in, std::span<const uint32_t> added) {
  Vocabulary vocabulary;
  if (!vocabulary.tokens_.load(in)) return std::nullopt;
  const size_t size = vocabulary.size();
  if (size > std::numeric_limits<int32_t>::max()) return std::nullopt;
  vocabulary.added_.assign(size, false);
  for (const uint32_t id : added) {
    if (id >= size || vocabulary.tokens_[id].empty()) return std::nullopt;
    vocabulary.added_[id] = true;
  }
  size_t too_long = 0;
  for (size_t id = 0; id < size; ++id) too_long += vocabulary.tokens_[id].size() > kMostTokenBytes;
  for (size_t id = 0; id < size && too_long != 0; ++id) {
    if (vocabulary.ordinary(id).size() > kMostTokenBytes) return std::nullopt;
  }
  vocabulary.make_keys();
  vocabulary.set_slot_count();
  Table<Slot>& slots = vocabulary.slots_;
  if (!in.table(slots) || slots.size() != vocabulary.mask_ + 1) return std::nullopt;
  // Ids are there, and enough slots are empty for every search to end.
  size_t used = 0, wrong = 0;
  for (const Slot& slot : slots) {
    used += slot.id != kNone;
    wrong += slot.id != kNone && static_cast<uint32_t>(slot.id) >= size;
  }
  if (wrong != 0 || used > size) return std::nullopt;
  return vocabulary;
}

}  // namespace puna
