// Llama 4's pre-tokeniser: where a text is cut before byte-pair encoding.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string_view>

#include "text/unicode_classes.h"

namespace puna {

// The pattern, in the syntax of tokenizer.json; next_piece() is its equal.
extern const char* const kPretokenizerPattern;

// End of the piece that begins at `at` < text.size(); text is valid UTF-8.
size_t next_piece(std::string_view text, size_t at);

// Ends of the pieces from `at` on, `limit` of them unless the text ends before. Returns their
// number.
size_t next_pieces(std::string_view text, size_t at, size_t* ends, size_t limit);

// Where the characters from `at` on end whose classes are in a set: bit i is that of class i.
size_t after_classes(std::string_view text, size_t at, uint32_t classes);
constexpr uint32_t class_set(std::initializer_list<CharClass> classes) {
  uint32_t set = 0;
  for (const CharClass c : classes) set |= uint32_t{1} << static_cast<int>(c);
  return set;
}

// A piece after which there are so many more is the same whatever follows the text. What decides
// its end lies within the two pieces behind it, and two bytes further: the rest of a run of
// capitals or of white space, which are one piece and two at most, or the letters of a contraction.
constexpr size_t kPiecesAhead = 3;

// The last place in text[from, to) at which a piece ends whatever the text before it and the text
// behind the two characters there, or `from` if there is none. Looks back `kCutSearch` bytes at
// most.
size_t last_certain_cut(std::string_view text, size_t from, size_t to);
constexpr size_t kCutSearch = 4096;

}  // namespace puna
