// A small vocabulary for the tests of the tokenizer, written in both file formats.
#pragma once

#include <algorithm>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace tokenizer_fixture {

inline std::string base64(std::string_view bytes) {
  static const char* const kDigits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    const size_t count = std::min<size_t>(3, bytes.size() - i);
    unsigned bits = 0;
    for (size_t j = 0; j < 3; ++j) {
      bits = bits << 8 | (j < count ? static_cast<unsigned char>(bytes[i + j]) : 0u);
    }
    for (size_t j = 0; j < 4; ++j) text += j <= count ? kDigits[bits >> (18 - 6 * j) & 63] : '=';
  }
  return text;
}

// The bytes in an order of their own (Meta's file does not follow their values either), then
// merges; the euro sign and the two halves of one emoji are there to end inside characters.
inline std::vector<std::string> tokens() {
  std::vector<std::string> all;
  for (int i = 0; i < 256; ++i) all.push_back(std::string(1, static_cast<char>(255 - i)));
  for (const char* merge :
       {"th",       "he",       "in",   "er",  "an",   "the",   " t",  " the",     "aa",
        "aaaa",     "ing",      "ll",   "lo",  "hel",  "hello", " w",  "or",       " wor",
        "ld",       " world",   "\n\n", "  ",  "    ", "12",    "123", "\xe2\x82", "\xe2\x82\xac",
        "\xf0\x9f", "\x98\x80", "'s",   "nd",  "and",  " and",  "ab",  "bc",       "da",
        "cda",      "abc",      "cd",   "bcd", "dab",  "//"}) {
    all.push_back(merge);
  }
  return all;
}

inline std::string ranks(const std::vector<std::string>& all = tokens()) {
  std::string file;
  for (size_t i = 0; i < all.size(); ++i) file += base64(all[i]) + " " + std::to_string(i) + "\n";
  return file;
}

// Three special tokens after the ranks, one the beginning of another, with a gap before the last.
inline std::map<std::string, int> special() {
  const int first = static_cast<int>(tokens().size());
  return {{"<|eot|>", first}, {"<|e", first + 1}, {"<|image|>", first + 5}};
}

inline std::string config() {
  std::string entries;
  for (const auto& [name, id] : special()) {
    if (!entries.empty()) entries += ", ";
    entries += '"';
    entries += std::to_string(id);
    entries += R"(": {"content": ")";
    entries += name;
    entries += R"(", "special": true})";
  }
  return R"({"added_tokens_decoder": {)" + entries + "}}";
}

// A byte as tokenizer.json writes it: printable bytes as themselves, the others from U+0100 on.
inline std::string character(unsigned char byte) {
  const auto printable = [](int b) {
    return (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
  };
  int code = byte;
  if (!printable(byte)) {
    code = 256;
    for (int b = 0; b < byte; ++b) code += !printable(b);
  }
  if (code == '"' || code == '\\') return std::string("\\") + static_cast<char>(code);
  if (code < 0x80) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 63))};
}

inline std::string json_string(std::string_view token) {
  std::string text(1, '"');
  for (const char byte : token) text += character(static_cast<unsigned char>(byte));
  text += '"';
  return text;
}

// JSON text of a pattern.
inline std::string escaped(std::string_view pattern) {
  std::string text;
  for (const char c : pattern) {
    if (c == '\\' || c == '"') text += '\\';
    text += c;
  }
  return text;
}

// tokenizer.json; `merges` lists every pair that makes a token, in the order of its rank.
inline std::string json(std::string_view pattern, const std::vector<std::string>& all = tokens(),
                        bool ignore_merges = true) {
  std::map<std::string, size_t> ids;
  for (size_t i = 0; i < all.size(); ++i) ids[all[i]] = i;
  std::string vocab, merges, added;
  for (size_t i = 0; i < all.size(); ++i) {
    if (i) vocab += ',';
    vocab += json_string(all[i]);
    vocab += ':';
    vocab += std::to_string(i);
    for (size_t cut = 1; cut < all[i].size(); ++cut) {
      const std::string left = all[i].substr(0, cut), right = all[i].substr(cut);
      if (!ids.contains(left) || !ids.contains(right)) continue;
      merges += (merges.empty() ? "[" : ",[") + json_string(left) + "," + json_string(right) + "]";
    }
  }
  for (const auto& [name, id] : special()) {
    if (!added.empty()) added += ',';
    added += R"({"id":)";
    added += std::to_string(id);
    added += R"(,"content":")";
    added += name;
    added += R"(","special":true})";
  }
  return "{\"added_tokens\":[" + added +
         "],\"normalizer\":null,\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":["
         "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" +
         escaped(pattern) +
         "\"},\"behavior\":\"Isolated\",\"invert\":false},"
         "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false}]},"
         "\"model\":{\"type\":\"BPE\",\"ignore_merges\":" +
         (ignore_merges ? "true" : "false") + ",\"vocab\":{" + vocab + "},\"merges\":[" + merges +
         "]}}";
}

}  // namespace tokenizer_fixture
