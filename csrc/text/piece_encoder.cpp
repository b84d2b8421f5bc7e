#include "text/piece_encoder.h"

#include <algorithm>
#include <array>

#include "text/incremental_bpe.h"

namespace puna {

namespace {

// Pieces that are looked up together: what they touch fits into the processor's nearest cache.
constexpr size_t kPiecesAtOnce = 256;
// So that places stay there, too.
constexpr size_t kPlacesAtOnce = 1024;
// Stands in the place of a key's high word for pieces that are longer than a key.
constexpr uint64_t kLong = ~uint64_t{0};

}  // namespace

PieceEncoder::PieceEncoder(const BpeModel& model)
    : model_(&model), lines_(kLines), tiny_(size_t{1} << kTinyBits) {}

size_t PieceEncoder::encode_but(size_t spared, std::string_view text, IdBuffer& out) {
  const Vocabulary& vocabulary = model_->vocabulary();
  // One loop for each step: memory is asked for long before it is needed, and each loop does one
  // thing. Places of memory that a look-up visits: a slot, the token's key, the line of a piece
  // that is no token.
  std::array<size_t, kPiecesAtOnce> ends;
  std::array<ShortKey, kPiecesAtOnce> keys;
  std::array<uint64_t, kPiecesAtOnce> hashes;
  std::array<int32_t, kPiecesAtOnce> ids;
  std::array<uint16_t, kPiecesAtOnce> unknown;
  for (size_t at = 0;;) {
    const size_t found = next_pieces(text, at, ends.data(), ends.size());
    if (found <= spared) return at;
    const size_t count = found - spared;
    const auto piece_at = [&](size_t i) {
      const size_t begin = i == 0 ? at : ends[i - 1];
      return text.substr(begin, ends[i] - begin);
    };
    size_t unknown_count = 0, unknown_bytes = 0;
    const auto add_unknown = [&](size_t i) {
      unknown[unknown_count++] = static_cast<uint16_t>(i);
      unknown_bytes += piece_at(i).size();
      __builtin_prefetch(&lines_[hashes[i] % kLines], 1);
    };
    if (ends[count - 1] - at <= kTinyBytes * count) {
      // Numbers and signs.
      for (size_t i = 0; i < count; ++i) {
        const std::string_view piece = piece_at(i);
        ids[i] = find_tiny(piece, text.data() + text.size(), hashes[i]);
        if (ids[i] == Vocabulary::kNone) add_unknown(i);
      }
    } else {
      size_t begin = at;
      for (size_t i = 0; i < count; ++i) {
        const size_t size = ends[i] - begin;
        if (size <= ShortKey::kBytes) {
          const char* bytes = text.data() + begin;
          keys[i] = text.size() - begin >= sizeof(ShortKey) ? ShortKey::of_readable(bytes, size)
                                                            : ShortKey::of(bytes, size);
          hashes[i] = keys[i].hash();
        } else {
          keys[i].high = kLong;
          hashes[i] = Vocabulary::hash_of(piece_at(i));
        }
        vocabulary.prefetch(hashes[i]);
        begin = ends[i];
      }
      for (size_t i = 0; i < count; ++i) {
        ids[i] = vocabulary.candidate(hashes[i]);
        vocabulary.prefetch_key(ids[i]);
      }
      for (size_t i = 0; i < count; ++i) {
        ids[i] = keys[i].high != kLong ? vocabulary.find(keys[i], hashes[i])
                                       : vocabulary.find(piece_at(i), hashes[i]);
        if (ids[i] == Vocabulary::kNone) {
          add_unknown(i);
        }
      }
    }
    int32_t* end = out.room(count - unknown_count + unknown_bytes + kLineIds);
    size_t done = 0;
    for (size_t k = 0; k < unknown_count; ++k) {
      const size_t i = unknown[k];
      end = std::copy(ids.data() + done, ids.data() + i, end);
      end = encode_unknown(piece_at(i), hashes[i], end);
      done = i + 1;
    }
    end = std::copy(ids.data() + done, ids.data() + count, end);
    out.set_end(end);
    at = ends[count - 1];
    if (found < ends.size()) return at;  // the text has no more
  }
}

int32_t PieceEncoder::find_tiny(std::string_view piece, const char* end, uint64_t& hash) {
  const Vocabulary& vocabulary = model_->vocabulary();
  if (piece.size() > kTinyBytes || end - piece.data() < static_cast<ptrdiff_t>(sizeof(Tiny::key))) {
    hash = Vocabulary::hash_of(piece);
    return vocabulary.find(piece, hash);
  }
  uint32_t key;
  std::memcpy(&key, piece.data(), sizeof(key));
  const auto size = static_cast<uint32_t>(piece.size());
  key = (key & (uint32_t{1} << 8 * size) - 1) | size << 8 * kTinyBytes;
  Tiny& tiny = tiny_[key * 0x9e3779b1u >> (32 - kTinyBits)];
  if (tiny.key != key) {
    hash = Vocabulary::hash_of(piece);
    const int32_t id = vocabulary.find(piece, hash);
    if (id == Vocabulary::kNone) return id;
    tiny = {key, id};
  }
  return tiny.id;
}

void PieceEncoder::encode_piece(std::string_view piece, IdBuffer& out) {
  int32_t* end = out.room(piece.size() + kLineIds);
  const uint64_t hash = Vocabulary::hash_of(piece);
  const int32_t id = model_->vocabulary().find(piece, hash);
  if (id != Vocabulary::kNone) {
    *end++ = id;
  } else {
    end = encode_unknown(piece, hash, end);
  }
  out.set_end(end);
}

PieceEncoder::LineKey PieceEncoder::line_key(std::string_view piece) {
  char bytes[kLineBytes + 1] = {};
  std::memcpy(bytes, piece.data(), piece.size());
  bytes[kLineBytes] = static_cast<char>(piece.size());
  LineKey key;
  std::memcpy(key.data(), bytes, sizeof(key));
  return key;
}

int32_t* PieceEncoder::encode_unknown(std::string_view piece, uint64_t hash, int32_t* out) {
  if (piece.size() > kLineBytes) return merge(piece, out);
  const LineKey key = line_key(piece);
  Line& line = lines_[hash % kLines];
  if (line.key != key) {
    int32_t* end = merge(piece, out);
    const auto count = static_cast<size_t>(end - out);
    if (count > kLineIds) return end;
    line.key = key;
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
