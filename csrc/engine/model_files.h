// What a model's files hold besides weights: its tokenizer and its chat template, wherever they
// are.
#pragma once

#include <map>
#include <optional>
#include <string>

#include "io/checkpoint.h"
#include "text/tokenizer.h"

namespace puna {

// The tokenizer of an opened model, or nothing if it has none. Throws ModelFormat, or Unsupported
// naming a kind of tokenizer that is not Llama 4's.
std::optional<Tokenizer> tokenizer_of(const Checkpoint& checkpoint);

// What a GGUF file's tokenizer is made of, or nothing if the file has none. It points into the
// file, and is not checked yet. Throws as tokenizer_of().
std::optional<GgufVocabulary> gguf_vocabulary(const GgufFile& file);

// A tokenizer alone: Tokenizer::from_file(), or that of a GGUF file.
Tokenizer read_tokenizer(const std::string& path);

// Chat templates in a GGUF file's metadata, by name ("default", "tool_use", ...), and the names of
// the tokens that they may ask for ("bos_token", "eos_token", "pad_token"), as far as there.
struct GgufChat {
  std::map<std::string, std::string> templates, tokens;
};
GgufChat gguf_chat(const GgufFile& file);
GgufChat read_gguf_chat(const std::string& path);

}  // namespace puna
