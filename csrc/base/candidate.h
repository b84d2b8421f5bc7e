// An element of a row, as a token that may be chosen. Freestanding.
#pragma once

#include <stdint.h>

namespace puna {

struct Candidate {
  float logit;
  int32_t id;
};

// The order in which tokens are likely: of equals the lower id is first.
constexpr bool is_likelier(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

}  // namespace puna
