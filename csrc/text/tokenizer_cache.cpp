#include "text/tokenizer_cache.h"

#include <array>
#include <cstddef>
#include <exception>
#include <span>
#include <string_view>
#include <type_traits>
#include <vector>

#include "base/crc32c.h"
#include "base/env.h"
#include "text/table_file.h"

namespace puna {

namespace {

// Raised whenever files give other tables, or tables are written in another way.
constexpr uint32_t kVersion = 3;
constexpr std::array<char, 8> kMagic = {'P', 'U', 'N', 'A', 'T', 'O', 'K', '1'};

// How many tokenizers are kept. Llama 4's takes 17 MB.
constexpr size_t kMostFiles = 8;
// Larger files than Llama 4's have not been seen; these would take memory before they are refused.
constexpr size_t kMostBytes = size_t{1} << 30;
// Less is built in a few milliseconds.
constexpr size_t kWorthKeeping = size_t{256} << 10;

struct Header {
  std::array<char, 8> magic = kMagic;
  uint32_t version = kVersion;
  uint32_t body_crc = 0;
  uint64_t body_bytes = 0;
  Digest key{};
  uint32_t zero = 0;
  uint32_t header_crc = 0;  // of what comes before it

  uint32_t own_crc() const { return crc32c(this, offsetof(Header, header_crc)); }
};
static_assert(sizeof(Header) == 64 && std::has_unique_object_representations_v<Header>);

}  // namespace

std::optional<Tokenizer> TokenizerCache::find(const Digest& key) const {
  try {
    std::optional<CacheDirectory::Reader> file = directory_.open(hex(key));
    Header header;
    if (!file || !file->read(&header, sizeof header)) return std::nullopt;
    if (header.magic != kMagic || header.version != kVersion || header.key != key ||
        header.header_crc != header.own_crc() || header.body_bytes != file->left() ||
        header.body_bytes > kMostBytes) {
      return std::nullopt;
    }
    TableReader in(*file);
    std::optional<Tokenizer> tokenizer = Tokenizer::load(in);
    if (file->left() != 0 || in.crc() != header.body_crc) return std::nullopt;
    return tokenizer;
  } catch (const std::exception&) {
    return std::nullopt;  // no memory for it; building says so where there is none for that either
  }
}

bool TokenizerCache::keep(const Digest& key, const Tokenizer& tokenizer) const {
  try {
    TableWriter out;
    tokenizer.save(out);
    Header header{.body_crc = out.crc(), .body_bytes = out.bytes(), .key = key};
    header.header_crc = header.own_crc();
    std::vector<CacheDirectory::Part> parts = {std::as_bytes(std::span(&header, 1))};
    parts.insert(parts.end(), out.parts().begin(), out.parts().end());
    return directory_.put(hex(key), parts, kMostFiles);
  } catch (const std::exception&) {
    return false;
  }
}

Digest TokenizerCache::key_of(const std::function<void(Sha256&)>& identify) {
  const std::string_view release = PUNA_VERSION;
  Sha256 sum;
  sum.number(kVersion).number(release.size()).update(release.data(), release.size());
  identify(sum);
  return sum.digest();
}

Tokenizer cached_tokenizer(size_t bytes, const std::function<void(Sha256&)>& identify,
                           const std::function<Tokenizer()>& build) {
  const std::string directory = environment_cache();
  if (directory.empty() || bytes < kWorthKeeping) return build();
  const TokenizerCache cache(directory + "/tokenizers");
  const Digest key = TokenizerCache::key_of(identify);
  if (std::optional<Tokenizer> found = cache.find(key)) return std::move(*found);
  Tokenizer built = build();
  cache.keep(key, built);
  return built;
}

}  // namespace puna
