#include "text/piece_stream.h"

#include <algorithm>
#include <utility>

#include "text/pretokenizer.h"

namespace puna {

namespace {

// Ids are looked for after so many characters at the latest, so that no more places are kept.
constexpr int kSettleEvery = 64;
// A longer text is taken in parts of this length.
constexpr size_t kPart = size_t{64} << 10;
// Text that waits as it is.
constexpr size_t kMostWaiting = 128;
// For texts up to this length the encoder keeps memory in which they are joined to what waited.
constexpr size_t kShort = 2048;

}  // namespace

// The characters after which a piece is in the state in which it was before; none if each needs a
// look.
uint32_t PieceStream::run_classes(State state) {
  switch (state) {
    case State::kCapitals:
      return class_set({CharClass::kUpper});
    case State::kCaseless:
      return class_set({CharClass::kLetter, CharClass::kMark});
    case State::kSmall:
      return class_set({CharClass::kLower, CharClass::kLetter, CharClass::kMark});
    case State::kSigns:
      return class_set({CharClass::kOther, CharClass::kMark});
    case State::kSignsTail:
    case State::kNewline:
      return class_set({CharClass::kNewline});
    case State::kBlanks:
      return class_set({CharClass::kSpace});
    default:
      return 0;
  }
}

OpenPiece::OpenPiece(const BpeModel& model) {
  if (model.incremental()) bpe_.emplace(*model.incremental());
}

void OpenPiece::restart() {
  if (bpe_) {
    bpe_->restart();
  } else {
    bytes_.clear();
  }
}

void OpenPiece::push(std::string_view bytes, PieceEncoder& encoder) {
  if (bpe_) {
    bpe_->push(bytes, encoder.memo());
  } else {
    bytes_ += bytes;
  }
}

void OpenPiece::push_many(std::string_view bytes, PieceEncoder& encoder,
                          std::vector<int32_t>& out) {
  if (bpe_) {
    bpe_->push_many(bytes, encoder.memo(), encoder.dead(), out);
  } else {
    bytes_ += bytes;
  }
}

void OpenPiece::drain(std::vector<int32_t>& out) {
  if (bpe_) bpe_->drain(out);
}

void OpenPiece::complete(PieceEncoder& encoder, std::vector<int32_t>& out) const {
  if (bpe_) {
    bpe_->complete(out);
  } else if (!bytes_.empty()) {
    IdBuffer ids;
    encoder.encode_piece(bytes_, ids);
    out.insert(out.end(), ids.ids().begin(), ids.ids().end());
  }
}

PieceStream::PieceStream(const BpeModel& model) : model_(&model), piece_(model), shorter_(model) {}

void PieceStream::feed(std::string_view text, PieceEncoder& encoder, IdBuffer& out) {
  while (text.size() > kPart) {
    size_t end = kPart;
    while ((text[end] & 0xc0) == 0x80) --end;
    feed_part(text.substr(0, end), {encoder, out});
    text.remove_prefix(end);
  }
  feed_part(text, {encoder, out});
}

void PieceStream::feed_part(std::string_view text, const Call& call) {
  if (state_ != State::kStart) text.remove_prefix(take_while_open(text, call));
  if (text.empty()) return;
  std::string longer;
  if (!waiting_.empty()) {
    std::string& joined = text.size() > kShort ? longer : call.encoder.joined();
    joined.reserve(kMostWaiting + std::max(kShort, text.size()));
    joined = waiting_;
    joined += text;
    text = joined;
  }
  for (;;) {
    text.remove_prefix(call.encoder.encode_certain(text, call.out));
    if (text.size() <= kMostWaiting) break;
    text.remove_prefix(take_while_open(text, call));
  }
  if (state_ != State::kStart) {
    waiting_ = std::string();  // the places of an open piece take memory enough
  } else {
    waiting_.reserve(kMostWaiting);  // and never more
    waiting_ = text;
  }
}

size_t PieceStream::take_while_open(std::string_view text, const Call& call) {
  size_t at = 0;
  int unsettled = 0;
  while (at < text.size()) {
    const size_t run = fork_ == Fork::kNone ? after_classes(text, at, run_classes(state_)) - at : 0;
    if (run != 0) {
      take_run(text.substr(at, run), call);
      at += run;
      continue;
    }
    int length = 0;
    const uint32_t code = decode_utf8(text, at, &length);
    const Character c{text.substr(at, static_cast<size_t>(length)), class_of(code)};
    if (take(c, call)) at += c.bytes.size();
    if (state_ == State::kStart) return at;
    if (++unsettled == kSettleEvery) {
      settle(call);
      unsettled = 0;
    }
  }
  settle(call);
  return at;
}

// Characters with which the open piece goes on in the state it is in.
void PieceStream::take_run(std::string_view run, const Call& call) {
  if (state_ == State::kBlanks) {
    // The last one is held instead of the one that was.
    size_t last = run.size() - 1;
    while ((run[last] & 0xc0) == 0x80) --last;
    piece_.push(held_, call.encoder);
    held_ = run.substr(last);
    run = run.substr(0, last);
  }
  std::vector<int32_t> ids;  // what is ready is given out, as there is one past
  piece_.push_many(run, call.encoder, ids);
  call.out.add(ids);
}

void PieceStream::end(PieceEncoder& encoder, IdBuffer& out) {
  const Call call{encoder, out};
  encoder.encode(std::exchange(waiting_, {}), out);
  if (fork_ != Fork::kNone) choose(/*longer=*/false, call);
  if (state_ == State::kContraction) {
    take_held(call);
  }
  if (state_ == State::kBlanks) {
    piece_.push(held_, encoder);
    held_.clear();
  }
  close(call);
}

size_t PieceStream::pending() const {
  size_t bytes = waiting_.size() + piece_.pending();
  if (fork_ == Fork::kNone) bytes += held_.size();  // else the longer past has it
  for (const int32_t id : ready_) bytes += model_->vocabulary().length(id);
  return bytes;
}

// Up to `count` ids are given out and gone from the list.
void PieceStream::give(std::vector<int32_t>& ids, size_t count, const Call& call) {
  call.out.add(std::span<const int32_t>(ids).first(count));
  ids.erase(ids.begin(), ids.begin() + static_cast<int64_t>(count));
}

void PieceStream::settle(const Call& call) {
  piece_.drain(ready_);
  if (fork_ == Fork::kNone) {
    give(ready_, ready_.size(), call);
    return;
  }
  shorter_.drain(ready_shorter_);
  const auto [end, other] =
      std::mismatch(ready_.begin(), ready_.end(), ready_shorter_.begin(), ready_shorter_.end());
  const auto agreed = static_cast<size_t>(end - ready_.begin());
  if (agreed == 0) return;
  ready_shorter_.erase(ready_shorter_.begin(), other);
  give(ready_, agreed, call);
}

void PieceStream::close(const Call& call) {
  if (state_ == State::kStart) return;
  piece_.complete(call.encoder, ready_);
  give(ready_, ready_.size(), call);
  piece_.restart();
  state_ = State::kStart;
}

void PieceStream::fork(Fork kind, const Character& c, const Call& call) {
  settle(call);
  ready_shorter_.clear();
  piece_.complete(call.encoder, ready_shorter_);
  shorter_.restart();
  shorter_.push(c.bytes, call.encoder);
  piece_.push(c.bytes, call.encoder);
  fork_ = kind;
}

void PieceStream::choose(bool longer, const Call& call) {
  if (!longer) {
    std::swap(piece_, shorter_);
    std::swap(ready_, ready_shorter_);
  }
  ready_shorter_.clear();
  fork_ = Fork::kNone;
  give(ready_, ready_.size(), call);
}

void PieceStream::begin(const Character& c, const Call& call) {
  piece_.push(c.bytes, call.encoder);
  switch (c.type) {
    case CharClass::kUpper:
      state_ = State::kCapitals;
      break;
    case CharClass::kLower:
      state_ = State::kSmall;
      break;
    case CharClass::kLetter:
    case CharClass::kMark:
      state_ = State::kCaseless;
      break;
    case CharClass::kNumber:
      state_ = State::kNumber;
      numbers_ = 1;
      break;
    case CharClass::kOther:
    case CharClass::kSpace:
      state_ = State::kPrefix;
      prefix_ = c.type;
      takes_signs_ = c.type == CharClass::kOther || c.bytes == " ";
      break;
    case CharClass::kNewline:
      state_ = State::kNewline;
      break;
  }
}

// After a word: what was held is no contraction but begins a piece.
void PieceStream::take_held(const Call& call) {
  close(call);
  const std::string held = std::exchange(held_, {});
  for (const char& c : held) {
    const Character character{{&c, 1}, kAsciiClasses[static_cast<uint8_t>(c)]};
    while (!take(character, call)) continue;
  }
}

// After a word and an apostrophe.
bool PieceStream::contract(const Character& c, const Call& call) {
  const auto small = [](char letter) { return static_cast<char>(letter | 0x20); };
  const char letter = c.bytes.size() == 1 ? small(c.bytes[0]) : '\0';
  bool whole = false;
  if (held_.size() == 1) {
    if (letter == 'r' || letter == 'v' || letter == 'l') {
      held_ += c.bytes;
      return true;
    }
    whole =
        letter == 's' || letter == 't' || letter == 'm' || letter == 'd' || c.bytes == "\xc5\xbf";
  } else {
    whole = letter == (small(held_[1]) == 'l' ? 'l' : 'e');
  }
  if (whole) {
    piece_.push(std::exchange(held_, {}), call.encoder);
    piece_.push(c.bytes, call.encoder);
    close(call);
    return true;
  }
  take_held(call);
  return take(c, call);
}

bool PieceStream::take(const Character& c, const Call& call) {
  const CharClass type = c.type;
  if (fork_ == Fork::kCapitals) {
    if (type == CharClass::kUpper) {
      piece_.push(c.bytes, call.encoder);
      shorter_.push(c.bytes, call.encoder);
      return true;
    }
    choose(is_letter(type) || type == CharClass::kMark, call);
  } else if (fork_ == Fork::kBlanks) {
    if (type == CharClass::kSpace) {
      piece_.push(c.bytes, call.encoder);
      if (state_ == State::kBlanks) shorter_.push(held_, call.encoder);
      held_ = std::string(c.bytes);
      state_ = State::kBlanks;
      return true;
    }
    const bool longer = type == CharClass::kNewline;
    choose(longer, call);
    if (longer) {
      held_.clear();
      state_ = State::kNewline;
    }
  }

  bool goes_on = false;  // the piece, with this character
  switch (state_) {
    case State::kStart:
      begin(c, call);
      return true;
    case State::kPrefix:
      goes_on = true;
      if (type == CharClass::kUpper) {
        state_ = State::kCapitals;
      } else if (type == CharClass::kLower) {
        state_ = State::kSmall;
      } else if (type == CharClass::kLetter || type == CharClass::kMark) {
        state_ = State::kCaseless;
      } else if (type == CharClass::kOther && takes_signs_) {
        state_ = State::kSigns;
      } else if (type == CharClass::kNewline) {
        state_ = prefix_ == CharClass::kSpace ? State::kNewline : State::kSignsTail;
      } else if (type == CharClass::kSpace && prefix_ == CharClass::kSpace) {
        held_ = std::string(c.bytes);
        state_ = State::kBlanks;
        return true;
      } else {
        goes_on = false;
      }
      break;
    case State::kCaseless:
      if (type == CharClass::kUpper) {
        fork(Fork::kCapitals, c, call);
        state_ = State::kCapitals;
        return true;
      }
      [[fallthrough]];
    case State::kCapitals:
    case State::kSmall:
      if (c.bytes == "'") {
        held_ = std::string(c.bytes);
        state_ = State::kContraction;
        return true;
      }
      if (type == CharClass::kLower) {
        goes_on = true;
        state_ = State::kSmall;
      } else if (type == CharClass::kLetter || type == CharClass::kMark) {
        goes_on = true;
        if (state_ != State::kSmall) state_ = State::kCaseless;
      } else {
        goes_on = type == CharClass::kUpper && state_ == State::kCapitals;
      }
      break;
    case State::kContraction:
      return contract(c, call);
    case State::kNumber:
      if (type != CharClass::kNumber) break;
      piece_.push(c.bytes, call.encoder);
      if (++numbers_ == 3) close(call);
      return true;
    case State::kSigns:
      goes_on = type == CharClass::kOther || type == CharClass::kMark;
      if (type == CharClass::kNewline) {
        goes_on = true;
        state_ = State::kSignsTail;
      }
      break;
    case State::kSignsTail:
      goes_on = type == CharClass::kNewline || c.bytes == "/";
      break;
    case State::kBlanks: {
      const std::string last = std::exchange(held_, {});
      if (type == CharClass::kSpace || type == CharClass::kNewline) {
        piece_.push(last, call.encoder);
        if (type == CharClass::kSpace) {
          held_ = std::string(c.bytes);
          return true;
        }
        goes_on = true;
        state_ = State::kNewline;
        break;
      }
      close(call);
      begin({last, CharClass::kSpace}, call);
      return take(c, call);
    }
    case State::kNewline:
      if (type == CharClass::kSpace) {
        fork(Fork::kBlanks, c, call);
        state_ = State::kPrefix;
        prefix_ = CharClass::kSpace;
        takes_signs_ = c.bytes == " ";
        return true;
      }
      goes_on = type == CharClass::kNewline;
      break;
  }
  if (goes_on) {
    piece_.push(c.bytes, call.encoder);
  } else {
    close(call);
  }
  return goes_on;
}

}  // namespace puna
