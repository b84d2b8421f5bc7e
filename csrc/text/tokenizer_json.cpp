#include <nlohmann/json.hpp>

#include "base/error.h"
#include "text/pretokenizer.h"
#include "text/tokenizer.h"
#include "text/unicode_classes.h"

namespace puna {

std::string tokenizer_json(const GgufVocabulary& vocabulary) {
  using nlohmann::json;
  json tokens = json::object(), added = json::array(), merges = json::array();
  for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
    const std::string name(vocabulary.tokens[id]);
    if (to_valid_utf8(name) != name) {
      fail(ErrorCode::kUnsupported, "[tokenizer] the name of token ", id,
           " is no UTF-8, which tokenizer.json cannot hold");
    }
    if (vocabulary.is_added(id)) {
      added.push_back({{"id", id},
                       {"content", name},
                       {"special", vocabulary.is_special(id)},
                       {"single_word", false},
                       {"lstrip", false},
                       {"rstrip", false},
                       {"normalized", false}});
    } else if (vocabulary.type(id) == GgufVocabulary::kNormal) {
      tokens[name] = id;
    }
  }
  for (const std::string_view merge : vocabulary.merges) merges.push_back(merge);
  const json split = {{"type", "Split"},
                      {"pattern", {{"Regex", kPretokenizerPattern}}},
                      {"behavior", "Isolated"},
                      {"invert", false}};
  const json bytes = {{"type", "ByteLevel"},
                      {"add_prefix_space", false},
                      {"trim_offsets", true},
                      {"use_regex", false}};
  return json{
      {"version", "1.0"},
      {"normalizer", nullptr},
      {"added_tokens", added},
      {"pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", json::array({split, bytes})}}},
      {"post_processor", nullptr},
      {"decoder", bytes},
      {"model",
       {{"type", "BPE"},
        {"dropout", nullptr},
        {"unk_token", nullptr},
        {"continuing_subword_prefix", nullptr},
        {"end_of_word_suffix", nullptr},
        {"fuse_unk", false},
        {"byte_fallback", false},
        {"ignore_merges", true},
        {"vocab", tokens},
        {"merges", merges}}}}
      .dump();
}

}  // namespace puna
