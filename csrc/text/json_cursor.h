// Reads JSON text from front to back, without a tree of values: for lists of a million names.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <string_view>

namespace puna {

// Each function reads the value that comes next and throws ModelFormat if it is not of that kind.
// Where they skip a value, they look at its strings and brackets only: a text is JSON if what they
// return is what it should be and a parser takes the text with something else in its place.
class JsonCursor {
 public:
  // `where` names the text in messages.
  JsonCursor(std::string_view text, const char* where) : text_(text), where_(where) {}

  // How much of the text has been read. next() is the character behind it and any white space, 0 at
  // the end.
  size_t at() const { return at_; }
  char next();

  // Calls member(name) for each of an object, or element() for each of an array; they must read the
  // value.
  template <class Member>
  void object(const Member& member);
  template <class Element>
  void array(const Element& element);
  // Lives as long as the text and the cursor.
  std::string_view string();
  // Nothing if it is negative, has a fraction or an exponent, or needs more than 64 bits. Then it
  // is not read.
  std::optional<uint64_t> whole_number();
  void skip();

 private:
  bool take(char wanted);
  void expect(char wanted);
  // From the quotation mark on; returns whether an escape is among it.
  bool skip_string();
  [[noreturn]] void refuse(const char* wanted) const;

  std::string_view text_;
  const char* where_;
  size_t at_ = 0;
  std::deque<std::string> unescaped_;  // strings that are not in the text as they are
};

template <class Member>
void JsonCursor::object(const Member& member) {
  expect('{');
  if (take('}')) return;
  do {
    const std::string_view name = string();
    expect(':');
    member(name);
  } while (take(','));
  expect('}');
}

template <class Element>
void JsonCursor::array(const Element& element) {
  expect('[');
  if (take(']')) return;
  do {
    element();
  } while (take(','));
  expect(']');
}

}  // namespace puna
