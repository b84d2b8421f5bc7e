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

Digest chain_hash(const Digest& parent, const KvText& text, int64_t begin, int64_t end) {
  if (static_cast<int64_t>(text.tokens.size()) < end)
    fail(ErrorCode::kInternal, "[kv] the text has ", text.tokens.size(), " tokens, the sequence ",
         end);
  Sha256 hash;
  hash.update(parent.data(), parent.size()).number(static_cast<uint64_t>(end - begin));
  hash.update(text.tokens.data() + begin, static_cast<size_t>(end - begin) * sizeof(int32_t));
  for (const KvImageRun& image : text.images) {
    const int64_t first = std::max(begin, image.position);
    const int64_t last = std::min(end, image.position + image.rows);
    if (first >= last) continue;
    hash.number(static_cast<uint64_t>(first - begin))
        .number(static_cast<uint64_t>(last - first))
        .number(static_cast<uint64_t>(first - image.position))
        .number(image.key);
  }
  return hash.digest();
}

}  // namespace puna
