#include "engine/model_files.h"

#include "base/error.h"
#include "io/message.h"

namespace puna {

namespace {

constexpr std::string_view kTemplateKey = "tokenizer.chat_template";

// By name: the pre-tokeniser of another model would give other ids without any error.
void check_kind(const GgufFile& file, const std::string& key, std::string_view wanted) {
  const std::string_view kind = file.text(key).value_or("missing");
  if (kind == wanted) return;
  file.refuse(ErrorCode::kUnsupported, key, " is ", printable(kind, 60), "; Llama 4's is ", wanted);
}

std::optional<Tokenizer> tokenizer_of(const GgufFile& file) {
  const std::optional<GgufVocabulary> vocabulary = gguf_vocabulary(file);
  if (!vocabulary) return std::nullopt;
  return Tokenizer::from_gguf(*vocabulary);
}

}  // namespace

std::optional<GgufVocabulary> gguf_vocabulary(const GgufFile& file) {
  GgufVocabulary vocabulary;
  auto tokens = file.texts("tokenizer.ggml.tokens");
  if (!tokens) return std::nullopt;
  check_kind(file, "tokenizer.ggml.model", "gpt2");
  check_kind(file, "tokenizer.ggml.pre", "llama4");
  auto merges = file.texts("tokenizer.ggml.merges");
  if (!merges) file.refuse(ErrorCode::kModelFormat, "tokenizer.ggml.merges is missing");
  vocabulary.tokens = std::move(*tokens);
  vocabulary.merges = std::move(*merges);
  if (auto types = file.integers("tokenizer.ggml.token_type")) vocabulary.types = std::move(*types);
  return vocabulary;
}

std::optional<Tokenizer> tokenizer_of(const Checkpoint& checkpoint) {
  if (checkpoint.gguf()) return tokenizer_of(*checkpoint.gguf());
  return find_tokenizer(checkpoint.path());
}

Tokenizer read_tokenizer(const std::string& path) {
  if (!is_gguf(path)) return Tokenizer::from_file(path);
  const GgufFile file(gguf_parts(path).front());
  std::optional<Tokenizer> tokenizer = tokenizer_of(file);
  if (!tokenizer) file.refuse(ErrorCode::kModelNotFound, "it holds no tokenizer");
  return std::move(*tokenizer);
}

GgufChat read_gguf_chat(const std::string& path) {
  return gguf_chat(GgufFile(gguf_parts(path).front()));
}

GgufChat gguf_chat(const GgufFile& file) {
  GgufChat chat;
  const std::string key(kTemplateKey);
  if (const auto text = file.text(key)) chat.templates.emplace("default", *text);
  for (const std::string_view name :
       file.texts("tokenizer.chat_templates").value_or(std::vector<std::string_view>{})) {
    const auto text = file.text(key + "." + std::string(name));
    if (text) chat.templates.emplace(name, *text);
  }
  const auto tokens = file.texts("tokenizer.ggml.tokens");
  for (const auto& [name, id_key] : {std::pair{"bos_token", "tokenizer.ggml.bos_token_id"},
                                     std::pair{"eos_token", "tokenizer.ggml.eos_token_id"},
                                     std::pair{"pad_token", "tokenizer.ggml.padding_token_id"}}) {
    const int64_t id = file.integer(id_key).value_or(-1);
    if (tokens && id >= 0 && id < static_cast<int64_t>(tokens->size())) {
      chat.tokens.emplace(name, (*tokens)[id]);
    }
  }
  return chat;
}

}  // namespace puna
