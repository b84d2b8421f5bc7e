// Llama 4's pre-tokeniser: where a text is cut before byte-pair encoding.
#pragma once

#include <cstddef>
#include <string_view>

namespace puna {

// The pattern, in the syntax of tokenizer.json; next_piece() is its equal.
extern const char* const kPretokenizerPattern;

// End of the piece that begins at `at` < text.size(); text is valid UTF-8.
size_t next_piece(std::string_view text, size_t at);

}  // namespace puna
