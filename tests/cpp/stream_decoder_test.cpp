// The streaming decoder against decoding everything at once.
#include "text/stream_decoder.h"

#include <random>

#include "check.h"
#include "text/unicode_classes.h"
#include "tokenizer_fixture.h"

using puna::ErrorCode;
using puna::SpecialText;
using puna::StreamDecoder;
using puna::Tokenizer;
namespace fixture = tokenizer_fixture;

namespace {

const Tokenizer& small() {
  static const Tokenizer kTokenizer = Tokenizer::from_ranks(fixture::ranks(), fixture::config());
  return kTokenizer;
}

int32_t byte(unsigned char value) { return 255 - value; }

std::string push_bytes(StreamDecoder& decoder, std::string_view bytes) {
  std::string text;
  for (const char c : bytes) text += decoder.push(byte(static_cast<unsigned char>(c)));
  return text;
}

struct Decoded {
  std::string text;
  std::string stop;
};

// Pushes all ids; each result must be valid UTF-8 by itself.
Decoded stream(StreamDecoder decoder, const std::vector<int32_t>& ids) {
  Decoded result;
  for (const int32_t id : ids) {
    const std::string text = decoder.push(id);
    CHECK(puna::is_valid_utf8(text));
    result.text += text;
    if (decoder.stopped()) break;
  }
  result.text += decoder.finish();
  result.stop = decoder.stop();
  return result;
}

// The definition: the text cut before the earliest stop string, the longest of those that begin
// there.
Decoded cut(const std::string& text, const std::vector<std::string>& stops) {
  for (size_t at = 0; at < text.size(); ++at) {
    std::string met;
    for (const std::string& stop : stops) {
      if (text.compare(at, stop.size(), stop) == 0 && stop.size() > met.size()) met = stop;
    }
    if (!met.empty()) return {text.substr(0, at), met};
  }
  return {text, ""};
}

}  // namespace

TEST(characters_come_out_whole_and_at_once) {
  StreamDecoder decoder(small());
  CHECK_EQ(decoder.push(byte('a')), std::string("a"));
  CHECK_EQ(decoder.push(byte(0xf0)), std::string());
  CHECK_EQ(decoder.push(byte(0x9f)), std::string());
  CHECK_EQ(decoder.push(byte(0x98)), std::string());
  CHECK_EQ(decoder.push(byte(0x80)), std::string("😀"));
  CHECK_EQ(decoder.finish(), std::string());
}

TEST(what_cannot_become_a_character_comes_out_at_once) {
  StreamDecoder decoder(small());
  CHECK_EQ(decoder.push(byte(0xff)), std::string("\ufffd"));
  CHECK_EQ(decoder.push(byte(0xe2)), std::string());
  CHECK_EQ(decoder.push(byte('x')), std::string("\ufffdx"));  // the e2 was one maximal part
  CHECK_EQ(decoder.push(byte(0xed)), std::string());
  CHECK_EQ(decoder.push(byte(0xa0)), std::string("\ufffd\ufffd"));  // half of a surrogate
  CHECK_EQ(decoder.push(byte(0xe2)), std::string());
  CHECK_EQ(decoder.push(byte(0x82)), std::string());
  CHECK_EQ(decoder.finish(), std::string("\ufffd"));
  // A real U+FFFD waits for nothing.
  decoder = StreamDecoder(small());
  CHECK_EQ(push_bytes(decoder, "\xef\xbf\xbd"), std::string("\ufffd"));
}

TEST(special_tokens_are_skipped_or_shown) {
  const int32_t eot = fixture::special().at("<|eot|>");
  CHECK_EQ(stream(StreamDecoder(small()), {byte('a'), eot, byte('b')}).text, std::string("ab"));
  CHECK_EQ(stream(StreamDecoder(small(), {}, SpecialText::kShow), {byte('a'), eot, byte('b')}).text,
           std::string("a<|eot|>b"));
  CHECK_THROWS(ErrorCode::kInvalidRequest, StreamDecoder(small()).push(1 << 20));
  CHECK_THROWS(ErrorCode::kInvalidRequest, StreamDecoder(small()).push(-1));
}

TEST(stop_strings_hold_back_no_more_than_they_need) {
  StreamDecoder decoder(small(), {"abc", "bcd!"});
  CHECK_EQ(decoder.push(byte('x')), std::string("x"));
  CHECK_EQ(decoder.push(byte('a')), std::string());
  CHECK_EQ(decoder.push(byte('b')), std::string());
  CHECK_EQ(decoder.push(byte('b')), std::string("ab"));  // "b" may begin "bcd!"
  CHECK_EQ(decoder.push(byte('q')), std::string("bq"));
  CHECK_EQ(push_bytes(decoder, "ab"), std::string());
  CHECK(!decoder.stopped());
  CHECK_EQ(decoder.push(byte('c')), std::string());
  CHECK(decoder.stopped());
  CHECK_EQ(decoder.stop(), std::string("abc"));
  CHECK_EQ(decoder.push(byte('z')), std::string());
  CHECK_EQ(decoder.finish(), std::string());
  CHECK_THROWS(ErrorCode::kInvalidRequest, StreamDecoder(small(), {"a", ""}));
}

TEST(the_longest_of_stops_at_one_place_wins) {
  StreamDecoder decoder(small(), {"a", "abc"});
  CHECK_EQ(decoder.push(byte('a')), std::string());
  CHECK(!decoder.stopped());  // "abc" may still come
  StreamDecoder longer = decoder, shorter = decoder, ended = decoder;
  push_bytes(longer, "bc");
  CHECK_EQ(longer.stop(), std::string("abc"));
  shorter.push(byte('x'));
  CHECK_EQ(shorter.stop(), std::string("a"));
  CHECK_EQ(ended.finish(), std::string());
  CHECK_EQ(ended.stop(), std::string("a"));
}

TEST(the_earliest_of_stops_wins_even_if_met_later) {
  StreamDecoder decoder(small(), {"abcd", "bc"});
  CHECK_EQ(push_bytes(decoder, "abc"), std::string());
  CHECK(!decoder.stopped());
  StreamDecoder other = decoder;
  push_bytes(decoder, "d");
  CHECK_EQ(decoder.stop(), std::string("abcd"));
  CHECK_EQ(push_bytes(other, "x"), std::string("a"));
  CHECK_EQ(other.stop(), std::string("bc"));
}

TEST(a_stop_can_be_shown_and_knows_its_token) {
  // "x" "the" " w" "or": the stop begins in the second and ends in the third.
  const auto ids = small().encode("xthe wor");
  for (const bool include : {false, true}) {
    StreamDecoder decoder(small(), {"he w"}, SpecialText::kSkip, include);
    std::string text;
    for (const int32_t id : ids) text += decoder.push(id);
    CHECK_EQ(text, std::string(include ? "xthe w" : "xt"));
    const std::string before =
        small().decode(std::span(ids).first(static_cast<size_t>(decoder.stop_token())));
    CHECK_EQ(before, std::string("x"));
  }
  CHECK_EQ(StreamDecoder(small()).stop_token(), int64_t{-1});
}

TEST(special_tokens_are_events) {
  const int32_t eot = fixture::special().at("<|eot|>");
  StreamDecoder decoder(small(), {"abc"}, SpecialText::kEvent);
  CHECK_EQ(push_bytes(decoder, "xab"), std::string("x"));
  CHECK_EQ(decoder.push(eot), std::string("ab"));  // the text ends before it
  CHECK_EQ(decoder.event(), eot);
  CHECK_EQ(decoder.push(byte('c')), std::string("c"));
  CHECK_EQ(decoder.event(), -1);
  CHECK(!decoder.stopped());
}

TEST(a_copy_goes_its_own_way) {
  StreamDecoder one(small(), {"lo w"});
  one.push(byte('l'));
  one.push(byte(0xe2));  // "l" is decided only with the character after it
  StreamDecoder other = one;
  CHECK_EQ(push_bytes(one, "\x82\xac"), std::string("l€"));
  CHECK_EQ(other.push(byte('o')), std::string("l\ufffdo"));
}

TEST(any_ids_stream_as_they_decode) {
  std::mt19937 random(3);
  const auto vocabulary = static_cast<uint32_t>(small().vocab_size());
  // Bytes that make and break characters, beside all tokens.
  const unsigned char leads[] = {0xc2, 0xe0, 0xe2, 0xed, 0xf0, 0xf4, 0x80, 0x82, 0x9f, 0xa0, 0xff};
  for (int i = 0; i < 20000; ++i) {
    std::vector<int32_t> ids(random() % 24);
    for (int32_t& id : ids) {
      id = random() % 2 ? byte(leads[random() % sizeof(leads)])
                        : static_cast<int32_t>(random() % vocabulary);
    }
    const bool skip = random() % 2;
    const Decoded streamed =
        stream(StreamDecoder(small(), {}, skip ? SpecialText::kSkip : SpecialText::kShow), ids);
    CHECK_EQ(streamed.text, puna::to_valid_utf8(small().decode(ids, skip)));
  }
}

TEST(any_stops_cut_as_defined) {
  std::mt19937 random(4);
  const std::vector<std::string> alphabet = {"a", "b", "ab", "c", "€", "\xe2", "\x82", "é"};
  for (int i = 0; i < 20000; ++i) {
    std::vector<std::string> stops(1 + random() % 4);
    for (std::string& stop : stops) {
      for (size_t left = 1 + random() % 4; left > 0; --left) {
        stop += alphabet[random() % 5];
      }
    }
    std::string bytes;
    std::vector<int32_t> ids;
    for (size_t left = random() % 20; left > 0; --left) bytes += alphabet[random() % 8];
    for (const char c : bytes) ids.push_back(byte(static_cast<unsigned char>(c)));
    const Decoded expected = cut(puna::to_valid_utf8(bytes), stops);
    const Decoded streamed = stream(StreamDecoder(small(), stops), ids);
    CHECK_EQ(streamed.text, expected.text);
    CHECK_EQ(streamed.stop, expected.stop);
  }
}
