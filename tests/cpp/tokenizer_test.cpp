// The tokenizer on a small vocabulary: pieces, merges, special tokens, both file formats. Agreement
// with other implementations on Llama 4's own ranks: tests/test_tokenizer.py.
#include "text/tokenizer.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "check.h"
#include "text/pretokenizer.h"
#include "text/special_tokens.h"
#include "text/unicode_classes.h"
#include "text/wide_text.h"
#include "tokenizer_fixture.h"

using puna::AllowedSpecial;
using puna::ErrorCode;
using puna::Tokenizer;
namespace fixture = tokenizer_fixture;

namespace {

// What a failed check prints, and compares.
std::string shown(const std::vector<std::string>& pieces) {
  std::string text;
  for (const std::string& piece : pieces) text += "[" + piece + "]";
  return text;
}

std::string shown(const std::vector<int32_t>& ids) {
  std::string text;
  for (const int32_t id : ids) text += std::to_string(id) + " ";
  return text;
}

std::vector<std::string> pieces_of(std::string_view text) {
  std::vector<std::string> pieces;
  for (size_t at = 0; at < text.size();) {
    const size_t end = puna::next_piece(text, at);
    pieces.emplace_back(text.substr(at, end - at));
    at = end;
  }
  return pieces;
}

Tokenizer small() { return Tokenizer::from_ranks(fixture::ranks(), fixture::config()); }

// Byte-pair encoding as it is defined: again and again join the pair that makes the token of the
// lowest rank, the leftmost of equals.
void merge_plainly(std::string_view piece, std::vector<int32_t>& out) {
  static const std::vector<std::string> kTokens = fixture::tokens();
  static const auto kRanks = [] {
    std::map<std::string, int32_t> ranks;
    for (const std::string& token : kTokens)
      ranks.emplace(token, static_cast<int32_t>(ranks.size()));
    return ranks;
  }();
  std::vector<std::string> parts;
  for (const char c : piece) parts.push_back(std::string(1, c));
  for (;;) {
    int32_t best = INT32_MAX;
    size_t at = 0;
    for (size_t i = 0; i + 1 < parts.size(); ++i) {
      const auto found = kRanks.find(parts[i] + parts[i + 1]);
      if (found != kRanks.end() && found->second < best) {
        best = found->second;
        at = i;
      }
    }
    if (best == INT32_MAX) break;
    parts[at] += parts[at + 1];
    parts.erase(parts.begin() + static_cast<int64_t>(at) + 1);
  }
  for (const std::string& part : parts) out.push_back(kRanks.at(part));
}

std::vector<int32_t> encode_plainly(std::string_view text) {
  static const std::vector<std::string> kTokens = fixture::tokens();
  std::vector<int32_t> ids;
  for (const std::string& piece : pieces_of(text)) {
    const auto whole = std::find(kTokens.begin(), kTokens.end(), piece);
    if (whole != kTokens.end()) {
      ids.push_back(static_cast<int32_t>(whole - kTokens.begin()));
    } else {
      merge_plainly(piece, ids);
    }
  }
  return ids;
}

// UTF-8 of code points by its definition.
std::string utf8_of(const std::vector<uint32_t>& codes) {
  std::string text;
  for (const uint32_t c : codes) {
    const int tails = c < 0x80 ? 0 : c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
    const uint32_t lead[] = {0, 0xc0, 0xe0, 0xf0};
    text += static_cast<char>(lead[tails] | c >> (6 * tails));
    for (int i = tails - 1; i >= 0; --i) text += static_cast<char>(0x80 | (c >> (6 * i) & 0x3f));
  }
  return text;
}

struct Case {
  const char* text;
  std::vector<std::string> pieces;
};

// A folder that is removed at the end of a test.
struct Folder {
  std::filesystem::path path;
  explicit Folder(const std::string& name)
      : path(std::filesystem::temp_directory_path() / ("puna_" + name)) {
    std::filesystem::remove_all(path);
    std::filesystem::create_directories(path);
  }
  ~Folder() { std::filesystem::remove_all(path); }
  void write(const std::string& name, const std::string& text) const {
    std::ofstream(path / name, std::ios::binary) << text;
  }
};

}  // namespace

TEST(pieces_are_those_of_the_regular_expression) {
  // Right-hand sides come from Python's `regex` module with the pattern.
  const std::vector<Case> cases = {
      {"", {}},
      {"Hello world", {"Hello", " world"}},
      {"Hello  world", {"Hello", " ", " world"}},
      {"HelloWorld", {"Hello", "World"}},
      {"HELLOWorld", {"HELLOWorld"}},
      // U* backs up to the last letter without case, from which L+ can begin.
      {"日A b", {"日", "A", " b"}},
      {"日Ab", {"日Ab"}},
      {"A日B", {"A日", "B"}},
      // Combining marks are letters to both classes, and punctuation too.
      {"\u0301AB", {"\u0301", "AB"}},
      {"AB\u0301", {"AB\u0301"}},
      {"x\u0301y", {"x\u0301y"}},
      {" \u0301", {" \u0301"}},
      {"❤\ufe0f", {"❤\ufe0f"}},
      {"😀❤\ufe0f", {"😀❤\ufe0f"}},
      // Contractions, in which U+017F is an s.
      {"don't DON'T", {"don't", " DON'T"}},
      {"it'\u017f x", {"it'\u017f", " x"}},
      {"we'LLama", {"we'LL", "ama"}},
      {"x'vey", {"x've", "y"}},
      {"''s", {"''", "s"}},
      {"'s", {"'s"}},
      {"12345", {"123", "45"}},
      {"a1b", {"a", "1", "b"}},
      {"½²Ⅷ٣", {"½²Ⅷ", "٣"}},
      {" !x", {" !", "x"}},
      {"  !x", {" ", " !", "x"}},
      {"a.b", {"a", ".b"}},
      {"!!\r\n\r\n/", {"!!\r\n\r\n/"}},
      {"//\n/!", {"//\n/", "!"}},
      {"x \n y", {"x", " \n", " y"}},
      {"x  ", {"x", "  "}},
      {"  x", {" ", " x"}},
      {"\n   x", {"\n", "  ", " x"}},
      {"\n   \n", {"\n   \n"}},
      {"\r\n x", {"\r\n", " x"}},
      {"a\r\nb", {"a", "\r\n", "b"}},
      {"\t\tx", {"\t", "\tx"}},
      {"\u3000x", {"\u3000x"}},
      {"\u00a0!", {"\u00a0", "!"}},
      // Not White_Space, whatever Python's str.isspace says of U+001C.
      {"\u200bx", {"\u200bx"}},
      {"\x1cx", {"\x1cx"}},
      {"ǅab", {"ǅab"}},
      {"ʰA", {"ʰ", "A"}},
  };
  for (const Case& c : cases) CHECK_EQ(shown(pieces_of(c.text)), shown(c.pieces));
}

// Windows of many bytes against one piece at a time, whose steps are the pattern's alternatives.
TEST(windows_cut_as_single_pieces_do) {
  std::mt19937 random(7);
  const std::vector<std::string> signs = {
      " ", "  ", "\n",     "\r\n", "\t", "'", "'s", "'LL", "'\u017f", "/", "!", "-", "1", "22",
      "«", "—",  "\u0301", "日",   "a",  "B", "×",  "÷",   "Þ",       "ß", "Я", "р", "џ", "ѡ"};
  for (int i = 0; i < 30'000; ++i) {
    // Letters of a language, from all around those that windows know.
    const uint32_t firsts[] = {'A', 0xb0, 0x370, 0x3f0, 0x400, 0x430, 0x450};
    const uint32_t first = firsts[random() % 7];
    const size_t words = 1 + random() % 8;
    std::string text;
    for (size_t n = random() % 60; n > 0; --n) {
      text += random() % words == 0 ? signs[random() % signs.size()]
                                    : utf8_of({first + static_cast<uint32_t>(random() % 80)});
    }
    std::vector<size_t> expected;
    for (size_t at = 0; at < text.size();) expected.push_back(at = puna::next_piece(text, at));
    std::vector<size_t> found(text.size() + 1);
    for (size_t count = 0, at = 0; at < text.size();) {
      const size_t limit = std::min<size_t>(found.size() - count, 1 + random() % 40);
      const size_t more = puna::next_pieces(text, at, found.data() + count, limit);
      count += more;
      at = found[count - 1];
      if (at == text.size()) found.resize(count);
    }
    if (text.empty()) found.clear();
    CHECK(found == expected);
  }
}

TEST(classes_of_characters) {
  using puna::CharClass;
  CHECK(puna::class_of('A') == CharClass::kUpper);
  CHECK(puna::class_of(0x01c5) == CharClass::kUpper);  // titlecase
  CHECK(puna::class_of(0x017f) == CharClass::kLower);
  CHECK(puna::class_of(0x02b0) == CharClass::kLetter);
  CHECK(puna::class_of(0x0301) == CharClass::kMark);
  CHECK(puna::class_of(0x2167) == CharClass::kNumber);
  CHECK(puna::class_of('\n') == CharClass::kNewline);
  CHECK(puna::class_of(0x85) == CharClass::kSpace);
  CHECK(puna::class_of(0x1c) == CharClass::kOther);
  CHECK(puna::class_of(0x10ffff) == CharClass::kOther);
  CHECK(puna::class_of(0x088f) == CharClass::kOther);  // a letter from Unicode 17 on
}

// Long runs are looked at 64 bytes at a time: with every set of classes, each of which a character
// of the other classes ends, at places all over a block.
TEST(runs_end_where_single_characters_say) {
  const std::string ascii = [] {
    std::string all;
    for (char c = 0; c < 0x7f; ++c) all += c;
    return all + '\x7f';
  }();
  const std::vector<std::string> wide = {"\u00e9", "\u00c9", "\u4e00", "\u0301",
                                         "\u0663", "\u00a0", "\u2014"};
  std::mt19937 random(5);
  for (uint32_t classes = 1; classes < 256; ++classes) {
    const auto is_in = [&](std::string_view character) {
      int length = 0;
      const uint32_t code = puna::decode_utf8(character, 0, &length);
      return (classes >> static_cast<int>(puna::class_of(code)) & 1) != 0;
    };
    std::vector<std::string> inside, outside;
    const auto sort_in = [&](const std::string& c) { (is_in(c) ? inside : outside).push_back(c); };
    for (const char c : ascii) sort_in({c});
    const size_t plain = inside.size();
    for (const std::string& c : wide) sort_in(c);
    for (const size_t length : {0, 1, 23, 24, 25, 87, 88, 89, 200, 300}) {
      for (const bool all : {false, true}) {
        const size_t choices = all ? inside.size() : plain;
        if (choices == 0) continue;
        std::string text = "x";
        for (size_t i = 0; i < length; ++i) text += inside[random() % choices];
        const size_t end = text.size();
        if (!outside.empty()) text += outside[random() % outside.size()];
        for (int i = 0; i < 80; ++i) text += inside[random() % inside.size()];
        const size_t expected = outside.empty() ? text.size() : end;
        CHECK_EQ(puna::after_classes(text, 1, classes), expected);
      }
    }
  }
}

TEST(merges_are_those_of_the_definition) {
  const Tokenizer tokenizer = small();
  std::mt19937 random(1);
  const std::vector<std::string> alphabets = {"abcd", "aht e", "inghelo wrd", "a", "12 \n/'s"};
  for (int i = 0; i < 3000; ++i) {
    const std::string& alphabet = alphabets[random() % alphabets.size()];
    std::string text;
    // Up to 200 bytes: beyond the length at which the heap takes over.
    for (size_t left = random() % 200; left > 0; --left) {
      text += alphabet[random() % alphabet.size()];
    }
    const std::vector<int32_t> ids = tokenizer.encode(text);
    CHECK_EQ(shown(ids), shown(encode_plainly(text)));
    CHECK_EQ(tokenizer.decode(ids), text);
  }
}

TEST(one_long_piece_takes_no_quadratic_time) {
  const Tokenizer tokenizer = small();
  std::string text(1 << 20, 'a');
  for (size_t i = 0; i < text.size(); i += 3) text[i] = "abcdhelo"[i * 2654435761u >> 7 & 7];
  const auto begin = std::chrono::steady_clock::now();
  const std::vector<int32_t> ids = tokenizer.encode(text);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  CHECK(seconds.count() < 30);  // under a second; n^2 steps would take many minutes
  CHECK_EQ(tokenizer.decode(ids), text);
}

TEST(special_tokens_are_read_only_where_allowed) {
  const Tokenizer tokenizer = small();
  const auto special = fixture::special();
  const int32_t eot = special.at("<|eot|>"), e = special.at("<|e"), image = special.at("<|image|>");
  const auto ids = [&](const char* text, const AllowedSpecial& allowed) {
    return tokenizer.encode(text, {.special = allowed});
  };
  const std::string text = "hello<|eot|>";
  CHECK_EQ(shown(tokenizer.encode(text)), shown(encode_plainly(text)));
  CHECK_EQ(shown(ids("<|eot|><|image|>", AllowedSpecial::every())), shown({eot, image}));
  // The longest of those that begin at the leftmost place, among the allowed.
  CHECK_EQ(ids("<|eot|>", {false, {"<|e"}})[0], e);
  CHECK_EQ(ids("<|eot", AllowedSpecial::every())[0], e);
  CHECK_EQ(shown(ids("<|eot|>", {false, {"<|image|>"}})), shown(encode_plainly("<|eot|>")));
  const std::vector<int32_t> nested = ids("<<|eot|>>", AllowedSpecial::every());
  CHECK_EQ(shown(nested), shown({255 - '<', eot, 255 - '>'}));
  // A special token ends the text before it: the blanks stay one piece.
  CHECK_EQ(ids("ab  <|eot|>", AllowedSpecial::every()).size(), size_t{3});
  CHECK_EQ(tokenizer.special_tokens().size(), special.size());
}

TEST(decoding) {
  const Tokenizer tokenizer = small();
  const int32_t eot = fixture::special().at("<|eot|>");
  CHECK_EQ(tokenizer.decode(std::vector<int32_t>{255 - 'h', eot, 255 - 'i'}),
           std::string("h<|eot|>i"));
  CHECK_EQ(tokenizer.decode(std::vector<int32_t>{255 - 'h', eot, 255 - 'i'}, /*skip_special=*/true),
           std::string("hi"));
  CHECK(tokenizer.is_special(eot));
  CHECK(!tokenizer.is_special(3) && !tokenizer.is_special(-1) && !tokenizer.is_special(1 << 30));
  CHECK_EQ(tokenizer.vocab_size(), int64_t{fixture::special().at("<|image|>") + 1});
  CHECK_EQ(tokenizer.bytes_of(eot + 3), std::string_view());  // in the gap
  CHECK_THROWS(ErrorCode::kInvalidRequest, tokenizer.decode(std::vector<int32_t>{-1}));
  CHECK_THROWS(
      ErrorCode::kInvalidRequest,
      tokenizer.decode(std::vector<int32_t>{static_cast<int32_t>(tokenizer.vocab_size())}));
}

// Into exactly the memory that is needed, in which a sanitizer sees what goes beyond.
TEST(decoding_writes_the_bytes_of_tokens_of_any_length) {
  auto tokens = fixture::tokens();
  for (size_t size : {15, 16, 17, 31, 32, 33, 79}) {
    tokens.push_back(std::string(size, '-'));
    tokens.push_back(std::string(size - 2, '-') + "é");
  }
  const Tokenizer tokenizer = Tokenizer::from_ranks(fixture::ranks(tokens));
  const auto count = static_cast<size_t>(tokenizer.vocab_size());
  std::mt19937 random(6);
  for (int i = 0; i < 2000; ++i) {
    std::vector<int32_t> ids;
    const size_t plain = tokens.size(), few = plain - 20;  // the last of which are long
    const std::pair<size_t, size_t> ranges[] = {{0, plain}, {few, plain}, {few, count}};
    const auto [first, last] = ranges[random() % 3];
    for (size_t n = random() % 12; n > 0; --n) {
      ids.push_back(static_cast<int32_t>(first + random() % (last - first)));
    }
    for (const bool skip : {false, true}) {
      std::string expected;
      for (const int32_t id : ids) {
        if (!skip || !tokenizer.is_special(id)) expected += tokenizer.bytes_of(id);
      }
      const Tokenizer::DecodedSize size = tokenizer.decoded_size(ids, skip);
      CHECK_EQ(size.bytes, expected.size());
      CHECK_EQ(size.is_ascii,
               std::none_of(expected.begin(), expected.end(), [](char c) { return c & 0x80; }));
      const auto memory = std::make_unique<char[]>(size.bytes);
      tokenizer.decode_into(ids, skip, {memory.get(), size.bytes});
      CHECK_EQ(std::string(memory.get(), size.bytes), expected);
      CHECK_EQ(tokenizer.decode(ids, skip), expected);
    }
  }
}

TEST(bytes_that_are_no_text_become_replacement_characters) {
  const Tokenizer tokenizer = small();
  const std::string one = "\ufffd";
  // One for each maximal part, as Python's bytes.decode("utf-8", "replace").
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"a\xff", "a" + one},
      {"\xe2\x82", one},
      {"\xe2\x82z", one + "z"},
      {"\xc0\x80", one + one},
      {"\xed\xa0\x80", one + one + one},  // a surrogate
      {"\xf0\x9f\x98", one},
      {"\xf4\x90\x80\x80", one + one + one + one},  // beyond U+10FFFF
      {"\x80", one},
  };
  for (const auto& [bytes, text] : cases) {
    CHECK_EQ(puna::to_valid_utf8(bytes), text);
    CHECK(!puna::is_valid_utf8(bytes) && puna::is_valid_utf8(text));
    CHECK_EQ(shown(tokenizer.encode(bytes)), shown(tokenizer.encode(text)));
  }
}

TEST(utf8_is_valid_where_nothing_is_replaced) {
  // Around all bounds of the bytes, in every place.
  const std::string bounds =
      "\x01\x7f\x80\x8f\x90\x9f\xa0\xbf\xc0\xc1\xc2\xdf\xe0\xe1\xec\xed\xee\xef\xf0\xf1\xf3\xf4\xf5"
      "\xff";
  std::mt19937 random(5);
  int valid = 0;
  for (int i = 0; i < 300'000; ++i) {
    // At all places of a block, and across the ends of blocks.
    std::string text(random() % 2 ? random() % 12 : 50 + random() % 90, 'x');
    for (size_t n = 1 + random() % 4; n > 0; --n) text += bounds[random() % bounds.size()];
    text.append(random() % 12, 'x');
    const bool expected = puna::to_valid_utf8(text) == text;
    valid += expected;
    CHECK_EQ(puna::is_valid_utf8(text), expected);
  }
  CHECK(valid > 1000);
}

template <class Unit>
void check_units(const std::string& utf8, const std::vector<uint32_t>& codes) {
  std::vector<Unit> found(codes.size());
  puna::write_wide(utf8, sizeof(Unit), found.data());
  CHECK(std::equal(codes.begin(), codes.end(), found.begin(), found.end()));
}

// UTF-8 of these becomes characters of the least width again.
void check_shape(const std::string& utf8, const std::vector<uint32_t>& codes) {
  const uint32_t most = codes.empty() ? 0 : *std::max_element(codes.begin(), codes.end());
  const std::optional<puna::Utf8Shape> shape = puna::utf8_shape(utf8);
  CHECK(shape.has_value());
  CHECK_EQ(shape->characters, codes.size());
  CHECK_EQ(shape->unit, most < 0x100 ? 1 : most < 0x10000 ? 2 : 4);
  if (most < 0x100) check_units<uint8_t>(utf8, codes);
  if (most < 0x10000) check_units<uint16_t>(utf8, codes);
  check_units<uint32_t>(utf8, codes);
}

TEST(wide_characters_become_utf8) {
  std::mt19937 random(4);
  const Tokenizer tokenizer = small();
  for (int i = 0; i < 3000; ++i) {
    const uint32_t limits[] = {0x80, 0x100, 0x800, 0x10000, 0x110000};
    const uint32_t limit = limits[random() % 5];
    std::vector<uint32_t> codes;
    const uint32_t ascii_in = 1 + random() % 12;  // many runs of one length, or few
    for (size_t n = random() % 300; n > 0; --n) {
      const uint32_t c = random() % (random() % ascii_in ? limit : std::min<uint32_t>(limit, 0x80));
      codes.push_back(c >= 0xd800 && c < 0xe000 ? 'x' : c);
    }
    const std::string expected = utf8_of(codes);
    check_shape(expected, codes);
    const std::vector<uint8_t> bytes(codes.begin(), codes.end());
    const std::vector<uint16_t> pairs(codes.begin(), codes.end());
    const auto check = [&](const void* characters, int unit) {
      // All at once, and with little room at a time.
      for (const size_t room : {expected.size() + 64, size_t{1} + random() % 90}) {
        puna::WideText text(characters, codes.size(), unit);
        CHECK(text.most_bytes() >= expected.size());
        std::string found;
        while (!text.done()) {
          std::string part(std::max<size_t>(room, 4), '\0');
          part.resize(text.write(part.data(), part.size()));
          CHECK(!part.empty() && !text.stopped());
          found += part;
        }
        CHECK_EQ(found, expected);
      }
      puna::IdBuffer ids;
      CHECK(tokenizer.encode(puna::WideText(characters, codes.size(), unit), {}, ids));
      CHECK_EQ(shown(std::vector<int32_t>(ids.ids().begin(), ids.ids().end())),
               shown(tokenizer.encode(expected)));
    };
    if (limit <= 0x100) check(bytes.data(), 1);
    if (limit <= 0x10000) check(pairs.data(), 2);
    check(codes.data(), 4);
    // Half of a surrogate pair, and more than there are code points, stop it.
    for (const uint32_t bad : {0xd800u, 0xdfffu, 0x110000u, 0xffffffffu}) {
      std::vector<uint32_t> refused = codes;
      refused.insert(refused.begin() + static_cast<int64_t>(random() % (codes.size() + 1)), bad);
      puna::IdBuffer none;
      CHECK(!tokenizer.encode(puna::WideText(refused.data(), refused.size(), 4), {}, none));
    }
  }
  // A long piece needs more room than a part.
  const std::vector<uint32_t> run(200'000, 0xe9);
  puna::IdBuffer ids;
  CHECK(tokenizer.encode(puna::WideText(run.data(), run.size(), 4), {}, ids));
  CHECK_EQ(ids.size(), tokenizer.encode(utf8_of(run)).size());
}

TEST(llama4_names_its_special_tokens) {
  const std::vector<std::string> names = puna::llama4_special_tokens();
  CHECK_EQ(names.size(), size_t{2048});
  const std::map<int, std::string> known = {{0, "<|begin_of_text|>"},
                                            {1, "<|end_of_text|>"},
                                            {4, "<|fim_suffix|>"},
                                            {5, "<|header_start|>"},
                                            {6, "<|header_end|>"},
                                            {7, "<|eom|>"},
                                            {8, "<|eot|>"},
                                            {16, "<|python_start|>"},
                                            {17, "<|python_end|>"},
                                            {18, "<|finetune_right_pad|>"},
                                            {80, "<|image_start|>"},
                                            {81, "<|image_end|>"},
                                            {84, "<|tile_x_separator|>"},
                                            {85, "<|tile_y_separator|>"},
                                            {90, "<|image|>"},
                                            {92, "<|patch|>"},
                                            {1142, "<|reasoning_thinking_start|>"},
                                            {1144, "<|reserved_special_token_0|>"},
                                            {2047, "<|reserved_special_token_903|>"}};
  for (const auto& [place, name] : known) CHECK_EQ(names.at(static_cast<size_t>(place)), name);
  // They follow the ranks where no tokenizer_config.json says otherwise.
  const Tokenizer tokenizer = Tokenizer::from_ranks(fixture::ranks());
  CHECK_EQ(tokenizer.special_tokens().at("<|eot|>"),
           static_cast<int>(fixture::tokens().size()) + 8);
}

TEST(both_formats_give_the_same_ids) {
  const Tokenizer ranks = small();
  const Tokenizer json = Tokenizer::from_json(fixture::json(puna::kPretokenizerPattern));
  const Tokenizer without_whole_pieces =
      Tokenizer::from_json(fixture::json(puna::kPretokenizerPattern, fixture::tokens(), false));
  CHECK_EQ(json.vocab_size(), ranks.vocab_size());
  CHECK(json.special_tokens() == ranks.special_tokens());
  std::mt19937 random(2);
  for (int i = 0; i < 500; ++i) {
    std::string text;
    for (size_t left = random() % 60; left > 0; --left) {
      text += "the andhelo world123\n'€s😀 aab/"[random() % 36];
    }
    CHECK_EQ(shown(json.encode(text)), shown(ranks.encode(text)));
    std::vector<int32_t> merged;
    const std::string valid = puna::to_valid_utf8(text);
    for (const std::string& piece : pieces_of(valid)) merge_plainly(piece, merged);
    CHECK_EQ(shown(without_whole_pieces.encode(text)), shown(merged));
  }
}

TEST(added_tokens_that_are_not_special_stay_in_the_text) {
  const std::string id = std::to_string(fixture::tokens().size());
  const Tokenizer tokenizer = Tokenizer::from_ranks(
      fixture::ranks(), "{\"added_tokens_decoder\": {\"" + id +
                            "\": {\"content\": \"<tool>\", \"special\": false}}}");
  const std::vector<int32_t> ids =
      tokenizer.encode("a<tool>", {.special = AllowedSpecial::every()});
  CHECK_EQ(ids.size(), size_t{2});
  CHECK_EQ(tokenizer.decode(ids, /*skip_special=*/true), std::string("a<tool>"));
}

TEST(files_are_found_by_content_and_name) {
  const Folder folder("tokenizer_test");
  CHECK_THROWS(ErrorCode::kModelNotFound, Tokenizer::from_file(folder.path.string()));
  CHECK(!puna::find_tokenizer(folder.path.string()));
  folder.write("tokenizer.model", fixture::ranks());
  const auto first = static_cast<int32_t>(fixture::tokens().size());
  const auto vocabulary = [&](const char* name) {
    return Tokenizer::from_file((folder.path / name).string()).vocab_size();
  };
  CHECK_EQ(vocabulary("tokenizer.model"), int64_t{first + 2048});
  folder.write("tokenizer_config.json", fixture::config());
  CHECK_EQ(vocabulary("tokenizer.model"), int64_t{first + 6});
  CHECK_EQ(vocabulary(""), int64_t{first + 6});
  folder.write("tokenizer.json", " \n" + fixture::json(puna::kPretokenizerPattern, [&] {
                                   auto longer = fixture::tokens();
                                   longer.resize(longer.size() - 1);
                                   return longer;
                                 }()));
  CHECK_EQ(Tokenizer::from_file(folder.path.string()).bytes_of(first - 1), std::string_view());
  CHECK_THROWS(ErrorCode::kModelNotFound, vocabulary("no.model"));
}

TEST(broken_ranks_are_refused) {
  const auto bad = [](const std::string& ranks, const std::string& config = "{}") {
    CHECK_THROWS(ErrorCode::kModelFormat, Tokenizer::from_ranks(ranks, config));
  };
  const std::string good = fixture::ranks();
  const auto next = std::to_string(fixture::tokens().size());
  bad("");
  bad("YQ== 0\n");                        // 255 bytes are missing
  bad(good.substr(good.find('\n') + 1));  // begins with 1
  bad(good + "YQ== " + next + "\n");      // a again
  bad(good + "YQ= " + next + "\n");       // no base64
  bad(good + "Y*== " + next + "\n");
  bad(good + "=QAA " + next + "\n");
  bad(good + "YWFh\n");
  bad(good + "YWFh 18446744073709551616\n");
  bad(good + "YWFh -1\n");
  bad(good + fixture::base64(std::string(1025, 'x')) + " " + next + "\n");
  bad(good, "[");
  bad(good, "[]");
  bad(good, R"({"added_tokens_decoder": []})");
  bad(good, R"({"added_tokens_decoder": {"1": {"content": "<|x|>"}}})");  // a rank
  bad(good, R"({"added_tokens_decoder": {"4000000000": {"content": "<|x|>"}}})");
  bad(good, R"({"added_tokens_decoder": {"-1": {"content": "<|x|>"}}})");
  bad(good, R"({"added_tokens_decoder": {"900": {"content": ""}}})");
  bad(good, R"({"added_tokens_decoder": {"900": {"content": 1}}})");
  bad(good,
      R"({"added_tokens_decoder": {"900": {"content": ")" + std::string(100'000, 'a') + R"("}}})");
  bad(good, R"({"added_tokens_decoder": {"900": {"content": "x"}, "901": {"content": "x"}}})");
  bad(good, std::string(100000, '['));
}

TEST(vocabularies_that_would_take_minutes_are_refused) {
  const auto ranks_of = [](size_t count, const auto& token) {
    std::string ranks = fixture::ranks();
    for (size_t i = 0, rank = fixture::tokens().size(); i < count; ++i, ++rank)
      ranks += fixture::base64(token(i)) + " " + std::to_string(rank) + "\n";
    return ranks;
  };
  // Every token is looked at cut by cut. 5,000 are 7 MB.
  const auto longest = [](size_t i) {
    std::string token(1024, static_cast<char>(i));
    token[0] = static_cast<char>(i >> 8);
    token[1] = 'x';
    return token;
  };
  CHECK_THROWS(ErrorCode::kModelFormat, Tokenizer::from_ranks(ranks_of(5000, longest)));
  Tokenizer::from_ranks(ranks_of(100, longest));
  // The first eight bytes make every hash zero.
  const auto colliding = [](size_t i) {
    std::string token(12, '\0');
    std::memcpy(token.data(), &puna::ShortKey::kSalt[0], 8);
    std::memcpy(token.data() + 8, &i, 4);
    return token;
  };
  CHECK_THROWS(ErrorCode::kModelFormat, Tokenizer::from_ranks(ranks_of(2000, colliding)));
  Tokenizer::from_ranks(ranks_of(900, colliding));
}

TEST(json_is_read_however_it_is_written) {
  const std::string plain = fixture::json(puna::kPretokenizerPattern);
  // Each token on a line of its own, with escapes, and a merge as in older files.
  std::string mixed = plain, other;
  const std::string pair = "[\"t\",\"h\"]";
  mixed.replace(mixed.find(pair), pair.size(), "\"t h\"");
  bool in_string = false;
  for (size_t i = 0; i < mixed.size(); ++i) {
    const char c = mixed[i];
    if (in_string && c == '\\') {
      other += c;
      other += mixed[++i];
    } else if (in_string && c == 'h' && mixed[i - 1] == '"') {
      other += "\\u0068";
    } else {
      other += c;
      if (c == '"') in_string = !in_string;
      if (!in_string && std::string_view("[{,:").find(c) != std::string_view::npos) {
        other += "\r\n\t" + std::string(i % 21, ' ');
      }
    }
  }
  const Tokenizer first = Tokenizer::from_json(plain), second = Tokenizer::from_json(other);
  CHECK(other.find("\\u0068") != std::string::npos);
  for (const char* text : {"hello world the then", "123 <|eot|> //\n\n", "her hhh", "\"\\ \\\""}) {
    CHECK_EQ(shown(second.encode(text)), shown(first.encode(text)));
  }
}

TEST(broken_json_is_refused) {
  const std::string good = fixture::json(puna::kPretokenizerPattern);
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string changed = good;
    const size_t at = changed.find(from);
    CHECK(at != std::string::npos);
    return changed.replace(at, from.size(), to);
  };
  const auto bad = [](const std::string& json) {
    CHECK_THROWS(ErrorCode::kModelFormat, Tokenizer::from_json(json));
  };
  const auto unsupported = [](const std::string& json) {
    CHECK_THROWS(ErrorCode::kUnsupported, Tokenizer::from_json(json));
  };
  bad("{");
  bad("[]");
  bad("{}");
  bad(with("\"model\":{", "\"model\":3,\"other\":{"));
  bad(with("\"model\":{", "\"model\":{},\"model\":{"));
  bad(with("\"vocab\":{", "\"vocab\":{},\"vocab\":{"));
  bad(with("\"vocab\":{", "\"vocab\":[],\"other\":{"));
  bad(with("\"merges\":[", "\"merges\":[],\"merges\":["));
  bad(with("[\"t\",\"h\"]", "[\"t\",\"h\",\"h\"]"));
  bad(with("[\"t\",\"h\"]", "[\"t\" \"h\"]"));
  bad(with("[\"t\",\"h\"]", "[\"t\",\"\\h\"]"));
  bad(with("[\"t\",\"h\"],", "[\"t\",\"h\"],,"));
  bad(with("\"th\":256", "\"th\":0256"));
  bad(with("\"th\":256", "\"th\":256e0"));
  bad(with("\"th\":256", "\"th\" 256"));
  bad(good.substr(0, good.size() - 2) + "]");
  bad(good + "}");
  bad(with("[\"t\",\"h\"]", "[\"t\",\"nothing\"]"));
  bad(with("[\"t\",\"h\"]", "[\"t\"]"));
  bad(with("[\"t\",\"h\"]", "\"th\""));
  bad(with("\"th\":256", "\"th\":1"));
  bad(with("\"th\":256", "\"th\":-1"));
  bad(with("\"th\":256", "\"th\":256.5"));
  bad(with("\"th\":256", "\"th\":99999999999"));
  bad(with("\"th\":256", "\"\xe6\x97\xa5\":256"));
  bad(with("\"normalizer\":null", "\"normalizer\":" + std::string(100000, '[')));
  bad(with("\"a\":", "\"unheard\":"));  // a byte is missing
  unsupported(with("\"type\":\"BPE\"", "\"type\":\"Unigram\""));
  unsupported(with("\"type\":\"BPE\"", "\"type\":\"BPE\",\"byte_fallback\":true"));
  unsupported(with("\"type\":\"BPE\"", "\"type\":\"BPE\",\"end_of_word_suffix\":\"</w>\""));
  unsupported(with("\"normalizer\":null", "\"normalizer\":{\"type\":\"NFC\"}"));
  unsupported(with("{1,3}", "{1,2}"));
  unsupported(with("\"Isolated\"", "\"Removed\""));
  unsupported(with("\"use_regex\":false", "\"use_regex\":true"));
  unsupported(with("\"type\":\"Split\"", "\"type\":\"Digits\""));
  unsupported(with("\"special\":true", "\"special\":true,\"lstrip\":true"));
}

TEST(messages_are_text_whatever_the_file_holds) {
  for (const std::string& file :
       {std::string("YQ== \xff\xfe\n"), std::string("\xff\xff\xff 0\n")}) {
    try {
      Tokenizer::from_ranks(file);
      CHECK(false);
    } catch (const puna::Error& error) {
      CHECK(puna::is_valid_utf8(error.what()));
    }
  }
  try {
    Tokenizer::from_json("{\"a\":\"\xff\"}");
    CHECK(false);
  } catch (const puna::Error& error) {
    CHECK(puna::is_valid_utf8(error.what()));
  }
}
