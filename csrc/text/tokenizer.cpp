#include "text/tokenizer.h"

#include <algorithm>

#include "base/error.h"
#include "text/pretokenizer.h"
#include "text/unicode_classes.h"

namespace puna {

void Tokenizer::set_tokens(std::vector<std::string> tokens, std::vector<AddedToken> added) {
  const auto bad = [](const auto&... parts) {
    fail(ErrorCode::kModelFormat, "[tokenizer] ", parts...);
  };
  byte_ids_.fill(-1);
  for (size_t id = 0; id < tokens.size(); ++id) {
    if (tokens[id].size() == 1) {
      byte_ids_[static_cast<uint8_t>(tokens[id][0])] = static_cast<int32_t>(id);
    }
  }
  const auto missing = std::find(byte_ids_.begin(), byte_ids_.end(), -1);
  if (missing != byte_ids_.end()) {
    bad("there is no token for the single byte ", missing - byte_ids_.begin(),
        "; byte-level BPE needs all 256");
  }
  for (const AddedToken& token : added) {
    const auto id = static_cast<size_t>(token.id);
    if (token.name.empty()) bad("the special token ", id, " has no name");
    if (id >= tokens.size()) tokens.resize(id + 1);
    if (!tokens[id].empty()) {
      bad("the special token ", token.name, " has the id ", id, ", which another token has");
    }
    tokens[id] = token.name;
    special_tokens_.emplace(token.name, token.id);
    begins_added_[static_cast<uint8_t>(token.name[0])] = true;
  }
  if (special_tokens_.size() != added.size()) bad("two special tokens have the same name");
  added_ = std::move(added);
  std::sort(added_.begin(), added_.end(),
            [](const AddedToken& a, const AddedToken& b) { return a.name < b.name; });
  is_special_.assign(tokens.size(), false);
  for (const AddedToken& token : added_) is_special_[token.id] = token.special;

  offsets_.assign(1, 0);
  for (const std::string& token : tokens) {
    arena_ += token;
    if (arena_.size() > UINT32_MAX) bad("the tokens have more than 4 GiB");
    offsets_.push_back(static_cast<uint32_t>(arena_.size()));
  }
}

const Tokenizer::AddedToken* Tokenizer::added_at(std::string_view text, size_t at,
                                                 const AllowedSpecial& allowed) const {
  // [first, last): the names that begin with the `depth` bytes at `at`.
  auto first = added_.begin(), last = added_.end();
  const AddedToken* found = nullptr;
  for (size_t depth = 0; first != last; ++depth) {
    if (first->name.size() == depth) {
      if (allowed.all || allowed.names.contains(first->name)) found = &*first;
      ++first;
    }
    if (at + depth == text.size()) break;
    const auto byte = static_cast<uint8_t>(text[at + depth]);
    const auto byte_of = [depth](const AddedToken& token) {
      return static_cast<uint8_t>(token.name[depth]);
    };
    first = std::partition_point(first, last, [&](const auto& t) { return byte_of(t) < byte; });
    last = std::partition_point(first, last, [&](const auto& t) { return byte_of(t) == byte; });
  }
  return found;
}

void Tokenizer::encode_plain(std::string_view text, std::vector<int32_t>& out,
                             std::vector<int32_t>& symbols) const {
  for (size_t at = 0; at < text.size();) {
    const size_t end = next_piece(text, at);
    const std::string_view piece = text.substr(at, end - at);
    at = end;
    if (const auto found = whole_.find(piece); found != whole_.end()) {
      out.push_back(found->second);
      continue;
    }
    symbols.clear();
    for (const char c : piece) symbols.push_back(byte_ids_[static_cast<uint8_t>(c)]);
    merge_pairs(merges_, symbols, out);
  }
}

std::vector<int32_t> Tokenizer::encode(std::string_view bytes,
                                       const AllowedSpecial& allowed) const {
  std::string replaced;
  if (!is_valid_utf8(bytes)) replaced = to_valid_utf8(bytes);
  const std::string_view text = replaced.empty() ? bytes : std::string_view(replaced);
  std::vector<int32_t> out, symbols;
  out.reserve(text.size() / 3 + 8);
  if (!allowed.all && allowed.names.empty()) {
    encode_plain(text, out, symbols);
    return out;
  }
  size_t start = 0;  // of the plain text before the next special token
  for (size_t at = 0; at < text.size();) {
    const bool possible = begins_added_[static_cast<uint8_t>(text[at])];
    const AddedToken* found = possible ? added_at(text, at, allowed) : nullptr;
    if (!found) {
      ++at;
      continue;
    }
    encode_plain(text.substr(start, at - start), out, symbols);
    out.push_back(found->id);
    start = at += found->name.size();
  }
  encode_plain(text.substr(start), out, symbols);
  return out;
}

std::string_view Tokenizer::bytes_of(int32_t id) const {
  if (id < 0 || id >= vocab_size()) {
    fail(ErrorCode::kInvalidRequest, "[tokenizer] there is no token ", id,
         "; the vocabulary goes from 0 to ", vocab_size() - 1);
  }
  return std::string_view(arena_).substr(offsets_[id], offsets_[id + 1] - offsets_[id]);
}

bool Tokenizer::is_special(int32_t id) const {
  return id >= 0 && id < vocab_size() && is_special_[id];
}

std::string Tokenizer::decode(const std::vector<int32_t>& ids, bool skip_special) const {
  std::string bytes;
  for (const int32_t id : ids) {
    const std::string_view token = bytes_of(id);
    if (!skip_special || !is_special_[id]) bytes += token;
  }
  return bytes;
}

}  // namespace puna
