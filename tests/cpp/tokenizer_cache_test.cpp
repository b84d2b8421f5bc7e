// Tokenizers in files: what comes back is what was built, and what is no such file is not there.
#include "text/tokenizer_cache.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <set>
#include <thread>

#include "base/crc32c.h"
#include "check.h"
#include "environment_variable.h"
#include "random_token.h"
#include "temporary_directory.h"
#include "text/pretokenizer.h"
#include "text/stream_encoder.h"
#include "text/table_file.h"
#include "tokenizer_fixture.h"

using fixture::TemporaryDirectory;
using fixture::Variable;
using puna::AllowedSpecial;
using puna::Digest;
using puna::Tokenizer;
using puna::TokenizerCache;

namespace {

const Digest kKey = puna::Sha256::of(std::string_view("a key"));

std::string bytes_of_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// All that a tokenizer's tables hold.
std::string saved(const Tokenizer& tokenizer) {
  puna::TableWriter out;
  tokenizer.save(out);
  std::string bytes;
  for (const auto& part : out.parts()) {
    bytes.append(reinterpret_cast<const char*>(part.data()), part.size());
  }
  return bytes;
}

std::vector<int32_t> streamed(const Tokenizer& tokenizer, std::string_view text, size_t part) {
  puna::StreamEncoder encoder(tokenizer, {}, 3 * text.size());  // U+FFFD has three bytes
  puna::IdBuffer ids;
  for (size_t at = 0; at < text.size(); at += part) encoder.feed(text.substr(at, part), ids);
  encoder.finish(ids);
  return {ids.ids().begin(), ids.ids().end()};
}

// Letters of which the vocabularies here have tokens, what ends pieces, and runs.
std::string random_text(std::mt19937& random) {
  static const std::vector<std::string> kParts = {
      "a", "b", "c", "the", " the", "hello", " ", "  ", "\n", "'s", "123", "€", "<|eot|>", "\xff"};
  std::string text;
  for (size_t left = random() % 40; left > 0; --left) {
    const std::string& part = kParts[random() % kParts.size()];
    for (size_t times = random() % 16 == 0 ? random() % 400 : 1; times > 0; --times) text += part;
  }
  return text;
}

void check_same(const Tokenizer& built, const Tokenizer& found) {
  CHECK(saved(built) == saved(found));
  CHECK_EQ(found.vocab_size(), built.vocab_size());
  CHECK(found.special_tokens() == built.special_tokens());
  for (int32_t id = 0; id < built.vocab_size(); ++id) {
    CHECK(found.bytes_of(id) == built.bytes_of(id) && found.is_special(id) == built.is_special(id));
  }
  std::mt19937 random(1);
  for (int i = 0; i < check::trials(100); ++i) {
    const std::string text = random_text(random);
    const std::vector<int32_t> ids = built.encode(text);
    CHECK(found.encode(text) == ids);
    CHECK(found.decode(ids) == built.decode(ids));
    CHECK(streamed(found, text, 1 + random() % 50) == ids);
    const AllowedSpecial every = AllowedSpecial::every();
    CHECK(found.encode(text, {.special = every}) == built.encode(text, {.special = every}));
  }
}

void check_kept(const Tokenizer& built) {
  const TemporaryDirectory directory;
  const TokenizerCache cache(directory.path());
  CHECK(!cache.find(kKey));
  CHECK(cache.keep(kKey, built));
  const std::optional<Tokenizer> found = cache.find(kKey);
  CHECK(found.has_value());
  if (found) check_same(built, *found);
}

Tokenizer small() {
  return Tokenizer::from_ranks(tokenizer_fixture::ranks(), tokenizer_fixture::config());
}

// Over three letters, joined from tokens that are there, or made up: then some cannot come about
// by merging, or need merges in another order than that of the ids.
std::vector<std::string> random_tokens(std::mt19937& random, bool made_up) {
  std::vector<std::string> tokens = tokenizer_fixture::tokens();
  tokens.resize(256);
  std::set<std::string> known(tokens.begin(), tokens.end());
  for (size_t left = 4 + random() % 40; left > 0; --left) {
    const std::string token = random_token(random, tokens, made_up);
    if (known.insert(token).second) tokens.push_back(token);
  }
  return tokens;
}

// A file in the cache and how to change it.
struct CachedFile {
  TemporaryDirectory directory;
  TokenizerCache cache{directory.path()};
  std::string path = directory.path(puna::hex(kKey));

  explicit CachedFile(const Tokenizer& tokenizer) { CHECK(cache.keep(kKey, tokenizer)); }

  std::string bytes() const { return bytes_of_file(path); }
  void write(const std::string& bytes) const { directory.file(puna::hex(kKey), bytes); }
};

// docs/formats.md
constexpr size_t kHeaderBytes = 64, kVersionAt = 8, kBodyCrcAt = 12, kBodyBytesAt = 16, kKeyAt = 24;
constexpr size_t kHeaderCrcAt = 60;

template <class Number>
void put_at(std::string& bytes, size_t at, Number value) {
  std::memcpy(bytes.data() + at, &value, sizeof value);
}

// Whoever forges a file makes its sums right.
void sign(std::string& bytes) {
  const char* body = bytes.data() + kHeaderBytes;
  put_at<uint32_t>(bytes, kBodyCrcAt, puna::crc32c(body, bytes.size() - kHeaderBytes));
  put_at<uint64_t>(bytes, kBodyBytesAt, bytes.size() - kHeaderBytes);
  put_at<uint32_t>(bytes, kHeaderCrcAt, puna::crc32c(bytes.data(), kHeaderCrcAt));
}

}  // namespace

TEST(vocabularies_come_back) {
  namespace fixture = tokenizer_fixture;
  check_kept(small());
  check_kept(Tokenizer::from_ranks(fixture::ranks()));  // with Llama 4's special tokens
  for (const bool ignore_merges : {true, false}) {
    check_kept(Tokenizer::from_json(
        fixture::json(puna::kPretokenizerPattern, fixture::tokens(), ignore_merges)));
  }
}

TEST(random_vocabularies_come_back) {
  namespace fixture = tokenizer_fixture;
  std::mt19937 random(2);
  for (int i = 0; i < check::trials(40); ++i) {
    const std::vector<std::string> tokens = random_tokens(random, i % 2 == 0);
    check_kept(Tokenizer::from_ranks(fixture::ranks(tokens), R"({"added_tokens_decoder": {}})"));
  }
  // Whose merges are those of no ranks: each token but bytes is letters.
  for (int i = 0; i < check::trials(20); ++i) {
    const std::vector<std::string> tokens = random_tokens(random, true);
    const std::set<std::string> known(tokens.begin(), tokens.end());
    std::vector<std::string> names, merges;
    for (const std::string& token : tokens) {
      const bool escaped = token == "\"" || token == "\\";  // in JSON, which this is not
      const auto byte = static_cast<unsigned char>(token[0]);
      names.push_back(token.size() > 1 || escaped ? token : fixture::character(byte));
      const std::string rest = token.substr(1);
      if (known.contains(rest)) merges.push_back(token.substr(0, 1) + " " + rest);
    }
    std::shuffle(merges.begin(), merges.end(), random);
    puna::GgufVocabulary vocabulary;
    vocabulary.tokens.assign(names.begin(), names.end());
    vocabulary.merges.assign(merges.begin(), merges.end());
    check_kept(Tokenizer::from_gguf(vocabulary));
  }
}

// If this fails, tables or the way in which they are written have changed: raise kVersion in
// tokenizer_cache.cpp, or else files of before are read as if they were of now.
TEST(the_version_is_of_these_tables) {
  const std::string model = saved(small());
  const std::string merges = saved(Tokenizer::from_json(tokenizer_fixture::json(
      puna::kPretokenizerPattern, tokenizer_fixture::tokens(), /*ignore_merges=*/false)));
  CHECK_EQ(puna::crc32c(model.data(), model.size()), 4227703232u);
  CHECK_EQ(puna::crc32c(merges.data(), merges.size()), 2206895166u);
}

TEST(keys_tell_sources_apart) {
  const auto key = [](std::string_view text) {
    return TokenizerCache::key_of([&](puna::Sha256& sum) { sum.update(text.data(), text.size()); });
  };
  CHECK(key("a") == key("a"));
  CHECK(key("a") != key("b"));
  const CachedFile file(small());
  CHECK(file.cache.find(kKey).has_value());
  CHECK(!file.cache.find(key("a")));
  // A file under another's name.
  std::filesystem::rename(file.path, file.directory.path(puna::hex(key("a"))));
  CHECK(!file.cache.find(key("a")));
}

TEST(a_file_of_another_version_is_not_there) {
  const CachedFile file(small());
  std::string bytes = file.bytes();
  sign(bytes);
  CHECK(bytes == file.bytes());  // so the sums are where they are said to be
  ++bytes[kVersionAt];
  sign(bytes);
  file.write(bytes);
  CHECK(!file.cache.find(kKey));
  CHECK(file.cache.keep(kKey, small()));  // takes its place
  CHECK(file.cache.find(kKey).has_value());
}

TEST(a_file_that_is_cut_or_longer_is_not_there) {
  const CachedFile file(small());
  const std::string bytes = file.bytes();
  for (size_t size = bytes.size(); size-- > 0;) {
    std::filesystem::resize_file(file.path, size);
    CHECK(!file.cache.find(kKey));
  }
  file.write(bytes + '\0');
  CHECK(!file.cache.find(kKey));
  // And with sums that say that it is whole.
  for (int i = 0; i < check::trials(2000); ++i) {
    std::string cut = bytes.substr(0, kHeaderBytes + i * (bytes.size() - kHeaderBytes) / 2000);
    sign(cut);
    file.write(cut);
    CHECK(!file.cache.find(kKey));
  }
  file.write(bytes);
  CHECK(file.cache.find(kKey).has_value());
}

TEST(a_file_with_a_flipped_bit_is_not_there) {
  const CachedFile file(small());
  std::mt19937 random(3);
  const std::string bytes = file.bytes();
  std::fstream stream(file.path, std::ios::binary | std::ios::in | std::ios::out);
  const auto set = [&](size_t at, char value) {
    stream.seekp(static_cast<std::streamoff>(at));
    stream.put(value);
    stream.flush();
  };
  constexpr size_t kStep = check::trials(4) == 4 ? 1 : 7;
  for (size_t at = 0; at < bytes.size(); at += at < kHeaderBytes ? 1 : kStep) {
    set(at, static_cast<char>(bytes[at] ^ 1 << random() % 8));
    CHECK(!file.cache.find(kKey));
    set(at, bytes[at]);
  }
  CHECK(file.cache.find(kKey).has_value());
}

// Files with other tables and right sums: refused, or a tokenizer that does no harm.
TEST(forged_files_do_no_harm) {
  namespace fixture = tokenizer_fixture;
  std::mt19937 random(4);
  const Tokenizer tokenizers[] = {
      small(), Tokenizer::from_ranks(fixture::ranks(random_tokens(random, true)), "{}"),
      Tokenizer::from_json(fixture::json(puna::kPretokenizerPattern, fixture::tokens(), false))};
  int refused = 0, used = 0, failed = 0;
  for (const Tokenizer& tokenizer : tokenizers) {
    const CachedFile file(tokenizer);
    const std::string good = file.bytes();
    for (int i = 0; i < check::trials(4000); ++i) {
      std::string bytes = good;
      for (size_t changes = 1 + random() % 3; changes > 0; --changes) {
        const size_t at = kHeaderBytes + random() % (bytes.size() - kHeaderBytes - 8);
        uint32_t word;
        switch (random() % 5) {
          case 0:
            bytes[at] = static_cast<char>(random());
            break;
          case 1:  // another number of the file, or one near it, in the place of one
            std::memcpy(&word, &good[random() % (good.size() / 4 - 1) * 4], sizeof word);
            put_at<uint32_t>(bytes, at / 4 * 4, word + random() % 3 - 1);
            break;
          case 2:
            put_at<uint32_t>(bytes, at / 4 * 4, random() % 3 == 0 ? ~0u : random() % 400);
            break;
          case 3:  // a part over another
            bytes.replace(at, random() % 64, good.substr(random() % good.size(), random() % 64));
            bytes.resize(random() % 4 == 0 ? bytes.size() : good.size());
            break;
          default:
            bytes[at] = static_cast<char>(bytes[at] ^ 1 << random() % 8);
            break;
        }
      }
      sign(bytes);
      file.write(bytes);
      const std::optional<Tokenizer> found = file.cache.find(kKey);
      if (!found) {
        ++refused;
        continue;
      }
      ++used;
      for (int texts = 0; texts < 3; ++texts) {
        const std::string text = random_text(random);
        try {
          found->decode(found->encode(text));
          found->encode(text, {.special = AllowedSpecial::every()});
          streamed(*found, text, 1 + random() % 50);
        } catch (const puna::Error&) {
          ++failed;  // as no token fits
        }
      }
    }
  }
  std::printf("refused %d, used %d, failed on %d texts\n", refused, used, failed);
  // Both must happen, or the changes are too mild or too wild to test anything.
  CHECK(refused > 100 && used > 100);
}

TEST(writers_at_once_leave_a_whole_file) {
  const TemporaryDirectory directory;
  const TokenizerCache cache(directory.path());
  const Tokenizer built = small();
  const std::string tables = saved(built);
  cache.keep(kKey, built);  // from here on a reader always finds a whole file
  std::atomic<int> missing{0}, others{0};
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      for (int i = 0; i < check::trials(100); ++i) {
        if (thread % 2 == 0) {
          cache.keep(kKey, built);
        } else if (const auto found = cache.find(kKey)) {
          others += saved(*found) != tables;
        } else {
          ++missing;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK_EQ(missing, 0);
  CHECK_EQ(others, 0);
  CHECK(cache.find(kKey).has_value());
  for (const auto& entry : std::filesystem::directory_iterator(directory.path())) {
    CHECK_EQ(entry.path().filename().string(), puna::hex(kKey));  // and nothing else
  }
}

TEST(a_cache_that_cannot_be_used_changes_nothing) {
  const TemporaryDirectory directory;
  const TokenizerCache nowhere(directory.file("file", "content"));
  CHECK(!nowhere.keep(kKey, small()));
  CHECK(!nowhere.find(kKey));
}

TEST(the_users_cache_spares_building) {
  const TemporaryDirectory directory;
  const auto load = [](size_t bytes, std::string_view source) {
    bool built = false;
    puna::cached_tokenizer(
        bytes, [&](puna::Sha256& sum) { sum.update(source.data(), source.size()); },
        [&] {
          built = true;
          return small();
        });
    return built;
  };
  constexpr size_t kLarge = size_t{1} << 20;
  const std::string place = directory.path("cache");
  {
    const Variable off("PUNA_CACHE", "off");
    CHECK(load(kLarge, "a") && load(kLarge, "a"));
  }
  const Variable own("PUNA_CACHE", place.c_str());
  CHECK(load(1000, "a") && load(1000, "a"));
  CHECK(!std::filesystem::exists(place));
  CHECK(load(kLarge, "a"));
  CHECK(!load(kLarge, "a"));
  CHECK(load(kLarge, "b"));
  CHECK(!load(kLarge, "b") && !load(kLarge, "a"));
  std::filesystem::resize_file(std::filesystem::directory_iterator(place + "/tokenizers")->path(),
                               100);
  CHECK(load(kLarge, "a") != load(kLarge, "b"));  // the one that is damaged is built, and kept
  CHECK(!load(kLarge, "b") && !load(kLarge, "a"));
}
