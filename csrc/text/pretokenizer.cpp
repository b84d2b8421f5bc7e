// The regular expression, by hand. Its alternatives are tried in order, each greedily and with
// backtracking; the comments give the alternative that a step stands for, with
//   U = [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]   L = [\p{Ll}\p{Lm}\p{Lo}\p{M}]
#include "text/pretokenizer.h"

#include <algorithm>
#include <bit>

#include "text/byte_block.h"
#include "text/unicode_classes.h"

namespace puna {

const char* const kPretokenizerPattern =
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+"
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*"
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    "\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

namespace {

// What small letters may be followed by in a word, and signs in a run of them.
constexpr uint32_t kSmall = class_set({CharClass::kLower, CharClass::kLetter, CharClass::kMark});
constexpr uint32_t kSigns = class_set({CharClass::kOther, CharClass::kMark});

bool is_caseless(CharClass c) { return c == CharClass::kLetter || c == CharClass::kMark; }
bool is_space(CharClass c) { return c == CharClass::kSpace || c == CharClass::kNewline; }

// Characters of a run that are looked at one by one.
constexpr int kShortRun = 24;

// A character of a text: its class, and where it ends.
struct Char {
  CharClass type;
  size_t end;
};

// The character at `at` < text.size().
Char look(std::string_view text, size_t at) {
  const auto first = static_cast<uint8_t>(text[at]);
  if (first < 0x80) return {kAsciiClasses[first], at + 1};
  int length = 0;
  const uint32_t code = decode_utf8(text, at, &length);
  return {class_of(code), at + static_cast<size_t>(length)};
}

// Bytes of a block that are ASCII characters of these classes.
uint64_t ascii_of(const ByteBlock& block, uint32_t classes) {
  const auto wanted = [&](CharClass c) { return (classes >> static_cast<int>(c) & 1) != 0; };
  // All that are not in the others, which are looked for then instead of those in the set.
  const bool most = wanted(CharClass::kOther);
  uint64_t found = most ? block.beyond_ascii() : 0;
  const auto is_looked_for = [&](CharClass c) { return wanted(c) != most; };
  if (is_looked_for(CharClass::kUpper)) found |= block.between('A', 'Z');
  if (is_looked_for(CharClass::kLower)) found |= block.between('a', 'z');
  if (is_looked_for(CharClass::kNumber)) found |= block.between('0', '9');
  const bool newlines = is_looked_for(CharClass::kNewline);
  const bool spaces = is_looked_for(CharClass::kSpace);
  if (newlines | spaces) {
    const uint64_t newline = block.equal('\n') | block.equal('\r');
    if (newlines) found |= newline;
    if (spaces) found |= block.equal(' ') | (block.between('\t', '\r') & ~newline);
  }
  return most ? ~found : found;
}

// (?i:'s|'t|'re|'ve|'m|'ll|'d)? at `at`: where it ends, or `at`. U+017F is a case of s.
size_t after_contraction(std::string_view text, size_t at) {
  if (at + 1 >= text.size() || text[at] != '\'') return at;
  const auto lower = [&](size_t i) -> char {
    return i < text.size() ? static_cast<char>(text[i] | 0x20) : '\0';
  };
  const char first = lower(at + 1), second = lower(at + 2);
  if (first == 's' || first == 't' || first == 'm' || first == 'd') return at + 2;
  if ((first == 'r' && second == 'e') || (first == 'v' && second == 'e') ||
      (first == 'l' && second == 'l')) {
    return at + 3;
  }
  if (text.substr(at + 1, 2) == "\xc5\xbf") return at + 3;
  return at;
}

// Letters from `at` on: where U*L+ ends, and where U+ ends; `at` where there is no match.
struct Letters {
  size_t word, capitals;
};

Letters letters_from(std::string_view text, size_t at) {
  size_t end = at, after_caseless = at;
  while (end < text.size()) {
    const Char c = look(text, end);
    if (c.type == CharClass::kUpper) {
      end = c.end;
    } else if (is_caseless(c.type)) {
      end = after_caseless = c.end;
    } else if (c.type == CharClass::kLower) {
      end = after_classes(text, c.end, kSmall);
      return {end, end};
    } else {
      break;
    }
  }
  // U* gives back until L+ can have a character: the last one without case.
  return {after_caseless, end};
}

// Whether a piece ends between two characters whatever is around them; `byte` is the first of the
// second one.
bool is_certain_cut(CharClass previous, CharClass next, char byte) {
  switch (previous) {
    case CharClass::kNewline:  // a slash may go with signs before the newline
      return !is_space(next) && byte != '/';
    case CharClass::kSpace:  // belongs to what follows, or not
      return false;
    case CharClass::kNumber:
      return next != CharClass::kNumber;
    case CharClass::kUpper:
    case CharClass::kLower:
    case CharClass::kLetter:  // an apostrophe may begin a contraction
      return is_space(next) || next == CharClass::kNumber ||
             (next == CharClass::kOther && byte != '\'');
    case CharClass::kMark:
    case CharClass::kOther:  // newlines go with signs
      return next == CharClass::kSpace || next == CharClass::kNumber;
  }
  return false;
}

// Where the character before `end` > 0 begins.
size_t start_of_last(std::string_view text, size_t end) {
  --end;
  while ((text[end] & 0xc0) == 0x80) --end;
  return end;
}

// Where \s*[\r\n]+, \s+(?!\S) or \s+ ends.
size_t after_blanks(std::string_view text, size_t at) {
  size_t end = at, last_start = at, after_newline = at;
  while (end < text.size()) {
    const Char c = look(text, end);
    if (!is_space(c.type)) break;
    last_start = end;
    end = after_classes(text, c.end, class_set({c.type}));
    if (c.type == CharClass::kNewline) {
      after_newline = end;
    } else if (end != c.end) {
      last_start = start_of_last(text, end);
    }
  }
  if (after_newline != at) return after_newline;
  return end == text.size() || last_start == at ? end : last_start;
}

// Where [^\s\p{L}\p{N}]+[\r\n/]* ends, or `at`.
size_t after_punctuation(std::string_view text, size_t at) {
  size_t end = after_classes(text, at, kSigns);
  if (end == at) return at;
  while (end < text.size() && (text[end] == '\r' || text[end] == '\n' || text[end] == '/')) ++end;
  return end;
}

}  // namespace

size_t after_classes(std::string_view text, size_t at, uint32_t classes) {
  // Most runs are short; a long one is looked at a block at a time.
  for (int i = 0; at < text.size(); ++i) {
    if (i == kShortRun) {
      for (; text.size() - at >= ByteBlock::kBytes; at += ByteBlock::kBytes) {
        const uint64_t others = ~ascii_of(ByteBlock(text.data() + at), classes);
        if (others == 0) continue;
        at += static_cast<size_t>(std::countr_zero(others));
        break;
      }
      if (at == text.size()) break;
      i = 0;
    }
    const Char c = look(text, at);
    if (!(classes >> static_cast<int>(c.type) & 1)) break;
    at = c.end;
  }
  return at;
}

size_t next_piece(std::string_view text, size_t at) {
  const Char first = look(text, at);
  if (is_letter(first.type)) {
    const Letters letters = letters_from(text, at);
    return after_contraction(text, letters.word != at ? letters.word : letters.capitals);
  }
  if (first.type == CharClass::kNumber) {  // \p{N}{1,3}
    size_t end = first.end;
    for (int i = 1; i < 3 && end < text.size(); ++i) {
      const Char next = look(text, end);
      if (next.type != CharClass::kNumber) break;
      end = next.end;
    }
    return end;
  }
  if (first.type != CharClass::kNewline && first.end < text.size()) {
    // [^\r\n\p{L}\p{N}]?U*L+(contraction)?, then [^\r\n\p{L}\p{N}]?U+L*(contraction)?, each first
    // with the optional character and then without; of these only a mark can begin a word itself.
    const Char second = look(text, first.end);
    if (is_letter(second.type) || second.type == CharClass::kMark) {
      const Letters letters = letters_from(text, first.end);
      if (letters.word != first.end) return after_contraction(text, letters.word);
      if (first.type == CharClass::kMark) return first.end;
      return after_contraction(text, letters.capitals);
    }
  }
  if (first.type == CharClass::kMark) return after_contraction(text, first.end);
  if (first.type == CharClass::kOther) return after_punctuation(text, at);
  if (text[at] == ' ') {  // " ?[^\s\p{L}\p{N}]+[\r\n/]*"
    const size_t end = after_punctuation(text, first.end);
    if (end != first.end) return end;
  }
  return after_blanks(text, at);
}

namespace {

uint64_t bits_below(size_t n) { return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

// The bytes of letters of two bytes whose case a comparison of bytes tells: those of Latin-1 and
// most of Greek, and Cyrillic from U+0400 to U+045F. All others that are not ASCII are foreign.
struct TwoByteLetters {
  uint64_t upper, lower;

  explicit TwoByteLetters(const ByteBlock& block) {
    const uint64_t after_c3 = block.equal('\xc3') << 1, after_ce = block.equal('\xce') << 1;
    const uint64_t after_cf = block.equal('\xcf') << 1, after_d0 = block.equal('\xd0') << 1;
    const uint64_t after_d1 = block.equal('\xd1') << 1;
    // The signs of multiplication and division.
    const uint64_t signs = block.equal('\x97') | block.equal('\xb7');
    const uint64_t last_upper = (after_c3 & block.at_most('\x9e') & ~signs) |
                                (after_ce & block.between('\x91', '\xa1')) |
                                (after_d0 & block.at_most('\xaf'));
    const uint64_t last_lower =
        (after_c3 & block.between('\x9f', '\xbf') & ~signs) |
        (after_ce & block.between('\xac', '\xbf')) | (after_cf & block.at_most('\x8e')) |
        (after_d0 & block.between('\xb0', '\xbf')) | (after_d1 & block.at_most('\x9f'));
    upper = last_upper | last_upper >> 1;
    lower = last_lower | last_lower >> 1;
  }
  // Whether all characters that begin in these eight bytes may be such letters, or ASCII.
  static bool may_be_all_of(uint64_t bytes) {
    for (uint64_t first = bytes & bytes << 1 & 0x8080808080808080; first; first &= first - 1) {
      const auto byte = static_cast<uint8_t>(bytes >> (std::countr_zero(first) - 7));
      if (byte != 0xc3 && byte != 0xce && byte != 0xcf && byte != 0xd0 && byte != 0xd1)
        return false;
    }
    return true;
  }
};

// Ends of the pieces of a window of 64 bytes at whose first a piece begins, as bits; pieces whose
// end the window does not show for certain are left out. The pattern, for ASCII and these letters,
// in words: bit i of a word speaks of byte i, so that `x << 1` are the bytes after those of x.
class Window {
 public:
  explicit Window(const char* bytes) : bytes_(bytes), block_(bytes) {}

  // Of the first `size` bytes. 0: next_piece() has to find the first end.
  uint64_t ends(size_t size) const {
    uint64_t upper = block_.between('A', 'Z'), lower = block_.between('a', 'z');
    uint64_t foreign = block_.beyond_ascii();
    if (foreign) {
      const TwoByteLetters letters(block_);
      upper |= letters.upper;
      lower |= letters.lower;
      foreign &= ~(letters.upper | letters.lower);
      if (foreign) size = std::min<size_t>(size, std::countr_zero(foreign));
    }
    if (size < 4) return 0;
    uint64_t known = bits_below(size);
    upper &= known;
    lower &= known;
    const uint64_t digit = block_.between('0', '9') & known;
    const uint64_t space = block_.equal(' ') & known;
    const uint64_t newline = (block_.equal('\n') | block_.equal('\r')) & known;
    const uint64_t blank = space | (block_.between('\t', '\r') & known & ~newline);
    const uint64_t letter = upper | lower;
    const uint64_t white = blank | newline;
    const uint64_t sign = known & ~(letter | digit | white);

    // [\r\n/]* after signs belongs to them. A slash in it is left to next_piece(), as are lines of
    // blanks alone: in both cases what follows depends on more than the bytes beside it.
    const uint64_t tail = newline & ~(newline + (newline & sign << 1));
    const uint64_t free_newline = newline & ~tail;
    const uint64_t indent = blank & free_newline << 1;  // begins after a newline
    const uint64_t hard =
        (block_.equal('/') & sign & tail << 1) | ((blank + indent) & ~blank & newline);
    if (hard) {
      // The run of white space and signs before it, too.
      const size_t at = static_cast<size_t>(std::countr_zero(hard));
      const uint64_t before = ~(white | sign) & bits_below(at);
      if (before == 0) return 0;
      size = static_cast<size_t>(64 - std::countl_zero(before));
      known = bits_below(size);
    }

    const uint64_t first_sign = sign & ~(sign << 1) & ~(space << 1);
    uint64_t begins =
        // Letters begin a piece after a small letter if they are capitals, and after what cannot
        // be the one character before a word.
        (upper & lower << 1) | (letter & (digit | newline | (sign & ~first_sign)) << 1) |
        first_sign | starts_of_digits(digit) |
        // White space that begins here; the last blank, which goes with what follows; and what
        // comes after the last newline.
        (white & ~tail & ~((blank | free_newline) << 1)) | (blank & ~(white >> 1)) | indent;
    const uint64_t apostrophe = block_.equal('\'') & letter << 1 & known;
    size_t certain = size < 4 ? 0 : size - 3;  // a contraction reaches so far
    if (apostrophe) begins = with_contractions(begins, apostrophe, certain);

    // White space at the end of the window may go on.
    const uint64_t dark = known & ~white;
    if (dark == 0) return 0;
    const auto run = static_cast<size_t>(64 - std::countl_zero(dark));
    if (run < size) certain = std::min(certain, run);
    return begins & bits_below(certain + 1) & ~uint64_t{1};
  }

 private:
  // \p{N}{1,3}
  static uint64_t starts_of_digits(uint64_t digit) {
    uint64_t starts = digit & ~(digit << 1);
    // From a start on every third one is another, as long as there are digits up to it: those
    // within `step` are there, then those within twice as much.
    uint64_t goes_on = digit & digit >> 1 & digit >> 2 & digit >> 3;
    for (int step = 3; step < 64; step *= 2) {
      starts |= (starts & goes_on) << step;
      goes_on &= goes_on >> step;
    }
    return starts;
  }

  // Each apostrophe of these follows a letter.
  uint64_t with_contractions(uint64_t begins, uint64_t apostrophe, size_t certain) const {
    size_t previous_end = 0;
    for (; apostrophe; apostrophe &= apostrophe - 1) {
      const auto at = static_cast<size_t>(std::countr_zero(apostrophe));
      if (at > certain) break;
      if (at == previous_end) continue;  // after a contraction: begins a piece
      const size_t end = after_contraction({bytes_, at + 3}, at);
      if (end == at) continue;
      begins &= ~(bits_below(end) & ~bits_below(at));
      if (end < ByteBlock::kBytes) begins |= uint64_t{1} << end;
      previous_end = end;
    }
    return begins;
  }

  const char* bytes_;
  ByteBlock block_;
};

}  // namespace

size_t next_pieces(std::string_view text, size_t at, size_t* ends, size_t limit) {
  size_t count = 0;
  while (at < text.size() && count < limit) {
    const size_t left = text.size() - at;
    // A window yields nothing much if a foreign character is near.
    uint64_t near = 0;
    std::memcpy(&near, text.data() + at, std::min(left, sizeof(near)));
    uint64_t found = 0;
    if (TwoByteLetters::may_be_all_of(near)) {
      if (left >= ByteBlock::kBytes) {
        found = Window(text.data() + at).ends(ByteBlock::kBytes);
      } else {
        char padded[ByteBlock::kBytes] = {};
        std::memcpy(padded, text.data() + at, left);
        found = Window(padded).ends(left);
      }
    }
    if (found == 0) {
      at = next_piece(text, at);
      ends[count++] = at;
      continue;
    }
    const size_t window = at;
    for (; found && count < limit; found &= found - 1) {
      at = window + static_cast<size_t>(std::countr_zero(found));
      ends[count++] = at;
    }
  }
  return count;
}

size_t last_certain_cut(std::string_view text, size_t from, size_t to) {
  const auto start_of_char = [&](size_t at) {
    while (at > from && (text[at] & 0xc0) == 0x80) --at;
    return at;
  };
  const size_t stop = to - from > kCutSearch ? to - kCutSearch : from;
  if (to <= stop) return from;
  size_t at = start_of_char(to - 1);
  CharClass next = look(text, at).type;
  while (at > stop) {
    const size_t before = start_of_char(at - 1);
    const CharClass previous = look(text, before).type;
    if (is_certain_cut(previous, next, text[at])) return at;
    at = before;
    next = previous;
  }
  return from;
}

}  // namespace puna
