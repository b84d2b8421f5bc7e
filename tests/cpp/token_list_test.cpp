// Lists of token ids against plain vectors: what copies share, and that they stay apart.
#include "base/token_list.h"

#include <cstdint>
#include <random>

#include "check.h"

using namespace puna;

namespace {

struct Pair {
  TokenList list;
  std::vector<int32_t> plain;
};

std::vector<int32_t> all_of(const TokenList& list) {
  std::vector<int32_t> tokens;
  list.copy_to(tokens, 0, list.size());
  return tokens;
}

}  // namespace

TEST(lists_are_what_plain_vectors_are) {
  std::mt19937 random(7);
  const auto below = [&](int64_t n) {
    return static_cast<int64_t>(random() % static_cast<uint64_t>(n));
  };
  std::vector<Pair> pairs(1);
  for (int step = 0; step < 3000; ++step) {
    const size_t i = random() % pairs.size();
    switch (random() % 4) {
      case 0: {
        std::vector<int32_t> more(random() % 6000);
        for (int32_t& token : more) token = static_cast<int32_t>(random() % 3);
        pairs[i].list.append(more);
        pairs[i].plain.insert(pairs[i].plain.end(), more.begin(), more.end());
        break;
      }
      case 1:
        pairs[i].list.push_back(step);
        pairs[i].plain.push_back(step);
        break;
      case 2: {
        const int64_t size = below(pairs[i].list.size() + 1);
        pairs[i].list.truncate(size);
        pairs[i].plain.resize(static_cast<size_t>(size));
        break;
      }
      default: {
        const Pair copy = pairs[i];
        if (pairs.size() < 8)
          pairs.push_back(copy);
        else
          pairs[random() % pairs.size()] = copy;
      }
    }
    const Pair &a = pairs[random() % pairs.size()], &b = pairs[random() % pairs.size()];
    CHECK_EQ(a.list.size(), static_cast<int64_t>(a.plain.size()));
    if (step % 50 == 0) CHECK(all_of(a.list) == a.plain);
    size_t common = 0;
    while (common < std::min(a.plain.size(), b.plain.size()) && a.plain[common] == b.plain[common])
      ++common;
    CHECK_EQ(a.list.common_length(b.list), static_cast<int64_t>(common));
    if (a.plain.empty()) continue;
    const int64_t at = below(a.list.size()), count = below(a.list.size() - at + 1);
    CHECK_EQ(a.list[at], a.plain[static_cast<size_t>(at)]);
    std::vector<int32_t> part{-1};
    a.list.copy_to(part, at, count);
    CHECK(std::equal(part.begin() + 1, part.end(), a.plain.begin() + at) &&
          static_cast<int64_t>(part.size()) == count + 1);
    int64_t sum = 0, plain_sum = 0;
    a.list.each(at, [&](int32_t token) { sum += token; });
    for (int64_t k = 0; k < at; ++k) plain_sum += a.plain[static_cast<size_t>(k)];
    CHECK_EQ(sum, plain_sum);
  }
}
