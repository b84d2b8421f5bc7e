// Tokenizers as they were built, in files: reading one takes a fraction of building it.
#pragma once

#include <cstddef>
#include <functional>
#include <optional>
#include <string>

#include "base/sha256.h"
#include "platform/cache_directory.h"
#include "text/tokenizer.h"

namespace puna {

// A file is named by a digest of all that the tokenizer was built from; docs/formats.md describes
// it. One that is damaged, forged, of another version or of another user is as if it were not
// there.
class TokenizerCache {
 public:
  explicit TokenizerCache(std::string directory) : directory_(std::move(directory)) {}

  // Nothing if it is not there.
  std::optional<Tokenizer> find(const Digest& key) const;
  // False if it could not be written.
  bool keep(const Digest& key, const Tokenizer& tokenizer) const;

  // Of what `identify` adds, and the version of what is built of it.
  static Digest key_of(const std::function<void(Sha256&)>& identify);

 private:
  CacheDirectory directory_;
};

// What `build` makes, from the user's cache if it is there; `identify` adds to a digest all that it
// is made of, which has `bytes` bytes. Small ones are built each time.
Tokenizer cached_tokenizer(size_t bytes, const std::function<void(Sha256&)>& identify,
                           const std::function<Tokenizer()>& build);

}  // namespace puna
