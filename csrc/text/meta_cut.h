// The cuts that Meta's own tokenizer makes in long texts before it encodes the parts one by one.
#pragma once

#include <cstdint>
#include <string_view>

namespace puna {

// Every 400,000 characters; and within those, counted anew in each, where more than 25,000 follow
// one another that are all white space or all none. White space is that of Python's str.isspace().
class MetaCutter {
 public:
  static constexpr int64_t kCharacters = 400'000, kRun = 25'000;

  // How many bytes of the text that comes next are before the next cut; all if there is none among
  // them. The text is valid UTF-8. Goes on from there with the next call.
  size_t before_cut(std::string_view text);

 private:
  int64_t characters_ = 0, run_ = 0;
  bool in_space_ = false;
};

}  // namespace puna
