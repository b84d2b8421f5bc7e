// Reading tokenizer.model, tokenizer_config.json and tokenizer.json: hostile until validated.
#include <algorithm>
#include <array>
#include <charconv>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>
#include <unordered_set>

#include "base/error.h"
#include "platform/mmap.h"
#include "text/json_cursor.h"
#include "text/pretokenizer.h"
#include "text/special_tokens.h"
#include "text/tokenizer.h"
#include "text/tokenizer_cache.h"
#include "text/unicode_classes.h"

namespace puna {

namespace {

using nlohmann::json;
using MergePair = std::pair<std::string_view, std::string_view>;

constexpr size_t kMaxTokens = Vocabulary::kMostTokens;
constexpr size_t kMaxTokenBytes = Vocabulary::kMostTokenBytes;
// tokenizer.json nests six deep; this keeps the recursion of the JSON library shallow.
constexpr int kMaxDepth = 64;

// Messages quote the file, which may hold any bytes; a message is one line of valid UTF-8.
template <class... Parts>
[[noreturn]] void refuse(ErrorCode code, const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  std::string text = to_valid_utf8(message.str());
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  }
  fail(code, "[tokenizer] ", text);
}

template <class... Parts>
[[noreturn]] void bad(const Parts&... parts) {
  refuse(ErrorCode::kModelFormat, parts...);
}

template <class... Parts>
[[noreturn]] void unsupported(const Parts&... parts) {
  refuse(ErrorCode::kUnsupported, "tokenizer.json has ", parts...);
}

// Values of base64's digits; kNoDigit where there is none.
constexpr uint8_t kNoDigit = 0xff;
constexpr std::array<uint8_t, 256> kBase64 = [] {
  std::array<uint8_t, 256> values{};
  values.fill(kNoDigit);
  const std::string_view digits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  for (size_t i = 0; i < digits.size(); ++i) {
    values[static_cast<uint8_t>(digits[i])] = static_cast<uint8_t>(i);
  }
  return values;
}();

// Decodes base64 with padding into `out`, which has room for three bytes for each four digits.
// Returns the number of bytes, or nothing if it is no base64.
std::optional<size_t> decode_base64(std::string_view text, char* out) {
  if (text.empty() || text.size() % 4 != 0) return std::nullopt;
  const size_t padding = !text.ends_with('=') ? 0 : text[text.size() - 2] != '=' ? 1 : 2;
  const auto digit = [&](size_t i) -> uint32_t {
    return i < text.size() - padding ? kBase64[static_cast<uint8_t>(text[i])] : 0;
  };
  for (size_t i = 0; i < text.size(); i += 4) {
    const uint32_t a = digit(i), b = digit(i + 1), c = digit(i + 2), d = digit(i + 3);
    if ((a | b | c | d) == kNoDigit) return std::nullopt;  // the others are below 64
    const uint32_t bits = a << 18 | b << 12 | c << 6 | d;
    *out++ = static_cast<char>(bits >> 16);
    *out++ = static_cast<char>(bits >> 8);
    *out++ = static_cast<char>(bits);
  }
  return text.size() / 4 * 3 - padding;
}

json parse(std::string_view text, const char* where) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string && c == '\\') {
      ++i;
    } else if (c == '"') {
      in_string = !in_string;
    } else if (!in_string && (c == '[' || c == '{')) {
      if (++depth > kMaxDepth) bad(where, " nests deeper than ", kMaxDepth, " levels");
    } else if (!in_string && (c == ']' || c == '}')) {
      --depth;
    }
  }
  try {
    return json::parse(text.begin(), text.end());
  } catch (const json::exception& error) {
    bad(where, " is not valid JSON: ", error.what());
  }
}

// GPT-2's printable characters for bytes, in which tokenizer.json writes its tokens: code point ->
// byte.
std::array<int, 512> byte_of_character() {
  std::array<int, 512> bytes{};
  bytes.fill(-1);
  int next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable =
        (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    bytes[printable ? byte : next++] = byte;
  }
  return bytes;
}

// The bytes that a token of tokenizer.json stands for; false if it is not in the byte-level
// alphabet.
bool decode_byte_level(std::string_view token, std::string& out) {
  static const std::array<int, 512> kBytes = byte_of_character();
  out.clear();
  for (size_t at = 0; at < token.size(); ++at) {
    uint32_t code = static_cast<uint8_t>(token[at]);
    if (code >= 0x80) {  // two bytes lead to all characters of the alphabet; others are not in it
      if (code < 0xc2 || ++at == token.size()) return false;
      const uint32_t tail = static_cast<uint8_t>(token[at]);
      if ((tail & 0xc0) != 0x80) return false;
      code = (code & 0x3f) << 6 | (tail & 0x3f);
    }
    if (code >= kBytes.size() || kBytes[code] < 0) return false;
    out += static_cast<char>(kBytes[code]);
  }
  return !out.empty();
}

// A token id, checked.
int32_t id_of(const json& value, const std::string& what) {
  if (!value.is_number_unsigned() || value.get<uint64_t>() >= kMaxTokens) {
    bad(what, " has the id ", value.dump().substr(0, 40), "; it must be a whole number below ",
        kMaxTokens);
  }
  return static_cast<int32_t>(value.get<uint64_t>());
}

std::string string_of(const json& object, const char* key, const std::string& where) {
  const auto found = object.is_object() ? object.find(key) : object.end();
  if (!object.is_object() || found == object.end() || !found->is_string()) {
    bad(where, " has no text \"", key, "\"");
  }
  return found->get<std::string>();
}

// A yes or no that the file may leave out.
bool flag_of(const json& object, const char* key, bool otherwise, const std::string& where) {
  const auto found = object.find(key);
  if (found == object.end() || found->is_null()) return otherwise;
  if (!found->is_boolean()) bad(where, ": \"", key, "\" is neither true nor false");
  return found->get<bool>();
}

std::string type_of(const json& step) {
  return step.is_object() && step.contains("type") ? string_of(step, "type", "a step") : "none";
}

// The steps before the model must be Llama 4's: Split by its pattern, then bytes as characters.
void check_steps(const json& document) {
  if (const auto found = document.find("normalizer");
      found != document.end() && !found->is_null()) {
    unsupported("the normalizer ", type_of(*found), "; Llama 4 has none");
  }
  const auto pre = document.find("pre_tokenizer");
  if (pre == document.end()) unsupported("no pre-tokenizer; Llama 4 has Split and ByteLevel");
  if (type_of(*pre) != "Sequence") {
    unsupported("the pre-tokenizer ", type_of(*pre), "; Llama 4 has Split and ByteLevel");
  }
  const auto steps = pre->find("pretokenizers");
  if (steps == pre->end() || !steps->is_array()) bad("tokenizer.json: pretokenizers is no list");
  std::string types;
  for (const json& step : *steps) {
    const std::string type = type_of(step);
    types += (types.empty() ? "" : ", ") + type;
    if (type == "Split") {
      const auto pattern = step.find("pattern");
      if (pattern == step.end()) bad("tokenizer.json: Split has no pattern");
      const std::string regex = string_of(*pattern, "Regex", "the pattern of Split");
      if (regex != kPretokenizerPattern) {
        unsupported("the pattern ", regex.substr(0, 80), "..., which is not Llama 4's");
      }
      if (string_of(step, "behavior", "Split") != "Isolated" ||
          flag_of(step, "invert", false, "Split")) {
        unsupported("a Split that is inverted or not \"Isolated\", unlike Llama 4's");
      }
    } else if (type == "ByteLevel" && (flag_of(step, "add_prefix_space", true, "ByteLevel") ||
                                       flag_of(step, "use_regex", true, "ByteLevel"))) {
      unsupported("a ByteLevel step with add_prefix_space or use_regex, unlike Llama 4's");
    }
  }
  if (types != "Split, ByteLevel") {
    unsupported("the pre-tokenizers ", types, "; Llama 4 has Split, ByteLevel");
  }
}

// The model must be byte-level BPE without the options that change its merges.
void check_model(const json& model) {
  const auto type = model.find("type");
  if (type != model.end() && *type != "BPE") {
    unsupported("the model ", string_of(model, "type", "the model"), "; Llama 4 has BPE");
  }
  for (const char* option : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
    const auto found = model.find(option);
    if (found != model.end() && !found->is_null() && *found != "") {
      unsupported("the BPE option ", option, ", which Llama 4 has not");
    }
  }
  if (flag_of(model, "byte_fallback", false, "model")) {
    unsupported("the BPE option byte_fallback, which Llama 4 has not");
  }
}

// added_tokens_decoder of tokenizer_config.json, or Llama 4's own special tokens after the ranks.
std::vector<Tokenizer::AddedToken> added_of_config(std::string_view text, size_t ranks) {
  std::vector<Tokenizer::AddedToken> added;
  const json config = text.empty() ? json::object() : parse(text, "tokenizer_config.json");
  if (!config.is_object()) bad("tokenizer_config.json is no object");
  const auto decoder = config.find("added_tokens_decoder");
  if (decoder == config.end()) {
    for (const std::string& name : llama4_special_tokens()) {
      added.push_back({name, static_cast<int32_t>(ranks + added.size()), true});
    }
    return added;
  }
  if (!decoder->is_object()) bad("tokenizer_config.json: added_tokens_decoder is no object");
  for (const auto& [key, entry] : decoder->items()) {
    const std::string where = "tokenizer_config.json: token \"" + key.substr(0, 40) + "\"";
    uint32_t id = 0;
    const auto [end, problem] = std::from_chars(key.data(), key.data() + key.size(), id);
    if (problem != std::errc() || end != key.data() + key.size() || id >= kMaxTokens) {
      bad(where, " has a name that is no id below ", kMaxTokens);
    }
    added.push_back({string_of(entry, "content", where), static_cast<int32_t>(id),
                     flag_of(entry, "special", true, where)});
  }
  return added;
}

// The list added_tokens of tokenizer.json.
std::vector<Tokenizer::AddedToken> added_of_json(const json& list) {
  if (!list.is_array()) bad("tokenizer.json: added_tokens is no list");
  std::vector<Tokenizer::AddedToken> added;
  for (const json& entry : list) {
    const std::string name = string_of(entry, "content", "an added token of tokenizer.json");
    const std::string where = "tokenizer.json: the added token " + name.substr(0, 40);
    if (!entry.contains("id")) bad(where, " has no id");
    for (const char* option : {"lstrip", "rstrip", "single_word"}) {
      if (flag_of(entry, option, false, where)) {
        unsupported("an added token ", name, " with ", option, ", which is not read");
      }
    }
    added.push_back({name, id_of(entry["id"], where), flag_of(entry, "special", true, where)});
  }
  return added;
}

// The two sides of "left right". A token may begin or end with no space: in the alphabet of bytes
// that is another character.
MergePair pair_of(std::string_view merge) {
  const size_t space = std::min(merge.find(' '), merge.size());
  return {merge.substr(0, space), merge.substr(std::min(space + 1, merge.size()))};
}

// A tokenizer.json in parts: the two lists that are nearly all of it, and the document with null in
// their places.
struct JsonParts {
  std::string document;
  bool has_vocabulary = false, has_merges = false;
  std::vector<std::pair<std::string_view, size_t>> vocabulary;  // names and ids
  std::vector<MergePair> merges;
};

JsonParts parts_of(std::string_view text, JsonCursor& cursor) {
  JsonParts parts;
  size_t copied = 0;
  const auto replace = [&](const auto& read) {
    parts.document += text.substr(copied, cursor.at() - copied);
    parts.document += "null";
    read();
    copied = cursor.at();
  };
  const auto read_vocabulary = [&] {
    cursor.object([&](std::string_view name) {
      const std::optional<uint64_t> id = cursor.whole_number();
      if (!id || *id >= kMaxTokens) {
        bad("token ", name.substr(0, 40), " has no id that is a whole number below ", kMaxTokens);
      }
      parts.vocabulary.emplace_back(name, static_cast<size_t>(*id));
    });
  };
  const auto read_merges = [&] {
    cursor.array([&] {
      if (cursor.next() != '[') {  // "left right", or since tokenizers 0.20 ["left", "right"]
        parts.merges.push_back(pair_of(cursor.string()));
        return;
      }
      std::array<std::string_view, 2> sides;
      size_t count = 0;
      cursor.array([&] {
        if (count == sides.size()) bad("merge ", parts.merges.size(), " has more than two sides");
        sides[count++] = cursor.string();
      });
      parts.merges.emplace_back(sides[0], sides[1]);
    });
  };
  bool has_model = false;
  const auto read_model = [&](std::string_view name) {
    if (name == "vocab" && cursor.next() == '{') {
      if (std::exchange(parts.has_vocabulary, true)) bad("tokenizer.json has two vocabularies");
      replace(read_vocabulary);
    } else if (name == "merges" && cursor.next() == '[') {
      if (std::exchange(parts.has_merges, true)) bad("tokenizer.json has two lists of merges");
      replace(read_merges);
    } else {
      cursor.skip();
    }
  };
  cursor.object([&](std::string_view name) {
    if (name == "model" && std::exchange(has_model, true)) bad("tokenizer.json has two models");
    if (name == "model" && cursor.next() == '{') {
      cursor.object(read_model);
    } else {
      cursor.skip();
    }
  });
  parts.document += text.substr(copied);
  return parts;
}

// Tokens by id, added ones in their places.
struct Placed {
  ByteStrings tokens;
  std::vector<bool> is_added;
};

// Sorts the added tokens by name. An empty token leaves room for one.
Placed place(ByteStrings tokens, std::vector<Tokenizer::AddedToken>& added) {
  std::sort(added.begin(), added.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
  Placed placed;
  if (added.empty() || static_cast<size_t>(added.front().id) >= tokens.size()) {
    placed.is_added.assign(tokens.size(), false);
    placed.tokens = std::exchange(tokens, {});
  }
  const auto copy_until = [&](size_t end) {
    for (size_t id = placed.tokens.size(); id < end; ++id) {
      placed.tokens.add(id < tokens.size() ? tokens[id] : std::string_view());
      placed.is_added.push_back(false);
    }
  };
  for (const Tokenizer::AddedToken& token : added) {
    const auto id = static_cast<size_t>(token.id);
    if (token.name.empty()) bad("the special token ", id, " has no name");
    if (token.name.size() > kMaxTokenBytes)
      bad("the special token ", id, " has a name of ", token.name.size(), " bytes; ",
          kMaxTokenBytes, " are the limit");
    copy_until(id);
    if (id < placed.tokens.size() || (id < tokens.size() && !tokens[id].empty())) {
      bad("the special token ", token.name, " has the id ", id, ", which another token has");
    }
    placed.tokens.add(token.name);
    placed.is_added.push_back(true);
  }
  copy_until(tokens.size());
  std::sort(added.begin(), added.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  const auto same = std::adjacent_find(
      added.begin(), added.end(), [](const auto& a, const auto& b) { return a.name == b.name; });
  if (same != added.end()) bad("two special tokens have the name ", same->name);
  return placed;
}

}  // namespace

Tokenizer Tokenizer::from_ranks(std::string_view ranks, std::string_view config) {
  ByteStrings tokens;
  tokens.reserve(ranks.size() / 16, ranks.size() / 2);
  std::array<char, kMaxTokenBytes + 4> token;
  size_t line_number = 0;
  for (size_t at = 0; at < ranks.size();) {
    size_t end = ranks.find('\n', at);
    if (end == std::string_view::npos) end = ranks.size();
    std::string_view line = ranks.substr(at, end - at);
    at = end + 1;
    ++line_number;
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (line.empty()) continue;
    const size_t space = line.find(' ');
    const std::string_view digits = space == std::string_view::npos ? "" : line.substr(space + 1);
    const std::string_view code = line.substr(0, space);
    if (code.size() / 4 * 3 > token.size()) {
      bad("line ", line_number, " has a token of over ", kMaxTokenBytes, " bytes");
    }
    const std::optional<size_t> length = decode_base64(code, token.data());
    if (digits.empty() || !length) {
      bad("line ", line_number, " of the ranks is no \"base64 rank\"");
    }
    size_t rank = 0;
    const auto [rest, problem] =
        std::from_chars(digits.data(), digits.data() + digits.size(), rank);
    if (problem != std::errc() || rest != digits.data() + digits.size() || rank != tokens.size()) {
      bad("line ", line_number, " has the rank ", digits.substr(0, 20), "; ", tokens.size(),
          " was expected");
    }
    if (tokens.size() >= kMaxTokens) bad("there are more than ", kMaxTokens, " ranks");
    if (*length > kMaxTokenBytes) {
      bad("line ", line_number, " has a token of ", *length, " bytes; ", kMaxTokenBytes,
          " are the limit");
    }
    tokens.add({token.data(), *length});
  }
  std::vector<AddedToken> added = added_of_config(config, tokens.size());
  Placed placed = place(std::move(tokens), added);
  return Tokenizer(BpeModel::of_ranks(std::move(placed.tokens), std::move(placed.is_added)),
                   std::move(added));
}

Tokenizer Tokenizer::from_json(std::string_view text) {
  JsonCursor cursor(text, "tokenizer.json");
  const JsonParts parts = parts_of(text, cursor);
  const json document = parse(parts.document, "tokenizer.json");
  if (!document.contains("model") || !document["model"].is_object()) {
    bad("tokenizer.json has no model");
  }
  const json& model = document["model"];
  check_model(model);
  check_steps(document);
  if (!parts.has_vocabulary || !parts.has_merges) {
    bad("tokenizer.json needs model.vocab and model.merges");
  }
  std::vector<AddedToken> added;
  if (document.contains("added_tokens")) added = added_of_json(document["added_tokens"]);
  std::unordered_set<std::string_view> added_names;
  for (const AddedToken& token : added) added_names.insert(token.name);
  std::vector<std::string_view> tokens;
  for (const auto& [name, id] : parts.vocabulary) {
    if (added_names.contains(name)) continue;
    if (id >= tokens.size()) tokens.resize(id + 1);
    if (!tokens[id].empty()) bad("two tokens have the id ", id);
    if (name.empty()) bad("token ", id, " is empty");
    tokens[id] = name;
  }
  return from_byte_level(tokens, parts.merges, std::move(added),
                         flag_of(model, "ignore_merges", false, "model"));
}

Tokenizer Tokenizer::from_byte_level(const std::vector<std::string_view>& names,
                                     const std::vector<MergePair>& merges,
                                     std::vector<AddedToken> added, bool whole_first) {
  ByteStrings tokens;
  std::string token;
  for (size_t id = 0; id < names.size(); ++id) {
    token.clear();
    if (!names[id].empty()) {
      if (!decode_byte_level(names[id], token)) {
        bad("token ", id, " is not written in the byte-level alphabet");
      }
      if (token.size() > kMaxTokenBytes) {
        bad("token ", id, " has ", token.size(), " bytes; ", kMaxTokenBytes, " are the limit");
      }
    }
    tokens.add(token);
  }
  ByteStrings sides;
  for (size_t i = 0; i < merges.size(); ++i) {
    for (const std::string_view side : {merges[i].first, merges[i].second}) {
      if (!decode_byte_level(side, token)) {
        bad("merge ", i, ", \"", merges[i].first.substr(0, 40), " ", merges[i].second.substr(0, 40),
            "\", is not two tokens of the byte-level alphabet");
      }
      sides.add(token);
    }
  }
  Placed placed = place(std::move(tokens), added);
  return Tokenizer(
      BpeModel::of_merges(std::move(placed.tokens), std::move(placed.is_added), sides, whole_first),
      std::move(added));
}

namespace {

size_t total_bytes(const std::vector<std::string_view>& texts) {
  size_t bytes = 0;
  for (const std::string_view text : texts) bytes += text.size();
  return bytes;
}

void add_to(Sha256& sum, std::string_view text) {
  sum.number(text.size()).update(text.data(), text.size());
}

void add_to(Sha256& sum, const std::vector<std::string_view>& texts) {
  // In one piece: a sum of many short ones takes longer.
  std::string joined;
  joined.reserve(total_bytes(texts) + texts.size() * sizeof(uint64_t));
  for (const std::string_view text : texts) {
    const uint64_t size = text.size();
    joined.append(reinterpret_cast<const char*>(&size), sizeof size);
    joined += text;
  }
  add_to(sum, joined);
}

}  // namespace

Tokenizer Tokenizer::from_gguf(const GgufVocabulary& vocabulary) {
  const auto identify = [&](Sha256& sum) {
    add_to(sum, "gguf");
    add_to(sum, vocabulary.tokens);
    add_to(sum, vocabulary.merges);
    sum.update(vocabulary.types.data(), vocabulary.types.size() * sizeof(int64_t));
  };
  return cached_tokenizer(total_bytes(vocabulary.tokens) + total_bytes(vocabulary.merges), identify,
                          [&] { return built_of_gguf(vocabulary); });
}

Tokenizer Tokenizer::built_of_gguf(const GgufVocabulary& vocabulary) {
  const auto& [names, types, merges] = vocabulary;
  if (names.size() > kMaxTokens)
    bad("there are ", names.size(), " tokens; ", kMaxTokens, " are the limit");
  if (!types.empty() && types.size() != names.size()) {
    bad("there are ", names.size(), " tokens and ", types.size(), " token types");
  }
  std::vector<std::string_view> tokens(names.size());
  std::vector<AddedToken> added;
  for (size_t id = 0; id < names.size(); ++id) {
    const int64_t type = vocabulary.type(id);
    if (type == GgufVocabulary::kNormal) {
      if (names[id].empty()) bad("token ", id, " is empty");
      tokens[id] = names[id];
    } else if (vocabulary.is_added(id)) {
      added.push_back(
          {std::string(names[id]), static_cast<int32_t>(id), vocabulary.is_special(id)});
    } else if (type != GgufVocabulary::kUnused) {
      bad("token ", id, " has the type ", type, "; byte-level BPE has 1 to 5");
    }
  }
  std::vector<MergePair> pairs;
  pairs.reserve(merges.size());
  for (const std::string_view merge : merges) pairs.push_back(pair_of(merge));
  return from_byte_level(tokens, pairs, std::move(added), /*whole_first=*/true);
}

namespace {

MappedFile map_whole(const std::string& path) {
  constexpr size_t kMost = size_t{1} << 30;  // Llama 4's tokenizer.json has 28 MB
  MappedFile file(path);
  if (file.size() > kMost)
    bad(path, " has ", file.size(), " bytes; a tokenizer's file has at most ", kMost);
  return file;
}

}  // namespace

Tokenizer Tokenizer::from_file(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  if (fs::is_directory(path, ignored)) {
    std::optional<Tokenizer> found = find_tokenizer(path);
    if (!found) {
      fail(ErrorCode::kModelNotFound, "[tokenizer] ", path,
           " has neither tokenizer.json nor tokenizer.model");
    }
    return std::move(*found);
  }
  const MappedFile file = map_whole(path);
  const std::string_view text(reinterpret_cast<const char*>(file.data()), file.size());
  const size_t first = text.find_first_not_of(" \t\r\n");
  if (first != std::string_view::npos && text[first] == '{') {
    const auto identify = [&](Sha256& sum) {
      add_to(sum, "json");
      add_to(sum, text);
    };
    return cached_tokenizer(text.size(), identify, [&] { return from_json(text); });
  }
  std::string_view config;
  std::optional<MappedFile> beside;
  if (const fs::path found = fs::path(path).parent_path() / "tokenizer_config.json";
      fs::exists(found, ignored)) {
    beside.emplace(map_whole(found.string()));
    config = {reinterpret_cast<const char*>(beside->data()), beside->size()};
  }
  const auto identify = [&](Sha256& sum) {
    add_to(sum, "ranks");
    add_to(sum, text);
    add_to(sum, config);
  };
  return cached_tokenizer(text.size(), identify, [&] { return from_ranks(text, config); });
}

std::optional<Tokenizer> find_tokenizer(const std::string& directory) {
  namespace fs = std::filesystem;
  for (const char* name : {"tokenizer.json", "tokenizer.model"}) {
    const fs::path path = fs::path(directory) / name;
    std::error_code ignored;
    if (fs::exists(path, ignored)) return Tokenizer::from_file(path.string());
  }
  return std::nullopt;
}

}  // namespace puna
