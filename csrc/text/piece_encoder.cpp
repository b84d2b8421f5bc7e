#include "text/piece_encoder.h"

#include <algorithm>
#include <array>

#include "text/incremental_bpe.h"
#include "text/pretokenizer.h"

namespace puna {

namespace {

// So that places stay in the processor's nearest cache.
constexpr size_t kPlacesAtOnce = 1024;

}  // namespace

PieceEncoder::PieceEncoder(const BpeModel& model) : model_(&model), lines_(kLines) {}

void PieceEncoder::encode(std::string_view text, IdBuffer& out) {
  const Vocabulary& vocabulary = model_->vocabulary();
  // First all ends, then all keys, then all look-ups: memory is asked for long before it is needed,
  // and each loop does one thing.
  std::array<size_t, kPiecesAtOnce> ends;
  std::array<ShortKey, kPiecesAtOnce> keys;
  std::array<uint64_t, kPiecesAtOnce> hashes;
  for (size_t at = 0; at < text.size();) {
    const size_t count = next_pieces(text, at, ends.data(), ends.size());
    size_t begin = at;
    for (size_t i = 0; i < count; ++i) {
      const size_t size = ends[i] - begin;
      if (size <= ShortKey::kBytes) {
        const char* bytes = text.data() + begin;
        keys[i] = text.size() - begin >= sizeof(ShortKey) ? ShortKey::of_readable(bytes, size)
                                                          : ShortKey::of(bytes, size);
        hashes[i] = keys[i].hash();
        vocabulary.prefetch(hashes[i]);
      }
      begin = ends[i];
    }
    int32_t* end = out.room(ends[count - 1] - at + kLineIds);
    begin = at;
    for (size_t i = 0; i < count; ++i) {
      const std::string_view piece(text.data() + begin, ends[i] - begin);
      begin = ends[i];
      const int32_t id = piece.size() <= ShortKey::kBytes ? vocabulary.find(keys[i], hashes[i])
                                                          : vocabulary.find(piece);
      if (id != Vocabulary::kNone) {
        *end++ = id;
      } else {
        end = encode_unknown(piece, end);
      }
    }
    out.set_end(end);
    at = begin;
  }
}

void PieceEncoder::encode_piece(std::string_view piece, IdBuffer& out) {
  int32_t* end = out.room(piece.size() + kLineIds);
  const int32_t id = model_->vocabulary().find(piece);
  if (id != Vocabulary::kNone) {
    *end++ = id;
  } else {
    end = encode_unknown(piece, end);
  }
  out.set_end(end);
}

int32_t* PieceEncoder::encode_unknown(std::string_view piece, int32_t* out) {
  if (piece.size() > kLineBytes) return merge(piece, out);
  char bytes[kLineBytes + 1] = {};
  std::memcpy(bytes, piece.data(), piece.size());
  bytes[kLineBytes] = static_cast<char>(piece.size());
  uint64_t key[4];
  std::memcpy(key, bytes, sizeof(key));
  const uint64_t hash =
      ShortKey::mixed(ShortKey{key[0], key[1]}.hash() ^ key[2], key[3] ^ ShortKey::kSalt[1]);
  Line& line = lines_[hash % kLines];
  if (!std::equal(key, key + 4, line.key)) {
    int32_t* end = merge(piece, out);
    const auto count = static_cast<size_t>(end - out);
    if (count > kLineIds) return end;
    std::copy(key, key + 4, line.key);
    std::copy(out, end, line.ids);
    line.count = static_cast<int32_t>(count);
    return end;
  }
  std::memcpy(out, line.ids, sizeof(line.ids));
  return out + line.count;
}

int32_t* PieceEncoder::merge(std::string_view piece, int32_t* out) {
  merged_.clear();
  if (const RankedBpe* ranked = model_->ranked()) {
    if (int32_t* end = ranked->encode(piece, memo_, dead_, out)) return end;
    IncrementalBpe places(*ranked);
    for (size_t at = 0; at < piece.size(); at += kPlacesAtOnce) {
      places.push(piece.substr(at, kPlacesAtOnce), memo_);
      places.drain(merged_);
    }
    places.complete(merged_);
  } else {
    model_->merge(piece, symbols_, merged_);
  }
  return std::copy(merged_.begin(), merged_.end(), out);
}

}  // namespace puna
