// Sealed pages: where each code lies, how far a value may come back from where it was, and what
// happens at the ends of the range.
#include "backend/kv_seal.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <vector>

#include "base/half.h"
#include "check.h"

using namespace puna;

namespace {

constexpr KvSeal kFormats[] = {KvSeal::kInt8, KvSeal::kInt4};

// An open page, and what it is sealed into.
struct Pair {
  KvPageLayout open;
  KvSealedLayout sealed;
  std::vector<char> open_page, page;

  Pair(DType dtype, KvSeal format, int64_t kv_heads, int64_t head_dim)
      : open{dtype, kv_heads, head_dim},
        sealed{format, kv_heads, head_dim},
        open_page(open.page_bytes()),
        page(sealed.page_bytes(), 'x') {}

  // value(head, token, channel, is a value)
  template <class Value>
  void fill(Value value) {
    for (int64_t head = 0; head < open.kv_heads; ++head)
      for (int64_t t = 0; t < kPageTokens; ++t)
        for (int64_t c = 0; c < open.head_dim; ++c) {
          put(open.key_offset(head), open.key_index(t, c), value(head, t, c, false));
          put(open.value_offset(head), open.value_index(t, c), value(head, t, c, true));
        }
  }
  void put(size_t offset, int64_t index, float value) {
    if (open.dtype == DType::kF32) {
      reinterpret_cast<float*>(open_page.data() + offset)[index] = value;
    } else {
      reinterpret_cast<uint16_t*>(open_page.data() + offset)[index] = bf16_of_float(value);
    }
  }
  float got(size_t offset, int64_t index) const {
    return open.dtype == DType::kF32
               ? reinterpret_cast<const float*>(open_page.data() + offset)[index]
               : float_of_bf16(reinterpret_cast<const uint16_t*>(open_page.data() + offset)[index]);
  }
  float key(int64_t head, int64_t t, int64_t c) const {
    return got(open.key_offset(head), open.key_index(t, c));
  }
  float value(int64_t head, int64_t t, int64_t c) const {
    return got(open.value_offset(head), open.value_index(t, c));
  }
  void seal() {
    for (int64_t head = 0; head < open.kv_heads; ++head)
      seal_head(page.data(), sealed, open_page.data(), open, head);
  }
};

// Half a scale. The scale is at most (most - least + the rounding of zero) / levels * (1 + 2^-7),
// bfloat16 having 8 bits; zero is off by less than 2^-7 of its size. The quotient and its rounding
// add a few roundings of fp32 to the code.
double bound(double least, double most, int bits) {
  const double levels = (1 << bits) - 1;
  const double range = (most - least) + std::fabs(least) * 0x1p-7 + 0x1p-133;
  return (0.5 + (1 << bits) * 0x1p-22) * range / levels * (1 + 0x1p-7) + 0x1p-133;
}

}  // namespace

TEST(places_are_distinct_and_fill_the_lines) {
  for (const KvSeal format : kFormats)
    for (const int64_t head_dim : {32, 64, 128}) {
      const KvSealedLayout layout{format, 1, head_dim};
      std::set<std::pair<int64_t, int>> keys, values;
      for (int64_t t = 0; t < kPageTokens; ++t)
        for (int64_t c = 0; c < head_dim; ++c) {
          const auto key = layout.key_code(t, c), value = layout.value_code(t, c);
          CHECK(key.byte >= 0 && key.byte < static_cast<int64_t>(layout.plane_bytes()));
          CHECK(value.byte >= 0 && value.byte < static_cast<int64_t>(layout.code_bytes()));
          keys.insert({key.byte, key.shift});
          values.insert({value.byte, value.shift});
        }
      CHECK_EQ(keys.size(), static_cast<size_t>(kPageTokens * head_dim));
      CHECK_EQ(values.size(), static_cast<size_t>(kPageTokens * head_dim));
    }
}

TEST(regions_follow_each_other) {
  for (const KvSeal format : kFormats)
    for (const int64_t head_dim : {1, 20, 100, 128})
      for (const int64_t heads : {1, 3, 8}) {
        const KvSealedLayout layout{format, heads, head_dim};
        CHECK_EQ(layout.upper_offset(0), size_t{0});
        if (format == KvSeal::kInt8) CHECK_EQ(layout.lower_offset(0), layout.upper_offset(heads));
        CHECK_EQ(layout.value_offset(0),
                 format == KvSeal::kInt8 ? layout.lower_offset(heads) : layout.upper_offset(heads));
        CHECK_EQ(layout.key_scale_offset(0), layout.value_offset(heads));
        CHECK_EQ(layout.value_scale_offset(0), layout.key_scale_offset(heads));
        CHECK(layout.page_bytes() >= layout.value_scale_offset(heads));
        CHECK_EQ(layout.page_bytes() % 4096, size_t{0});
        CHECK_EQ(layout.value_offset(0) % 4096, size_t{0});
      }
  // Of Scout: a byte or half a byte per element, and 1.5 KiB of scales per head.
  CHECK_EQ((KvSealedLayout{KvSeal::kInt8, 8, 128}.page_bytes()), size_t{8 * (65536 + 1536)});
  CHECK_EQ((KvSealedLayout{KvSeal::kInt4, 8, 128}.page_bytes()), size_t{8 * (32768 + 1536)});
}

TEST(values_come_back_within_half_a_scale) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (const KvSeal format : kFormats)
    for (const DType dtype : {DType::kBF16, DType::kF32})
      for (int64_t heads = 1; heads <= 8; ++heads) {
        const int64_t head_dim = std::vector<int64_t>{128, 1, 7, 20, 32, 64, 88, 100}[heads - 1];
        Pair pair(dtype, format, heads, head_dim);
        // Channels of very different size and offset, as keys have; some of one sign.
        pair.fill([&](int64_t, int64_t, int64_t c, bool) {
          return std::ldexp(normal(random), static_cast<int>(c % 5) * 7 - 14) +
                 static_cast<float>(c % 3) * 3;
        });
        pair.seal();
        int64_t far = 0;
        const auto check = [&](double got, float value, float least, float most) {
          far += !(std::fabs(got - value) <= bound(least, most, pair.sealed.bits()));
        };
        for (int64_t h = 0; h < heads; ++h) {
          for (int64_t c = 0; c < head_dim; ++c) {
            float least = pair.key(h, 0, c), most = least;
            for (int64_t t = 0; t < kPageTokens; ++t) {
              least = std::min(least, pair.key(h, t, c));
              most = std::max(most, pair.key(h, t, c));
            }
            for (int64_t t = 0; t < kPageTokens; ++t)
              check(sealed_key(pair.page.data(), pair.sealed, h, t, c), pair.key(h, t, c), least,
                    most);
          }
          for (int64_t t = 0; t < kPageTokens; ++t) {
            float least = pair.value(h, t, 0), most = least;
            for (int64_t c = 0; c < head_dim; ++c) {
              least = std::min(least, pair.value(h, t, c));
              most = std::max(most, pair.value(h, t, c));
            }
            for (int64_t c = 0; c < head_dim; ++c)
              check(sealed_value(pair.page.data(), pair.sealed, h, t, c), pair.value(h, t, c),
                    least, most);
          }
        }
        CHECK_EQ(far, 0);
      }
}

TEST(constants_come_back_exactly) {
  for (const KvSeal format : kFormats) {
    Pair pair(DType::kBF16, format, 2, 33);
    pair.fill([](int64_t h, int64_t t, int64_t c, bool value) {
      return static_cast<float>(value ? t - 100 : c - 16) * (h ? 1e-38f : 0.375f);
    });
    pair.seal();
    int64_t wrong = 0;
    for (int64_t h = 0; h < 2; ++h)
      for (int64_t t = 0; t < kPageTokens; ++t)
        for (int64_t c = 0; c < 33; ++c) {
          wrong += sealed_key(pair.page.data(), pair.sealed, h, t, c) != pair.key(h, t, c);
          wrong += sealed_value(pair.page.data(), pair.sealed, h, t, c) != pair.value(h, t, c);
        }
    CHECK_EQ(wrong, 0);
  }
}

// The balanced signs of a code, +-c, are both ends of their range.
TEST(the_ends_of_a_range_are_codes) {
  for (const KvSeal format : kFormats) {
    Pair pair(DType::kBF16, format, 1, 64);
    pair.fill([](int64_t, int64_t t, int64_t c, bool) { return (t ^ c) & 1 ? 3.0f : -3.0f; });
    pair.seal();
    double worst = 0;
    for (int64_t t = 0; t < kPageTokens; ++t)
      for (int64_t c = 0; c < 64; ++c)
        worst = std::max(worst, std::fabs(sealed_key(pair.page.data(), pair.sealed, 0, t, c) -
                                          pair.key(0, t, c)));
    CHECK(worst <= bound(-3, 3, pair.sealed.bits()));
  }
}

TEST(what_is_not_finite_stays_visible) {
  const float bad[] = {std::numeric_limits<float>::quiet_NaN(),
                       std::numeric_limits<float>::infinity(),
                       -std::numeric_limits<float>::infinity()};
  for (const KvSeal format : kFormats)
    for (const float value : bad) {
      Pair pair(DType::kBF16, format, 1, 40);
      pair.fill([&](int64_t, int64_t t, int64_t c, bool) {
        return t == 77 && c == 33 ? value : static_cast<float>(t + c);
      });
      pair.seal();
      // The whole channel of keys and the whole token of values, and nothing else.
      int64_t wrong = 0;
      for (int64_t t = 0; t < kPageTokens; ++t)
        for (int64_t c = 0; c < 40; ++c) {
          wrong += std::isnan(sealed_key(pair.page.data(), pair.sealed, 0, t, c)) != (c == 33);
          wrong += std::isnan(sealed_value(pair.page.data(), pair.sealed, 0, t, c)) != (t == 77);
        }
      CHECK_EQ(wrong, 0);
    }
  // Large numbers are no worse than others as long as their range is one of fp32.
  for (const KvSeal format : kFormats) {
    Pair pair(DType::kF32, format, 1, 4);
    pair.fill([](int64_t, int64_t t, int64_t c, bool) { return (t + c) % 2 ? 1e38f : -1e38f; });
    pair.seal();
    CHECK(std::fabs(sealed_key(pair.page.data(), pair.sealed, 0, 0, 1) - 1e38f) <=
          bound(-1e38, 1e38, pair.sealed.bits()));
  }
}

TEST(a_page_is_a_function_of_its_contents) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  for (const KvSeal format : kFormats)
    for (const int64_t head_dim : {5, 128}) {
      Pair a(DType::kBF16, format, 3, head_dim);
      a.fill([&](int64_t, int64_t, int64_t, bool) { return normal(random); });
      Pair b = a;
      std::memset(b.page.data(), 0xa5, b.page.size());
      a.seal();
      b.seal();
      CHECK(a.page == b.page);
    }
}
