#include "text/vocabulary.h"

#include <algorithm>
#include <array>
#include <limits>

#include "base/error.h"

namespace puna {

void ByteStrings::add(std::string_view bytes) {
  if (bytes.size() > std::numeric_limits<uint32_t>::max() - arena_.size()) {
    fail(ErrorCode::kModelFormat, "[tokenizer] the tokens have more than 4 GiB");
  }
  arena_.insert(arena_.end(), bytes.begin(), bytes.end());
  ends_.push_back(static_cast<uint32_t>(arena_.size()));
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
  keys_.reserve(tokens_.size());
  for (size_t id = 0; id < tokens_.size(); ++id) {
    const std::string_view bytes = tokens_[id];
    ShortKey key = ShortKey::of(bytes.data(), std::min(bytes.size(), ShortKey::kBytes));
    if (bytes.size() > ShortKey::kBytes) key.high |= static_cast<uint64_t>(kLong) << 56;
    keys_.push_back(key);
  }
  fill_slots([](size_t) { return true; });
}

uint64_t Vocabulary::hash_of_token(size_t id) const {
  return is_long(keys_[id]) ? hash_of(tokens_[id]) : keys_[id].hash();
}

template <class Keep>
void Vocabulary::fill_slots(const Keep& keep) {
  int bits = 6;
  while ((size_t{1} << bits) < 2 * size()) ++bits;
  shift_ = 64 - bits;
  mask_ = (size_t{1} << bits) - 1;
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
  size_t slot = hash >> shift_;
  for (; slots_[slot].id != kNone; slot = (slot + 1) & mask_) {
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

}  // namespace puna
