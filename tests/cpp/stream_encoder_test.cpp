// The streaming encoder against encoding the whole text at once: any cuts, any vocabulary.
#include "text/stream_encoder.h"

#include <malloc.h>

#include <cstdlib>
#include <new>
#include <random>

#include "check.h"
#include "text/unicode_classes.h"
#include "tokenizer_fixture.h"

using puna::AllowedSpecial;
using puna::Cut;
using puna::EncodeOptions;
using puna::ErrorCode;
using puna::IdBuffer;
using puna::StreamEncoder;
using puna::Tokenizer;
namespace fixture = tokenizer_fixture;

namespace {

size_t live_bytes = 0;

std::string shown(std::span<const int32_t> ids) {
  std::string text;
  for (const int32_t id : ids) text += std::to_string(id) + " ";
  return text;
}

const std::vector<std::string> kAlphabet = {
    "a",    "the",       "ab",     "A",   "AB",   "日",   "本",       "\u0301",  "ʰ",
    "ǅ",    "é",         "É",      "'",   "s",    "'s",   "'l",       "l",       "L",
    "'R",   "e",         "ve",     "ſ",   "'ſ",   " ",    " ",        "\t",      "\u3000",
    "\n",   "\r\n",      "/",      "!",   "{",    "1",    "12",       "٣",       "😀",
    "  ",   "    ",      "\n\n",   "//",  "he",   "<",    "|",        "<|eot|>", "<|e",
    "<|eo", "<|image|>", "<|imag", "ing", "\xe2", "\x82", "\xf0\x9f", "\xff"};

std::string random_text(std::mt19937& random, size_t parts) {
  std::string text;
  for (size_t i = 0; i < parts; ++i) {
    const std::string& part = kAlphabet[random() % kAlphabet.size()];
    for (size_t times = random() % 8 == 0 ? 1 + random() % 20 : 1; times > 0; --times) text += part;
  }
  return text;
}

// Without the one that merging does not make.
std::vector<std::string> merged_tokens() {
  auto tokens = fixture::tokens();
  std::erase(tokens, "hello");
  return tokens;
}

// Tokens that reach over the places where the pre-tokeniser has not decided yet.
Tokenizer blanks_and_capitals() {
  auto tokens = merged_tokens();
  for (const char* token :
       {"\n ", "\n  ", " \n", "  \n", "\n  \n", "    \n", "AA", "AAAA", "\xe6\x97", "\xe6\x97\xa5",
        "\xe6\x97\xa5"
        "A",
        "\t ", "\t \n", "BA"}) {
    tokens.push_back(token);
  }
  return Tokenizer::from_ranks(fixture::ranks(tokens));
}

// A token that only a whole piece becomes, so that ids depend on all of a piece.
Tokenizer with_unreachable() {
  auto tokens = fixture::tokens();
  tokens.push_back("aab");
  tokens.push_back("xyz!");
  return Tokenizer::from_ranks(fixture::ranks(tokens));
}

void check_stream(const Tokenizer& tokenizer, const std::string& text, const EncodeOptions& options,
                  std::mt19937& random, size_t longest) {
  const std::vector<int32_t> expected = tokenizer.encode(text, options);
  StreamEncoder encoder(tokenizer, options);
  IdBuffer ids;
  for (size_t at = 0; at < text.size();) {
    const size_t size = std::min<size_t>(text.size() - at, 1 + random() % longest);
    encoder.feed(std::string_view(text).substr(at, size), ids);
    at += size;
    if (random() % 4 == 0) {
      // As if the text ended here.
      IdBuffer all;
      all.add(ids.ids());
      encoder.provisional(all);
      CHECK_EQ(shown(all.ids()), shown(tokenizer.encode(text.substr(0, at), options)));
    }
  }
  CHECK(encoder.pending_bytes() <= puna::to_valid_utf8(text).size());
  encoder.finish(ids);
  CHECK_EQ(encoder.pending_bytes(), size_t{0});
  CHECK_EQ(shown(ids.ids()), shown(expected));
}

}  // namespace

TEST(any_cuts_give_the_same_ids) {
  std::mt19937 random(1);
  const Tokenizer plain = Tokenizer::from_ranks(fixture::ranks(merged_tokens()), fixture::config());
  const Tokenizer tricky = blanks_and_capitals();
  const Tokenizer whole = with_unreachable();
  CHECK(plain.model().incremental() && tricky.model().incremental());
  CHECK(!whole.model().incremental());
  for (int i = 0; i < 6000; ++i) {
    const std::string text = random_text(random, 1 + random() % 40);
    EncodeOptions options;
    if (i % 3 == 1) options.special = AllowedSpecial::every();
    if (i % 3 == 2) options.special.names = {"<|eot|>"};
    const size_t longest = i % 2 ? 3 : 200;
    for (const Tokenizer* tokenizer : {&plain, &tricky, &whole}) {
      check_stream(*tokenizer, text, options, random, longest);
    }
  }
}

TEST(undecided_runs_of_any_length) {
  std::mt19937 random(2);
  const Tokenizer tokenizer = blanks_and_capitals();
  for (const std::string unit : {" ", "\t ", "A", "AB", "\n ", "\n \n", "!", "7", "a", "é"}) {
    for (const std::string start : {"x", "x\n", "日", "x\u0301", "!", "!\n", "'"}) {
      for (const std::string end : {"", "\n", "x", "X", "日", "1", "'s", "!", "<|eot|>"}) {
        std::string text = start;
        for (size_t n = 1 + random() % 700; text.size() < n;) text += unit;
        text += end;
        check_stream(tokenizer, text, {.special = AllowedSpecial::every()}, random, 64);
      }
    }
  }
}

TEST(long_texts_in_long_parts) {
  std::mt19937 random(3);
  const Tokenizer tokenizer = Tokenizer::from_ranks(fixture::ranks(), fixture::config());
  for (const Cut cut : {Cut::kNone, Cut::kMeta}) {
    std::string text = random_text(random, 60000) + std::string(70000, 'a') + "\n" +
                       std::string(60000, ' ') + random_text(random, 1000);
    check_stream(tokenizer, text, {.special = {}, .cut = cut}, random, 150000);
  }
}

// What lives on the heap, counted by the operators at the end of this file.
TEST(little_is_kept_however_long_the_text) {
  const Tokenizer tokenizer = blanks_and_capitals();
  for (const std::string unit : {"the ", " ", "\n", "A", "a", "\t", "日", "x\n ", "!", "\n \t"}) {
    for (const size_t part : {size_t{1}, size_t{1000}, size_t{200'000}}) {
      std::string text;
      while (text.size() < part) text += unit;
      tokenizer.encode(text);  // has made an encoder and its scratch, which are the tokenizer's
      const size_t before = live_bytes;
      StreamEncoder encoder(tokenizer);
      IdBuffer ids(IdBuffer::kCount);
      encoder.feed("日", ids);
      size_t most_pending = 0, most_kept = 0;
      for (size_t fed = 0; fed < 20 * text.size() || fed < 3000; fed += text.size()) {
        encoder.feed(text, ids);
        most_pending = std::max(most_pending, encoder.pending_bytes());
        most_kept = std::max(most_kept, live_bytes - before + sizeof(encoder));
      }
      CHECK(most_pending <= 160);
      CHECK(most_kept <= 8192);
    }
  }
}

TEST(what_cannot_be_streamed_waits_up_to_a_bound) {
  const Tokenizer tokenizer = with_unreachable();
  StreamEncoder encoder(tokenizer, {}, /*max_pending=*/1000);
  IdBuffer ids;
  encoder.feed(std::string(1000, 'a'), ids);
  CHECK_EQ(ids.size(), size_t{0});
  CHECK_THROWS(ErrorCode::kInvalidRequest, encoder.feed("a", ids));
}

void* operator new(size_t size) {
  void* const memory = std::malloc(size);
  if (!memory) throw std::bad_alloc();
  live_bytes += malloc_usable_size(memory);
  return memory;
}
void operator delete(void* memory) noexcept {
  if (memory) live_bytes -= malloc_usable_size(memory);
  std::free(memory);
}
void operator delete(void* memory, size_t) noexcept { operator delete(memory); }
