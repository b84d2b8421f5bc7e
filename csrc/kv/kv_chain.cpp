#include "kv/kv_chain.h"

#include <algorithm>
#include <bit>
#include <string_view>

#include "base/error.h"

namespace puna {

static_assert(std::endian::native == std::endian::little,
              "tokens are hashed and stored as they lie");

Digest KvIdentity::root() const {
  constexpr std::string_view kWhat = "puna keys and values 1";
  Sha256 hash;
  hash.update(kWhat.data(), kWhat.size()).update(model.data(), model.size());
  hash.number(static_cast<uint64_t>(geometry.layout.dtype))
      .number(static_cast<uint64_t>(geometry.seal))
      .number(static_cast<uint64_t>(geometry.layout.kv_heads))
      .number(static_cast<uint64_t>(geometry.layout.head_dim))
      .number(static_cast<uint64_t>(kPageTokens))
      .number(geometry.chunk.size());
  for (const int64_t chunk : geometry.chunk) hash.number(static_cast<uint64_t>(chunk));
  return hash.digest();
}

std::span<const int32_t> KvText::part(int64_t from, int64_t to) const {
  if (from < first || to > end())
    fail(ErrorCode::kInternal, "[kv] tokens ", from, " to ", to, " are needed, those from ", first,
         " to ", end(), " were given");
  return tokens.subspan(static_cast<size_t>(from - first), static_cast<size_t>(to - from));
}

Digest chain_hash(const Digest& parent, const KvText& text, int64_t begin, int64_t end) {
  const std::span<const int32_t> tokens = text.part(begin, end);
  Sha256 hash;
  hash.update(parent.data(), parent.size()).number(static_cast<uint64_t>(end - begin));
  hash.update(tokens.data(), tokens.size_bytes());
  for (const KvImageRun& image : text.images) {
    const int64_t first = std::max(begin, image.position);
    const int64_t last = std::min(end, image.position + image.rows);
    if (first >= last) continue;
    hash.number(static_cast<uint64_t>(first - begin))
        .number(static_cast<uint64_t>(last - first))
        .number(static_cast<uint64_t>(first - image.position))
        .number(image.key);
  }
  if (text.salt != 0) hash.number(text.salt);
  return hash.digest();
}

}  // namespace puna
