// The regular expression, by hand. Its alternatives are tried in order, each greedily and with
// backtracking; the comments give the alternative that a step stands for, with
//   U = [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]   L = [\p{Ll}\p{Lm}\p{Lo}\p{M}]
#include "text/pretokenizer.h"

#include "text/unicode_classes.h"

namespace puna {

const char* const kPretokenizerPattern =
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+"
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*"
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    "\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

namespace {

constexpr size_t kNone = static_cast<size_t>(-1);

struct Cursor {
  std::string_view text;

  bool at_end(size_t at) const { return at >= text.size(); }
  // The class of the character at `at`; *next receives where it ends.
  CharClass look(size_t at, size_t* next) const {
    int length = 0;
    const uint32_t code = decode_utf8(text, at, &length);
    *next = at + static_cast<size_t>(length);
    return class_of(code);
  }
};

bool is_caseless(CharClass c) { return c == CharClass::kLetter || c == CharClass::kMark; }
bool is_u(CharClass c) { return c == CharClass::kUpper || is_caseless(c); }
bool is_l(CharClass c) { return c == CharClass::kLower || is_caseless(c); }
bool is_space(CharClass c) { return c == CharClass::kSpace || c == CharClass::kNewline; }
bool is_punctuation(CharClass c) { return c == CharClass::kOther || c == CharClass::kMark; }

// (?i:'s|'t|'re|'ve|'m|'ll|'d)? at `at`: where it ends, or `at`. U+017F is a case of s.
size_t after_contraction(std::string_view text, size_t at) {
  if (at + 1 >= text.size() || text[at] != '\'') return at;
  const auto lower = [&](size_t i) -> char {
    if (i >= text.size()) return 0;
    const char c = text[i];
    return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c;
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

// U*L+ from `at`, or kNone.
size_t after_word(const Cursor& cursor, size_t at) {
  size_t end = at, next = 0, after_last_caseless = kNone;
  CharClass c{};
  while (!cursor.at_end(end) && is_u(c = cursor.look(end, &next))) {
    end = next;
    if (is_caseless(c)) after_last_caseless = next;
  }
  if (cursor.at_end(end) || !is_l(cursor.look(end, &next))) {
    // U* gives back until L+ can have a character: the last one without case.
    return after_last_caseless;
  }
  while (!cursor.at_end(end) && is_l(cursor.look(end, &next))) end = next;
  return end;
}

// U+ from `at`, or kNone. (L* finds nothing after it, or U*L+ would have matched.)
size_t after_capitals(const Cursor& cursor, size_t at) {
  size_t end = at, next = 0;
  while (!cursor.at_end(end) && is_u(cursor.look(end, &next))) end = next;
  return end == at ? kNone : end;
}

}  // namespace

size_t next_piece(std::string_view text, size_t at) {
  const Cursor cursor{text};
  size_t after_first = 0, next = 0;
  const CharClass first = cursor.look(at, &after_first);
  const bool prefix =
      first == CharClass::kOther || first == CharClass::kMark || first == CharClass::kSpace;

  // [^\r\n\p{L}\p{N}]?U*L+(contraction)?, then [^\r\n\p{L}\p{N}]?U+L*(contraction)?, each first
  // with the optional character and then without.
  for (const auto word : {&after_word, &after_capitals}) {
    if (prefix) {
      const size_t end = word(cursor, after_first);
      if (end != kNone) return after_contraction(text, end);
    }
    const size_t end = word(cursor, at);
    if (end != kNone) return after_contraction(text, end);
  }

  // \p{N}{1,3}
  if (first == CharClass::kNumber) {
    size_t end = after_first;
    for (int i = 1; i < 3 && !cursor.at_end(end) && cursor.look(end, &next) == CharClass::kNumber;
         ++i)
      end = next;
    return end;
  }

  // " ?[^\s\p{L}\p{N}]+[\r\n/]*"
  size_t end = text[at] == ' ' ? after_first : at;
  const size_t start = end;
  while (!cursor.at_end(end) && is_punctuation(cursor.look(end, &next))) end = next;
  if (end > start) {
    while (!cursor.at_end(end) && (text[end] == '\r' || text[end] == '\n' || text[end] == '/'))
      ++end;
    return end;
  }

  // \s*[\r\n]+, \s+(?!\S), \s+
  size_t last_start = at, after_newline = kNone;
  CharClass c{};
  end = at;
  while (!cursor.at_end(end) && is_space(c = cursor.look(end, &next))) {
    last_start = end;
    end = next;
    if (c == CharClass::kNewline) after_newline = next;
  }
  if (after_newline != kNone) return after_newline;
  if (cursor.at_end(end) || last_start == at) return end;
  return last_start;
}

}  // namespace puna
