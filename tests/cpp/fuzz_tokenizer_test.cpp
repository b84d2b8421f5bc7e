// Hostile tokenizer files and hostile text: an Error or a correct result, never a crash or a hang.
#include <nlohmann/json.hpp>
#include <random>

#include "check.h"
#include "text/pretokenizer.h"
#include "text/stream_decoder.h"
#include "text/tokenizer.h"
#include "text/unicode_classes.h"
#include "tokenizer_fixture.h"

using puna::AllowedSpecial;
using puna::Tokenizer;
namespace fixture = tokenizer_fixture;

namespace {

constexpr int kMutationsPerFormat = 4000;

// What lies at the edges of the formats.
const std::vector<std::string> kFragments = {"",
                                             "0",
                                             "-1",
                                             "18446744073709551616",
                                             "1e400",
                                             "4194304",
                                             "4194303",
                                             "null",
                                             "true",
                                             "[]",
                                             "{}",
                                             "[[",
                                             "\"\"",
                                             "\"",
                                             "\\",
                                             "\\u0000",
                                             "\\ud800",
                                             "\xff",
                                             "\n",
                                             "\r\n",
                                             " ",
                                             "=",
                                             "====",
                                             "YQ==",
                                             "YWE=",
                                             "{\"id\":0}",
                                             "\"vocab\"",
                                             "\"content\"",
                                             ":",
                                             ",",
                                             "\"type\":\"BPE\",\"type\":\"WordPiece\"",
                                             "\xc4\xa0"};

std::string mutated(std::string file, std::mt19937& random) {
  for (size_t changes = 1 + random() % 3; changes > 0 && !file.empty(); --changes) {
    const size_t at = random() % file.size();
    const size_t length = std::min<size_t>(file.size() - at, random() % 32);
    switch (random() % 6) {
      case 0:
        file[at] = static_cast<char>(random());
        break;
      case 1:
        file.erase(at, length);
        break;
      case 2:
        file.insert(at, file.substr(random() % file.size(), length));
        break;
      case 3:
        file.insert(at, kFragments[random() % kFragments.size()]);
        break;
      case 4: {  // a fragment in the place of a number or a string
        const size_t end = file.find_first_of(",:}\n", at);
        const size_t begin = file.find_last_of(",: {\n", at);
        if (begin != std::string::npos && end != std::string::npos && begin < end) {
          file.replace(begin + 1, end - begin - 1, kFragments[random() % kFragments.size()]);
        }
        break;
      }
      default:
        if (random() % 8 == 0) file.resize(at);
        break;
    }
  }
  return file;
}

// A tokenizer that was accepted must do what tokenizers do.
void use(const Tokenizer& tokenizer) {
  static const std::string kText = "the hello world's 123 aaaaa\n\n  € 😀 <|eot|><|image|> \xff/";
  const std::string valid = puna::to_valid_utf8(kText);
  for (const AllowedSpecial& allowed : {AllowedSpecial::none(), AllowedSpecial::every()}) {
    CHECK(tokenizer.decode(tokenizer.encode(kText, {.special = allowed})) == valid);
  }
}

struct Tally {
  int accepted = 0, refused = 0;
};

template <class Load>
Tally fuzz(const std::string& good, uint32_t seed, const Load& load) {
  std::mt19937 random(seed);
  Tally tally;
  for (int i = 0; i < kMutationsPerFormat; ++i) {
    const std::string file = mutated(good, random);
    try {
      const Tokenizer tokenizer = load(file);
      ++tally.accepted;
      use(tokenizer);
    } catch (const puna::Error& error) {
      ++tally.refused;
      CHECK(error.code() == puna::ErrorCode::kModelFormat ||
            error.code() == puna::ErrorCode::kUnsupported);
      CHECK(puna::is_valid_utf8(error.what()));
    }
  }
  // Both must happen, or the mutations are too mild or too wild to test anything.
  CHECK(tally.accepted > kMutationsPerFormat / 100);
  CHECK(tally.refused > kMutationsPerFormat / 100);
  std::printf("accepted %d, refused %d\n", tally.accepted, tally.refused);
  return tally;
}

}  // namespace

TEST(mutated_tokenizer_model) {
  fuzz(fixture::ranks(), 1, [](const std::string& file) { return Tokenizer::from_ranks(file); });
}

TEST(mutated_tokenizer_config) {
  const std::string ranks = fixture::ranks();
  fuzz(fixture::config(), 2,
       [&](const std::string& file) { return Tokenizer::from_ranks(ranks, file); });
}

TEST(mutated_tokenizer_json) {
  fuzz(fixture::json(puna::kPretokenizerPattern), 3, [](const std::string& file) {
    Tokenizer tokenizer = Tokenizer::from_json(file);
    CHECK(nlohmann::json::accept(file));  // its lists are not read by that
    return tokenizer;
  });
}

TEST(random_bytes_as_files) {
  std::mt19937 random(4);
  for (int i = 0; i < 2000; ++i) {
    std::string file(random() % 200, ' ');
    for (char& c : file) c = static_cast<char>(random());
    for (const bool json : {false, true}) {
      try {
        json ? Tokenizer::from_json("{" + file) : Tokenizer::from_ranks(file);
        CHECK(false);  // 256 tokens do not fit
      } catch (const puna::Error& error) {
        CHECK(puna::is_valid_utf8(error.what()));
      }
    }
  }
}

TEST(random_bytes_as_text) {
  const Tokenizer tokenizer = Tokenizer::from_ranks(fixture::ranks(), fixture::config());
  std::mt19937 random(5);
  const std::vector<std::string> parts = {
      "<|", "|>", "<|eot|>", "<|e",      "\r\n", "  ", "'s", "'\xc5\xbf",
      "A",  "a",  "日",      "\xcc\x81", "1",    "!",  "/",  "\xe2\x80"};
  for (int i = 0; i < 10000; ++i) {
    std::string text;
    for (size_t left = random() % 40; left > 0; --left) {
      if (random() % 2) {
        text += parts[random() % parts.size()];
      } else {
        text += static_cast<char>(random());
      }
    }
    const AllowedSpecial allowed{random() % 2 == 0, {}};
    const std::vector<int32_t> ids = tokenizer.encode(text, {.special = allowed});
    CHECK(tokenizer.decode(ids) == puna::to_valid_utf8(text));
    puna::StreamDecoder decoder(tokenizer, {}, puna::SpecialText::kShow);
    std::string streamed;
    for (const int32_t id : ids) streamed += decoder.push(id);
    CHECK(streamed + decoder.finish() == puna::to_valid_utf8(text));
  }
}
