#include "io/message.h"

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace puna {

namespace {

// Names come out of hostile files: within these bounds a search takes a fraction of a second.
constexpr size_t kLongestName = 256;
constexpr size_t kMostNames = 20'000;

// The bytes of the UTF-8 character that `text` begins with, or 0 if that is no printable character.
size_t character_length(std::string_view text) {
  const auto byte = [&](size_t i) -> uint32_t { return static_cast<unsigned char>(text[i]); };
  const uint32_t lead = byte(0);
  if (lead < 0x80) return lead >= 0x20 && lead != 0x7f ? 1 : 0;
  const size_t length = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
  if (lead < 0xc2 || lead > 0xf4 || text.size() < length) return 0;
  uint32_t code = lead & (0xffu >> (length + 1));
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
    code = code << 6 | (byte(i) & 0x3f);
  }
  constexpr uint32_t kLeast[] = {0, 0, 0xa0, 0x800, 0x10000};  // below 0xa0: control characters
  const bool surrogate = code >= 0xd800 && code < 0xe000;
  return code >= kLeast[length] && code <= 0x10ffff && !surrogate ? length : 0;
}

std::string escaped(std::string_view text) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string out;
  while (!text.empty()) {
    const size_t length = character_length(text);
    if (length > 0) {
      out += text.substr(0, length);
    } else {
      const auto byte = static_cast<unsigned char>(text[0]);
      out += {'\\', 'x', kDigits[byte >> 4], kDigits[byte & 15]};
    }
    text.remove_prefix(std::max<size_t>(length, 1));
  }
  return out;
}

// Levenshtein distance, given up (as `limit`) once it cannot be below `limit`.
size_t edit_distance(const std::string& a, const std::string& b, size_t limit) {
  if (std::max(a.size(), b.size()) - std::min(a.size(), b.size()) >= limit) return limit;
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    size_t least = row[0];
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({replaced, row[j] + 1, row[j - 1] + 1});
      least = std::min(least, row[j]);
    }
    if (least >= limit) return limit;
  }
  return row.back();
}

}  // namespace

std::string printable(std::string_view text, size_t most) {
  if (text.size() <= most) return escaped(text);
  return escaped(text.substr(0, most / 2)) + "..." + escaped(text.substr(text.size() - most / 2));
}

std::string listing(const std::vector<std::string>& names, size_t most) {
  std::string text;
  for (size_t i = 0; i < std::min(most, names.size()); ++i) {
    text += (i ? ", " : "") + printable(names[i]);
  }
  if (names.size() > most) text += " and " + std::to_string(names.size() - most) + " more";
  return text;
}

std::string nearest_name(const std::string& name, const std::vector<std::string>& names) {
  if (name.size() > kLongestName) return "";
  size_t best = name.size() / 2 + 1;
  std::string found;
  for (size_t i = 0; i < std::min(names.size(), kMostNames); ++i) {
    const std::string& candidate = names[i];
    const size_t distance = edit_distance(name, candidate, best);
    if (distance < best) {
      best = distance;
      found = candidate;
    }
  }
  return found;
}

}  // namespace puna
