#include "text/piece_encoder.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "text/incremental_bpe.h"

namespace puna {

namespace {

// Pieces that are looked up together: what they touch fits into the processor's nearest cache.
constexpr size_t kPiecesAtOnce = 256;
// Stands in the place of a key's high word for pieces that are longer than a key.
constexpr uint64_t kLong = ~uint64_t{0};

}  // namespace

PieceEncoder::PieceEncoder(const BpeModel& model)
    : model_(&model), lines_(kLines), tiny_(size_t{1} << kTinyBits) {}

// Pieces that follow each other in a text. One loop over them for each step: memory is asked for
// long before it is needed, and each loop does one thing. Places of memory that a look-up visits: a
// slot, the token's key, the line of a piece that is no token.
struct PieceEncoder::Batch {
  std::string_view text;
  size_t at = 0, count = 0;  // where the first piece begins
  std::array<size_t, kPiecesAtOnce> ends;
  std::array<ShortKey, kPiecesAtOnce> keys;
  std::array<uint64_t, kPiecesAtOnce> hashes;  // of those that are no token, if not of all
  std::array<int32_t, kPiecesAtOnce> ids;      // or kNone

  std::string_view piece(size_t i) const {
    const size_t begin = i == 0 ? at : ends[i - 1];
    return text.substr(begin, ends[i] - begin);
  }
  // Whether they are mostly numbers and signs.
  bool is_tiny() const { return ends[count - 1] - at <= kTinyBytes * count; }
};

void PieceEncoder::find_tiny_tokens(Batch& batch) {
  const char* const end = batch.text.data() + batch.text.size();
  for (size_t i = 0; i < batch.count; ++i)
    batch.ids[i] = find_tiny(batch.piece(i), end, batch.hashes[i]);
}

void PieceEncoder::find_tokens(Batch& batch) const {
  const Vocabulary& vocabulary = model_->vocabulary();
  for (size_t i = 0; i < batch.count; ++i) {
    const std::string_view piece = batch.piece(i);
    if (piece.size() <= ShortKey::kBytes) {
      const auto left = static_cast<size_t>(batch.text.data() + batch.text.size() - piece.data());
      batch.keys[i] = left >= sizeof(ShortKey) ? ShortKey::of_readable(piece.data(), piece.size())
                                               : ShortKey::of(piece.data(), piece.size());
      batch.hashes[i] = batch.keys[i].hash();
    } else {
      batch.keys[i].high = kLong;
      batch.hashes[i] = Vocabulary::hash_of(piece);
    }
    vocabulary.prefetch(batch.hashes[i]);
  }
  for (size_t i = 0; i < batch.count; ++i) {
    batch.ids[i] = vocabulary.candidate(batch.hashes[i]);
    vocabulary.prefetch_key(batch.ids[i]);
  }
  for (size_t i = 0; i < batch.count; ++i)
    batch.ids[i] = batch.keys[i].high != kLong ? vocabulary.find(batch.keys[i], batch.hashes[i])
                                               : vocabulary.find(batch.piece(i), batch.hashes[i]);
}

void PieceEncoder::append(const Batch& batch, IdBuffer& out) {
  std::array<uint16_t, kPiecesAtOnce> unknown;
  size_t unknown_count = 0, unknown_bytes = 0;
  for (size_t i = 0; i < batch.count; ++i) {
    if (batch.ids[i] != Vocabulary::kNone) continue;
    unknown[unknown_count++] = static_cast<uint16_t>(i);
    unknown_bytes += batch.piece(i).size();
    __builtin_prefetch(&lines_[batch.hashes[i] % kLines], 1);
  }
  const int32_t* const ids = batch.ids.data();
  int32_t* end = out.room(batch.count - unknown_count + unknown_bytes + kLineIds);
  size_t done = 0;
  for (size_t k = 0; k < unknown_count; ++k) {
    const size_t i = unknown[k];
    end = std::copy(ids + done, ids + i, end);
    end = encode_unknown(batch.piece(i), batch.hashes[i], end);
    done = i + 1;
  }
  out.set_end(std::copy(ids + done, ids + batch.count, end));
}

size_t PieceEncoder::encode_but(size_t spared, std::string_view text, IdBuffer& out) {
  Batch batch;
  batch.text = text;
  for (;;) {
    const size_t found = next_pieces(text, batch.at, batch.ends.data(), batch.ends.size());
    if (found <= spared) return batch.at;
    batch.count = found - spared;
    if (batch.is_tiny())
      find_tiny_tokens(batch);
    else
      find_tokens(batch);
    append(batch, out);
    batch.at = batch.ends[batch.count - 1];
    if (found < batch.ends.size()) return batch.at;  // the text has no more
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
  key = (key & ((uint32_t{1} << 8 * size) - 1)) | size << 8 * kTinyBytes;
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
    constexpr size_t kPlacesAtOnce = 1024;  // so that they stay in the nearest cache
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
