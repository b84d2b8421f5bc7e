// The parts of the fast encoder against their plain definitions, on random texts and vocabularies.
#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <string>
#include <thread>

#include "check.h"
#include "random_token.h"
#include "text/bpe_model.h"
#include "text/incremental_bpe.h"
#include "text/piece_encoder.h"
#include "text/pretokenizer.h"

using puna::BpeModel;
using puna::IncrementalBpe;
using puna::RankedBpe;

namespace {

std::string random_text(std::mt19937& random, const std::vector<std::string>& alphabet,
                        size_t parts) {
  std::string text;
  for (size_t i = 0; i < parts; ++i) {
    const std::string& part = alphabet[random() % alphabet.size()];
    for (size_t times = random() % 8 == 0 ? 1 + random() % 12 : 1; times > 0; --times) text += part;
  }
  return text;
}

// What meets in texts, ASCII above all: whole windows of it are cut at once.
const std::vector<std::string> kAlphabet = {
    "a", "bc",  "the", "A",  "BC", "Word", "'",  "'s", "'S",  "'t", "'re",  "'LL",     "'v",
    "1", "123", "12",  " ",  " ",  "  ",   "\t", "\n", "\r",  "\v", "!",    "//",      "/",
    ";", "{",   "}\n", "()", "é",  "日",   "É",  "ʰ",  "٣",   "ſ",  "😀",   "\u00a0",  "\u0301",
    "_", ".",   ", ",  "\0", "\"", "=",    "-",  "e",  "  x", "Zz", "\x1c", "'\u017f", "x\n  \n"};

std::vector<size_t> piece_ends(std::string_view text) {
  std::vector<size_t> ends;
  for (size_t at = 0; at < text.size();) ends.push_back(at = puna::next_piece(text, at));
  return ends;
}

constexpr size_t kManyPieces = 256;

struct TestVocabulary {
  std::vector<std::string> tokens;
  BpeModel model;
};

TestVocabulary with_model(std::vector<std::string> tokens) {
  puna::ByteStrings bytes;
  for (const std::string& token : tokens) bytes.add(token);
  const size_t size = tokens.size();
  return {std::move(tokens), BpeModel::of_ranks(std::move(bytes), std::vector<bool>(size, false))};
}

// All bytes, then a run of one letter for each length up to `longest`.
TestVocabulary vocabulary_of_runs(size_t longest) {
  std::vector<std::string> tokens;
  for (int byte = 0; byte < 256; ++byte) tokens.push_back(std::string(1, static_cast<char>(byte)));
  for (size_t size = 2; size <= longest; ++size) tokens.push_back(std::string(size, 'a'));
  return with_model(std::move(tokens));
}

// All bytes, then tokens over three letters: joined from two that are there, as a training would,
// or made up, so that some cannot come about by merging, or in another order than that of the ids.
TestVocabulary random_vocabulary(std::mt19937& random, bool made_up) {
  std::vector<std::string> tokens;
  std::set<std::string> known;
  const auto add = [&](const std::string& token) {
    if (known.insert(token).second) tokens.push_back(token);
  };
  for (int byte = 0; byte < 256; ++byte) add(std::string(1, static_cast<char>(255 - byte)));
  for (size_t left = 4 + random() % 24; left > 0; --left) {
    const std::string token = random_token(random, tokens, made_up);
    if (token.size() <= 40) add(token);
  }
  return with_model(std::move(tokens));
}

// The definition of byte-pair encoding.
std::vector<int32_t> merged_plainly(const std::vector<std::string>& tokens,
                                    std::string_view piece) {
  std::map<std::string, int32_t> ranks;
  for (size_t i = 0; i < tokens.size(); ++i) ranks[tokens[i]] = static_cast<int32_t>(i);
  std::vector<std::string> parts;
  for (const char c : piece) parts.emplace_back(1, c);
  for (;;) {
    int32_t best = INT32_MAX;
    size_t at = 0;
    for (size_t i = 0; i + 1 < parts.size(); ++i) {
      const auto found = ranks.find(parts[i] + parts[i + 1]);
      if (found != ranks.end() && found->second < best) {
        best = found->second;
        at = i;
      }
    }
    if (best == INT32_MAX) break;
    parts[at] += parts[at + 1];
    parts.erase(parts.begin() + static_cast<int64_t>(at) + 1);
  }
  std::vector<int32_t> ids;
  for (const std::string& part : parts) ids.push_back(ranks.at(part));
  return ids;
}

std::string shown(const std::vector<int32_t>& ids) {
  std::string text;
  for (const int32_t id : ids) text += std::to_string(id) + " ";
  return text;
}

std::string random_letters(std::mt19937& random, size_t size) {
  std::string text(size, 'a');
  for (char& c : text) c = "abc"[random() % (1 + random() % 3)];
  return text;
}

}  // namespace

TEST(windows_cut_as_single_pieces_do) {
  std::mt19937 random(1);
  for (int i = 0; i < 20000; ++i) {
    const std::string text = random_text(random, kAlphabet, random() % 60);
    const std::vector<size_t> expected = piece_ends(text);
    std::vector<size_t> found;
    const size_t limit = i % 3 == 0 ? 1 + random() % 80 : kManyPieces;
    for (size_t at = 0; at < text.size(); at = found.back()) {
      size_t ends[kManyPieces];
      const size_t count = puna::next_pieces(text, at, ends, limit);
      CHECK(count > 0 && count <= limit);
      found.insert(found.end(), ends, ends + count);
    }
    CHECK(found == expected);
  }
}

TEST(no_piece_spans_a_certain_cut) {
  std::mt19937 random(2);
  int found = 0;
  for (int i = 0; i < 20000; ++i) {
    const std::string text = random_text(random, kAlphabet, 1 + random() % 30);
    const size_t cut = puna::last_certain_cut(text, 0, text.size());
    if (cut == 0) continue;
    ++found;
    // Each side by itself, and with other texts beyond the characters at the cut.
    const std::vector<size_t> whole = piece_ends(text);
    std::vector<size_t> parts = piece_ends(std::string_view(text).substr(0, cut));
    for (const size_t end : piece_ends(std::string_view(text).substr(cut))) {
      parts.push_back(cut + end);
    }
    CHECK(parts == whole);
  }
  CHECK(found > 10000);
}

TEST(random_vocabularies_encode_as_defined) {
  std::mt19937 random(3);
  int from_left = 0, by_merging = 0, unreachable = 0;
  for (int i = 0; i < 400; ++i) {
    const auto [tokens, model] = random_vocabulary(random, /*made_up=*/i % 2 == 0);
    const RankedBpe* ranked = model.ranked();
    ranked ? ++from_left : ++by_merging;
    if (ranked && !ranked->all_reachable()) ++unreachable;
    puna::PairMemo memo;
    puna::PieceEncoder encoder(model);
    for (int j = 0; j < 10; ++j) {
      const std::string piece = random_letters(random, 1 + random() % (j % 4 == 0 ? 200 : 20));
      const std::vector<int32_t> expected = merged_plainly(tokens, piece);
      if (!ranked) {
        std::vector<int32_t> symbols, ids;
        model.merge(piece, symbols, ids);
        CHECK_EQ(shown(ids), shown(expected));
        continue;
      }
      std::vector<int32_t> ids(piece.size());
      std::vector<uint64_t> dead;
      // Null where another way is better; so much work it is not for pieces as short as these.
      const int32_t* end = ranked->encode(piece, memo, dead, ids.data());
      CHECK(end != nullptr);
      ids.resize(static_cast<size_t>(end - ids.data()));
      CHECK_EQ(shown(ids), shown(expected));
      // Byte by byte, giving out ids when they are certain.
      IncrementalBpe incremental(*ranked);
      std::vector<int32_t> given;
      for (size_t at = 0; at < piece.size();) {
        const size_t n = std::min<size_t>(piece.size() - at, 1 + random() % 5);
        incremental.push(piece.substr(at, n), memo);
        at += n;
        incremental.drain(given);
        // Certain: whatever follows, the ids begin so.
        const std::string other = piece.substr(0, at) + random_letters(random, random() % 12);
        const std::vector<int32_t> longer = merged_plainly(tokens, other);
        CHECK(given.size() <= longer.size() &&
              std::equal(given.begin(), given.end(), longer.begin()));
      }
      incremental.complete(given);
      CHECK_EQ(shown(given), shown(expected));
      // Many bytes at a time, between few.
      const std::string longer = random_letters(random, 1 + random() % 2000);
      puna::IdBuffer whole;
      encoder.encode_piece(longer, whole);
      if (!ranked->all_reachable()) continue;  // may be a token of which its parts know nothing
      incremental.restart();
      given.clear();
      for (size_t at = 0; at < longer.size();) {
        const size_t n = std::min<size_t>(longer.size() - at, 1 + random() % 400);
        incremental.push_many(longer.substr(at, n), memo, dead, given);
        at += n;
        CHECK(given.size() <= whole.size() &&
              std::equal(given.begin(), given.end(), whole.ids().begin()));
      }
      incremental.complete(given);
      CHECK_EQ(shown(given), shown({whole.ids().begin(), whole.ids().end()}));
    }
  }
  CHECK(from_left > 30 && by_merging > 30 && unreachable > 5);
}

TEST(threads_that_share_a_model_find_the_same) {
  std::mt19937 random(4);
  for (int i = 0; i < 100; ++i) {
    const auto [tokens, model] = random_vocabulary(random, /*made_up=*/false);
    const RankedBpe* ranked = model.ranked();
    if (!ranked) continue;
    const std::string piece = random_letters(random, 100);
    std::vector<int32_t> found[3];
    std::vector<std::thread> threads;
    for (std::vector<int32_t>& ids : found) {
      threads.emplace_back([&, ranked] {
        puna::PairMemo memo;
        IncrementalBpe incremental(*ranked);
        incremental.push(piece, memo);
        incremental.complete(ids);
      });
    }
    for (std::thread& thread : threads) thread.join();
    const std::string expected = shown(merged_plainly(tokens, piece));
    for (const std::vector<int32_t>& ids : found) CHECK_EQ(shown(ids), expected);
  }
}

TEST(pieces_with_many_fitting_tokens_take_the_other_way) {
  const auto [tokens, model] = vocabulary_of_runs(60);
  puna::PieceEncoder encoder(model);
  int other_way = 0;
  for (size_t size = 1; size < 2000; size += 37) {
    const std::string piece(size, 'a');
    puna::IdBuffer ids;
    encoder.encode_piece(piece, ids);
    CHECK_EQ(shown({ids.ids().begin(), ids.ids().end()}), shown(merged_plainly(tokens, piece)));
    puna::PairMemo memo;
    std::vector<uint64_t> dead;
    std::vector<int32_t> out(size);
    other_way += model.ranked()->encode(piece, memo, dead, out.data()) == nullptr;
  }
  CHECK(other_way > 20);
}

TEST(merges_chosen_for_their_hashes_are_refused) {
  // Ends of hashes as all tables of this test have them.
  const auto place = [](uint64_t key) {
    return puna::ShortKey::mixed(key ^ puna::ShortKey::kSalt[0], puna::ShortKey::kSalt[1]) & 4095;
  };
  puna::MergeTable merges;
  int added = 0;
  const auto add = [&](int most) {
    for (uint32_t left = 0; added < most; ++left) {
      for (uint32_t right = 0; right < 4096 && added < most; ++right) {
        if (place(uint64_t{left} << 32 | right) != 7) continue;
        merges.add(static_cast<int32_t>(left), static_cast<int32_t>(right), {1, 1});
        ++added;
      }
    }
  };
  add(1000);
  merges.require_short_searches();
  added = 0;
  CHECK_THROWS(puna::ErrorCode::kModelFormat, add(1100));
}

TEST(vocabularies_whose_parts_take_long_to_find_are_encoded_all_the_same) {
  // At each cut of a run, both parts are tokens.
  const auto [tokens, model] = vocabulary_of_runs(1000);
  CHECK(model.ranked() == nullptr);
  puna::PieceEncoder encoder(model);
  for (const size_t size : {5, 77, 1500}) {
    const std::string piece = std::string(size, 'a') + "b";
    puna::IdBuffer ids;
    encoder.encode_piece(piece, ids);
    CHECK_EQ(shown({ids.ids().begin(), ids.ids().end()}), shown(merged_plainly(tokens, piece)));
  }
}

TEST(merges_that_lack_one_and_repeat_another_are_no_ranks) {
  const auto model_of = [](const std::vector<std::string>& merges) {
    puna::ByteStrings tokens, sides;
    for (int byte = 0; byte < 256; ++byte) tokens.add(std::string(1, static_cast<char>(byte)));
    for (const char* token : {"bc", "ab", "abc"}) tokens.add(token);
    for (const std::string& side : merges) sides.add(side);
    return BpeModel::of_merges(std::move(tokens), std::vector<bool>(259, false), sides,
                               /*whole_first=*/true);
  };
  CHECK(model_of({"b", "c", "a", "b", "a", "bc", "ab", "c"}).ranked() != nullptr);
  const BpeModel model = model_of({"b", "c", "a", "b", "ab", "c", "ab", "c"});
  CHECK(model.ranked() == nullptr);
  std::vector<int32_t> symbols, ids;
  model.merge("abc", symbols, ids);  // "bc" goes first, and with "a" makes nothing
  CHECK(ids == std::vector<int32_t>({'a', 256}));
}
