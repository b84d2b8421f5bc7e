// Llama 4's tokenizer: byte-level BPE with special tokens, from tokenizer.model or tokenizer.json.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "text/bpe_model.h"
#include "text/id_buffer.h"
#include "text/piece_encoder.h"
#include "text/wide_text.h"

namespace puna {

// Which special tokens encode() reads in a text: by default none, so that text of a user never
// turns into one.
struct AllowedSpecial {
  bool all = false;
  std::set<std::string> names;  // of which only these, unless all

  static AllowedSpecial none() { return {}; }
  static AllowedSpecial every() { return {true, {}}; }
};

// Before anything else Meta's own tokenizer cuts long texts (meta_cut.h), which changes ids there;
// tiktoken and Hugging Face's do not.
enum class Cut { kNone, kMeta };

struct EncodeOptions {
  AllowedSpecial special;
  Cut cut = Cut::kNone;
  int threads = 1;             // ids do not depend on it; 0: as many as there are cores
  bool is_valid_utf8 = false;  // the caller knows that it is
};

// What a GGUF file says of a byte-level BPE tokenizer; views of the file.
struct GgufVocabulary {
  enum TokenType : int64_t { kNormal = 1, kUnknown, kControl, kUserDefined, kUnused };

  std::vector<std::string_view> tokens;  // in GPT-2's alphabet of bytes, or the names of added ones
  std::vector<int64_t> types;            // TokenType; empty: all are normal
  std::vector<std::string_view> merges;  // "left right", the first merges first

  int64_t type(size_t id) const { return types.empty() ? kNormal : types[id]; }
  // Not a product of merges.
  bool is_added(size_t id) const {
    return type(id) == kControl || type(id) == kUnknown || type(id) == kUserDefined;
  }
  bool is_special(size_t id) const { return is_added(id) && type(id) != kUserDefined; }
};

// The same as tokenizer.json, for a vocabulary from which Tokenizer::from_gguf() makes a tokenizer.
// Throws Unsupported if a token's name is no UTF-8, which JSON cannot hold.
std::string tokenizer_json(const GgufVocabulary& vocabulary);

class Tokenizer {
 public:
  // A token that is no product of merges: it is looked for in the text as a whole.
  struct AddedToken {
    std::string name;
    int32_t id;
    bool special;  // if not, decode() shows it even where special tokens are skipped
  };

  // tokenizer.json (Hugging Face, byte-level BPE with Llama 4's pattern) or tokenizer.model (lines
  // "base64 rank"), told apart by content; or a directory that holds one of them. Beside a
  // tokenizer.model, tokenizer_config.json may name the special tokens (added_tokens_decoder);
  // without it they are Llama 4's 2,048. What is built from a large vocabulary comes from the
  // user's cache the next time, of a GGUF file likewise. Throws ModelNotFound, ModelFormat, or
  // Unsupported naming a pattern or model type that is not Llama 4's.
  static Tokenizer from_file(const std::string& path);
  // From texts; `config` is tokenizer_config.json or empty.
  static Tokenizer from_ranks(std::string_view ranks, std::string_view config = {});
  static Tokenizer from_json(std::string_view json);
  // From the metadata of a GGUF file.
  static Tokenizer from_gguf(const GgufVocabulary& vocabulary);

  // What was built from a file, to be kept in another one (tokenizer_cache.h).
  void save(TableWriter& out) const;
  // Nothing if the file holds something else. One that was made to deceive can give a tokenizer
  // with other ids or one that fails, never one that reads where it must not or does not end.
  static std::optional<Tokenizer> load(TableReader& in);

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  // Ids of a text; bytes that are not UTF-8 count as U+FFFD. Thread-safe, like all below.
  std::vector<int32_t> encode(std::string_view text, const EncodeOptions& options = {}) const;
  // The same, appended to `out`.
  void encode(std::string_view text, const EncodeOptions& options, IdBuffer& out) const;
  // The same of a text that is not UTF-8 yet, of which UTF-8 is made a part at a time where it
  // can. False if it has something that is no character; then `out` holds anything.
  bool encode(WideText text, const EncodeOptions& options, IdBuffer& out) const;
  // Of each text, several texts at once.
  std::vector<IdBuffer> encode_all(std::span<const std::string_view> texts,
                                   const EncodeOptions& options) const;
  // How many ids a text has.
  size_t count(std::string_view text, const EncodeOptions& options = {}) const;

  // Bytes of ids. Throws InvalidRequest for an id that does not exist.
  std::string decode(std::span<const int32_t> ids, bool skip_special = false) const;
  // The same into memory of the caller's: how many bytes they are, and then those bytes.
  struct DecodedSize {
    size_t bytes = 0;
    bool is_ascii = true;
  };
  DecodedSize decoded_size(std::span<const int32_t> ids, bool skip_special) const;
  void decode_into(std::span<const int32_t> ids, bool skip_special, std::span<char> out) const;
  std::string_view bytes_of(int32_t id) const;
  bool is_special(int32_t id) const;

  int64_t vocab_size() const { return static_cast<int64_t>(model().vocabulary().size()); }
  const std::map<std::string, int32_t>& special_tokens() const { return special_tokens_; }

  // What StreamEncoder works with. A lease is an encoder of one's own for a while; what it learns
  // stays with the tokenizer.
  class Lease;
  Lease lease() const;
  const BpeModel& model() const;
  // The longest allowed added token at text[at], or null. *may_grow: whether more text could make
  // it another one.
  const AddedToken* added_at(std::string_view text, size_t at, const AllowedSpecial& allowed,
                             bool* may_grow = nullptr) const;
  // The first place from `at` on where an added token may begin, or text.size().
  size_t find_added(std::string_view text, size_t at) const;

 private:
  // Encoders that wait for work, and threads; behind a pointer, which stays where it is.
  struct Shared;

  static Tokenizer built_of_gguf(const GgufVocabulary& vocabulary);
  // `tokens` by id in the alphabet of bytes, empty where there is none; `whole_first`: a piece that
  // is a token is not merged.
  static Tokenizer from_byte_level(
      const std::vector<std::string_view>& tokens,
      const std::vector<std::pair<std::string_view, std::string_view>>& merges,
      std::vector<AddedToken> added, bool whole_first);
  // The added tokens in the order of their names.
  Tokenizer(BpeModel model, std::vector<AddedToken> added);
  void encode_between_cuts(std::string_view text, const EncodeOptions& options,
                           IdBuffer& out) const;
  void encode_plain(std::string_view text, int threads, IdBuffer& out) const;

  std::unique_ptr<Shared> shared_;
  std::vector<AddedToken> added_;         // sorted by name
  std::array<bool, 256> begins_added_{};  // whether one begins with a byte
  int only_begin_ = -1;                   // the byte with which all begin, if it is one
  std::map<std::string, int32_t> special_tokens_;
  std::vector<bool> is_special_;
};

class Tokenizer::Lease {
 public:
  explicit Lease(Shared& shared);
  ~Lease();
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  PieceEncoder& encoder() const { return *encoder_; }

 private:
  Shared& shared_;
  std::unique_ptr<PieceEncoder> encoder_;
};

// The tokenizer of a checkpoint directory, or nothing if it has none.
std::optional<Tokenizer> find_tokenizer(const std::string& directory);

}  // namespace puna
