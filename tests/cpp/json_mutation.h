// Mutations of JSON texts that know its structure: numbers to their extremes, members dropped,
// doubled and exchanged, values of other types, deep nesting; and damage that knows nothing.
#pragma once

#include <algorithm>
#include <random>
#include <string>
#include <string_view>
#include <vector>

namespace json_mutation {

struct Span {
  size_t begin = 0, end = 0;
};

// Where the values and the members ("key": value) of a text lie, as far as it is JSON.
class Structure {
 public:
  explicit Structure(std::string_view text) : text_(text) { value(0); }
  std::vector<Span> values, members;

 private:
  static constexpr int kMaxDepth = 200;

  bool value(int depth) {
    skip();
    if (at_ >= text_.size() || depth > kMaxDepth) return false;
    const size_t begin = at_;
    const char c = text_[at_];
    if (c == '{' || c == '[') {
      if (!items(c == '{', depth)) return false;
    } else if (c == '"') {
      if (!string()) return false;
    } else {
      at_ = std::min(text_.find_first_of(",]} \n", at_), text_.size());
      if (at_ == begin) return false;
    }
    values.push_back({begin, at_});
    return true;
  }

  bool items(bool object, int depth) {
    ++at_;
    skip();
    if (take(object ? '}' : ']')) return true;
    do {
      skip();
      const size_t begin = at_;
      if (object && !(string() && (skip(), take(':')))) return false;
      if (!value(depth + 1)) return false;
      if (object) members.push_back({begin, at_});
      skip();
    } while (take(','));
    return take(object ? '}' : ']');
  }

  bool string() {
    if (!take('"')) return false;
    for (; at_ < text_.size(); ++at_) {
      if (text_[at_] == '\\') {
        ++at_;
      } else if (text_[at_] == '"') {
        ++at_;
        return true;
      }
    }
    return false;
  }

  bool take(char c) {
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  void skip() { at_ = std::min(text_.find_first_not_of(" \n\r\t", at_), text_.size()); }

  std::string_view text_;
  size_t at_ = 0;
};

inline const std::vector<std::string>& extremes() {
  static const std::vector<std::string> all = {"0",
                                               "1",
                                               "2",
                                               "3",
                                               "4",
                                               "5",
                                               "7",
                                               "8",
                                               "16",
                                               "17",
                                               "255",
                                               "4096",
                                               "65536",
                                               "65537",
                                               "16777216",
                                               "16777217",
                                               "-1",
                                               "-0",
                                               "-0.0",
                                               "0.5",
                                               "1e-5",
                                               "1e-320",
                                               "1e300",
                                               "1e400",
                                               "-1e400",
                                               "1.5",
                                               "4.0",
                                               "NaN",
                                               "Infinity",
                                               "-Infinity",
                                               "2147483647",
                                               "2147483648",
                                               "4294967295",
                                               "4294967296",
                                               "1099511627776",
                                               "1099511627777",
                                               "4611686018427387904",
                                               "9223372036854775807",
                                               "9223372036854775808",
                                               "18446744073709551615",
                                               "18446744073709551616",
                                               "-9223372036854775808",
                                               "99999999999999999999999999999999"};
  return all;
}

inline const std::vector<std::string>& others() {
  static const std::vector<std::string> all = {"null",
                                               "true",
                                               "false",
                                               "\"\"",
                                               "[]",
                                               "{}",
                                               "[0]",
                                               "[1,1]",
                                               "[null]",
                                               "[[]]",
                                               "{\"a\":0}",
                                               "\"4\"",
                                               "\"\\u0000\"",
                                               "[0,1,2,3]",
                                               "[1,1,1,0]",
                                               "[4,4]",
                                               "\"default\"",
                                               "\"llama3\"",
                                               "\"F64\"",
                                               "\"U8\"",
                                               "\"BF16\"",
                                               "\"../x.safetensors\"",
                                               "\"/etc/passwd\"",
                                               "\"model.safetensors\"",
                                               "\"chunked_attention\"",
                                               "[\"full_attention\"]",
                                               "\"\xc3\xa9\"",
                                               "\"\xff\""};
  return all;
}

class Mutator {
 public:
  explicit Mutator(uint32_t seed) : random_(seed) {}

  size_t below(size_t bound) { return bound ? random_() % bound : 0; }

  // One to three changes.
  std::string mutated(std::string text) {
    for (size_t left = 1 + below(3) * below(2); left > 0; --left) text = changed(text);
    return text;
  }

 private:
  template <class Item>
  const Item& one_of(const std::vector<Item>& all) {
    return all[below(all.size())];
  }

  static std::string replaced(std::string text, Span place, std::string_view by) {
    return text.replace(place.begin, place.end - place.begin, by);
  }

  static std::string exchanged(const std::string& text, Span a, Span b) {
    if (a.begin > b.begin) std::swap(a, b);
    if (a.end > b.begin) return text;  // one holds the other
    return text.substr(0, a.begin) + text.substr(b.begin, b.end - b.begin) +
           text.substr(a.end, b.begin - a.end) + text.substr(a.begin, a.end - a.begin) +
           text.substr(b.end);
  }

  std::string changed(const std::string& text) {
    const Structure structure(text);
    if (structure.values.empty() || structure.members.empty() || below(12) == 0) {
      return damaged(text);
    }
    const Span value = one_of(structure.values), member = one_of(structure.members);
    switch (below(9)) {
      case 0:
      case 1:
      case 2: {  // a number to an extreme, or near to what it was
        std::vector<Span> numbers;
        for (const Span& span : structure.values) {
          const char c = text[span.begin];
          if (c == '-' || (c >= '0' && c <= '9')) numbers.push_back(span);
        }
        if (numbers.empty()) return text;
        const Span number = one_of(numbers);
        const std::string digits = text.substr(number.begin, number.end - number.begin);
        if (digits.size() < 10 && digits.find_first_not_of("0123456789") == std::string::npos &&
            below(3) == 0) {
          const long near = std::stol(digits) + static_cast<long>(below(5)) - 2;
          return replaced(text, number, std::to_string(near));
        }
        return replaced(text, number, one_of(extremes()));
      }
      case 3:
        return replaced(text, value, one_of(others()));
      case 4:
        return exchanged(text, value, one_of(structure.values));
      case 5:
        return exchanged(text, member, one_of(structure.members));
      case 6: {  // a member dropped, and the comma with it
        size_t end = member.end, begin = member.begin;
        const size_t next = text.find_first_not_of(" \n", end);
        const size_t before =
            begin == 0 ? std::string::npos : text.find_last_not_of(" \n", begin - 1);
        if (next != std::string::npos && text[next] == ',') {
          end = next + 1;
        } else if (before != std::string::npos && text[before] == ',') {
          begin = before;
        }
        return replaced(text, {begin, end}, "");
      }
      case 7: {  // a member doubled, here or under another name, perhaps with another value
        std::string twin = text.substr(member.begin, member.end - member.begin);
        if (below(2)) twin.insert(1, "x");
        return replaced(text, {member.end, member.end}, "," + twin);
      }
      default: {  // nesting
        const size_t depth = below(4) ? below(8) : below(100'000);
        const bool object = below(2) == 0;
        std::string open, close;
        for (size_t i = 0; i < depth; ++i) open += object ? "{\"a\":" : "[";
        close.assign(depth, object ? '}' : ']');
        return replaced(text, value,
                        open + text.substr(value.begin, value.end - value.begin) + close);
      }
    }
  }

  std::string damaged(std::string text) {
    if (text.empty()) return text;
    const size_t at = below(text.size());
    const size_t length = std::min(text.size() - at, below(40));
    switch (below(4)) {
      case 0:
        text[at] = static_cast<char>(random_());
        break;
      case 1:
        text.erase(at, length);
        break;
      case 2:
        text.insert(at, text.substr(below(text.size()), length));
        break;
      default:
        text.resize(at);
        break;
    }
    return text;
  }

  std::mt19937 random_;
};

}  // namespace json_mutation
