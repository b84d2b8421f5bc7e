#include "text/json_cursor.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/error.h"

namespace puna {

void JsonCursor::refuse(const char* wanted) const {
  fail(ErrorCode::kModelFormat, "[tokenizer] ", where_, " is not valid JSON: there is no ", wanted,
       " at byte ", at_, " of ", text_.size(), ", where one belongs");
}

char JsonCursor::next() {
  // Files that are made to be read indent each line.
  constexpr uint64_t kBlanks = 0x2020202020202020;
  for (;; ++at_) {
    uint64_t word = 0;
    if (text_.size() - at_ >= sizeof(word)) {
      std::memcpy(&word, text_.data() + at_, sizeof(word));
      at_ += static_cast<size_t>(std::countr_zero(word ^ kBlanks)) / 8;
    }
    if (at_ == text_.size()) return '\0';
    const char c = text_[at_];
    if (c != ' ' && c != '\n' && c != '\t' && c != '\r') return c;
  }
}

bool JsonCursor::take(char wanted) {
  const bool found = next() == wanted;
  at_ += found;
  return found;
}

void JsonCursor::expect(char wanted) {
  const char name[] = {'"', wanted, '"', '\0'};
  if (!take(wanted)) refuse(name);
}

bool JsonCursor::skip_string() {
  if (next() != '"') refuse("string");
  bool escaped = false;
  for (size_t i = at_ + 1; i < text_.size(); ++i) {
    const char c = text_[i];
    if (c == '"') {
      at_ = i + 1;
      return escaped;
    }
    if (static_cast<uint8_t>(c) < 0x20) break;
    if (c == '\\') {
      escaped = true;
      ++i;
    }
  }
  refuse("string that ends");
}

std::string_view JsonCursor::string() {
  next();
  const size_t begin = at_;
  const bool escaped = skip_string();
  const std::string_view quoted = text_.substr(begin, at_ - begin);
  if (!escaped) return quoted.substr(1, quoted.size() - 2);
  try {
    return unescaped_.emplace_back(nlohmann::json::parse(quoted).get<std::string>());
  } catch (const nlohmann::json::exception&) {
    at_ = begin;
    refuse("string whose escapes are JSON's");
  }
}

std::optional<uint64_t> JsonCursor::whole_number() {
  next();
  const std::string_view rest = text_.substr(at_);
  uint64_t number = 0;
  const auto [end, problem] = std::from_chars(rest.data(), rest.data() + rest.size(), number);
  const auto digits = static_cast<size_t>(end - rest.data());
  if (problem != std::errc() || (digits > 1 && rest[0] == '0')) return std::nullopt;
  if (digits < rest.size() && std::strchr(".eE", rest[digits])) return std::nullopt;
  at_ += digits;
  return number;
}

void JsonCursor::skip() {
  size_t depth = 0;
  do {
    const char c = next();
    if (c == '\0' && at_ == text_.size()) refuse("value");
    if (c == '"') {
      skip_string();
      continue;
    }
    if ((c == ']' || c == '}' || c == ',' || c == ':') && depth == 0) refuse("value");
    depth += c == '[' || c == '{';
    depth -= c == ']' || c == '}';
    // A number or a name is a value to its end.
    constexpr std::string_view kEnds = " \n\t\r\",:[]{}";
    ++at_;
    if (kEnds.find(c) == std::string_view::npos) {
      at_ = std::min(text_.find_first_of(kEnds, at_), text_.size());
    }
  } while (depth != 0);
}

}  // namespace puna
