// A token for a vocabulary at random.
#pragma once

#include <random>
#include <string>
#include <vector>

// One over three letters: joined from two that are there, as a training would, of `tokens`, the
// first 256 of which are single bytes; or made up, which then may not come about by merging.
inline std::string random_token(std::mt19937& random, const std::vector<std::string>& tokens,
                                bool made_up) {
  std::string token;
  if (made_up && random() % 3 == 0) {
    for (size_t n = 2 + random() % 4; n > 0; --n) token += "abc"[random() % 3];
  } else {
    const auto part = [&] {
      const size_t merged = tokens.size() - 256;
      return merged > 0 && random() % 2 ? tokens[256 + random() % merged]
                                        : std::string(1, "abc"[random() % 3]);
    };
    token = part() + part();
  }
  return token;
}
