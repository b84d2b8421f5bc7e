// The attention kernels of every instruction set this machine can run: against softmax in double,
// and bit for bit whatever rows are computed together and whatever lies beyond the visible tokens.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "backend/kv_layout.h"
#include "base/half.h"
#include "check.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/kernel_table.h"

namespace {

using puna::AttendPage;
using puna::KernelTable;
using puna::kKeyBlock;

static_assert(puna::kKeyBlockTokens == puna::kKeyBlock);

std::vector<KernelTable> runnable_isas() {
  std::vector<KernelTable> tables;
  for (const KernelTable* isa : puna::compiled_isas()) {
    if (isa->supported()) tables.push_back(puna::resolve_isa(isa->isa));
  }
  return tables;
}

struct Float32 {
  using Element = float;
  static Element narrow(float value) { return value; }
  static double wide(Element value) { return value; }
  static auto attend(const KernelTable& table) { return table.attend_page_f32; }
};
struct BFloat16 {
  using Element = uint16_t;
  static Element narrow(float value) { return puna::bf16_of_float(value); }
  static double wide(Element value) { return puna::float_of_bf16(value); }
  static auto attend(const KernelTable& table) { return table.attend_page_bf16; }
};

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// One page of one head, exactly as large as the kernel may read.
template <class Type>
struct Page {
  using Element = typename Type::Element;
  int64_t tokens, head_dim;
  std::vector<Element> k, v;

  template <class Next>
  Page(int64_t tokens, int64_t head_dim, Next next)
      : tokens(tokens),
        head_dim(head_dim),
        k(round_up(tokens, kKeyBlock) * head_dim),
        v(tokens * head_dim) {
    for (Element& element : k) element = Type::narrow(next());
    for (Element& element : v) element = Type::narrow(next());
  }

  size_t key_index(int64_t token, int64_t channel) const {
    return puna::KvPageLayout{.head_dim = head_dim}.key_index(token, channel);
  }

  // Overwrites what no row may notice: every token from `first` on.
  template <class Next>
  void spoil(int64_t first, Next next) {
    for (int64_t t = first; t < round_up(tokens, kKeyBlock); ++t) {
      for (int64_t c = 0; c < head_dim; ++c) {
        k[key_index(t, c)] = Type::narrow(next());
        if (t < tokens) v[t * head_dim + c] = Type::narrow(next());
      }
    }
  }
};

struct Queries {
  int64_t rows, head_dim, stride;
  std::vector<float> q;  // NaN between the rows

  template <class Next>
  Queries(int64_t rows, int64_t head_dim, Next next)
      : rows(rows),
        head_dim(head_dim),
        stride(head_dim + 3),
        q(rows * stride, std::numeric_limits<float>::quiet_NaN()) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < head_dim; ++c) q[r * stride + c] = next();
    }
  }
};

struct State {
  std::vector<float> m, l, o;
  State(int64_t rows, int64_t head_dim)
      : m(rows, -std::numeric_limits<float>::infinity()), l(rows, 0.0f), o(rows * head_dim, 0.0f) {}

  bool same_row(int64_t row, const State& other, int64_t other_row) const {
    const size_t head_dim = o.size() / m.size();
    const auto same = [](float a, float b) {
      return puna::bits_of_float(a) == puna::bits_of_float(b);
    };
    bool equal = same(m[row], other.m[other_row]) && same(l[row], other.l[other_row]);
    for (size_t c = 0; c < head_dim; ++c) {
      equal &= same(o[row * head_dim + c], other.o[other_row * head_dim + c]);
    }
    return equal;
  }
};

// Rows [first, first + count) of the queries; `visible` and `state` belong to these rows.
template <class Type>
void attend(const KernelTable& table, const Queries& queries, int64_t first, int64_t count,
            const std::vector<int32_t>& visible, const Page<Type>& page, State& state) {
  std::vector<float> scores(count * round_up(page.tokens, kKeyBlock),
                            std::numeric_limits<float>::quiet_NaN());
  AttendPage call = {};
  call.q = queries.q.data() + first * queries.stride;
  call.q_stride = queries.stride;
  call.visible = visible.data();
  call.k = page.k.data();
  call.v = page.v.data();
  call.rows = static_cast<int32_t>(count);
  call.head_dim = static_cast<int32_t>(page.head_dim);
  call.tokens = static_cast<int32_t>(page.tokens);
  call.m = state.m.data();
  call.l = state.l.data();
  call.o = state.o.data();
  call.scores = scores.data();
  Type::attend(table)(call);
}

// Checks one row, which has seen the first visible[i] tokens of pages[i], against double.
template <class Type>
void check_row(const KernelTable& table, const Queries& queries, int64_t row,
               const std::vector<Page<Type>>& pages, const std::vector<int32_t>& visible,
               const State& state) {
  const int64_t dim = queries.head_dim;
  const float* q = queries.q.data() + row * queries.stride;
  std::vector<double> scores;
  double score_error = 0, largest_value = 0, top = -std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < pages.size(); ++i) {
    for (int64_t t = 0; t < visible[i]; ++t) {
      double sum = 0, magnitude = 0;
      for (int64_t c = 0; c < dim; ++c) {
        const double term = q[c] * Type::wide(pages[i].k[pages[i].key_index(t, c)]);
        sum += term;
        magnitude += std::fabs(term);
        largest_value = std::max(largest_value, std::fabs(Type::wide(pages[i].v[t * dim + c])));
      }
      scores.push_back(sum);
      top = std::max(top, sum);
      // As in a product: dim roundings of partial sums, walking at random.
      score_error = std::max(score_error,
                             (8 + 4 * std::sqrt(static_cast<double>(dim))) * 0x1p-24 * magnitude);
    }
  }
  if (scores.empty()) {
    CHECK_EQ(state.l[row], 0.0f);
    CHECK(state.m[row] == -std::numeric_limits<float>::infinity());
    return;
  }
  double sum = 0;
  std::vector<double> out(dim, 0.0);
  size_t index = 0;
  for (size_t i = 0; i < pages.size(); ++i) {
    for (int64_t t = 0; t < visible[i]; ++t) {
      const double weight = std::exp(scores[index++] - top);
      sum += weight;
      for (int64_t c = 0; c < dim; ++c) out[c] += weight * Type::wide(pages[i].v[t * dim + c]);
    }
  }
  // A weight exp(s - m) is off by the error of s and of m, by the rounding of s - m (at most 2^-24
  // of the spread of the scores) and by exp itself (4e-7); rescaling by page adds as much once
  // more. The sums over tokens add sqrt(tokens) roundings.
  const double spread = top - *std::min_element(scores.begin(), scores.end());
  const double relative = 4 * score_error + 2 * (0x1p-24 * spread + 4e-7) +
                          4 * std::sqrt(static_cast<double>(scores.size())) * 0x1p-24;
  const std::string where = std::string(table.isa) + " row " + std::to_string(row) + " of " +
                            std::to_string(queries.rows) + ", head_dim " + std::to_string(dim) +
                            ", " + std::to_string(scores.size()) + " tokens";
  check::report(std::fabs(state.m[row] - top) <= score_error, __FILE__, __LINE__, where + ": m");
  const double log_sum = std::log(sum) + top, got = std::log(state.l[row]) + state.m[row];
  check::report(std::fabs(got - log_sum) <= relative + score_error, __FILE__, __LINE__,
                where + ": l");
  double worst = 0;
  for (int64_t c = 0; c < dim; ++c) {
    const double error = std::fabs(state.o[row * dim + c] / state.l[row] - out[c] / sum);
    worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : std::max(worst, error);
  }
  check::report(worst <= 2 * relative * largest_value, __FILE__, __LINE__,
                where + ": o is off by " + std::to_string(worst));
}

struct Draw {
  std::mt19937_64 random;
  std::normal_distribution<float> normal;
  explicit Draw(uint64_t seed) : random(seed) {}

  int64_t integer(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  }
  float real() { return normal(random); }
  // Finite, huge and of either sign: products with it overflow and cancel to NaN.
  float garbage() { return (integer(0, 1) ? 1.0f : -1.0f) * 3.0e38f; }
  // As in a causal prompt, or all different.
  std::vector<int32_t> visible(int64_t rows, int64_t tokens) {
    std::vector<int32_t> seen(rows);
    const int64_t kind = integer(0, 2), start = integer(-20, tokens), group = integer(1, 5);
    for (int64_t r = 0; r < rows; ++r) {
      if (kind == 0) seen[r] = static_cast<int32_t>(tokens);
      if (kind == 1) seen[r] = static_cast<int32_t>(integer(0, tokens));
      if (kind == 2) {
        seen[r] = static_cast<int32_t>(std::clamp<int64_t>(start + r / group, 0, tokens));
      }
    }
    return seen;
  }
};

template <class Body>
void for_each_shape(Draw& draw, Body body) {
  for (int64_t head_dim : {16, 64, 88, 128, 1, 7, 20, 100}) {
    for (int i = 0; i < 6; ++i) body(draw.integer(1, 40), head_dim, draw.integer(1, 256));
    body(5, head_dim, 256);
  }
}

template <class Type>
void check_against_double() {
  Draw draw(1);
  for (const KernelTable& table : runnable_isas()) {
    for_each_shape(draw, [&](int64_t rows, int64_t head_dim, int64_t tokens) {
      // Scores of about four: softmax neither flat nor one-hot.
      const float scale = 4.0f / std::sqrt(static_cast<float>(head_dim));
      const Queries queries(rows, head_dim, [&] { return scale * draw.real(); });
      State state(rows, head_dim);
      std::vector<Page<Type>> pages;
      std::vector<std::vector<int32_t>> visible(rows);
      for (int page = 0; page < 3; ++page) {
        pages.emplace_back(page == 1 ? tokens : draw.integer(1, 256), head_dim,
                           [&] { return draw.real(); });
        const std::vector<int32_t> seen = draw.visible(rows, pages.back().tokens);
        attend(table, queries, 0, rows, seen, pages.back(), state);
        for (int64_t r = 0; r < rows; ++r) visible[r].push_back(seen[r]);
      }
      for (int64_t r = 0; r < rows; ++r) check_row(table, queries, r, pages, visible[r], state);
    });
  }
}
TEST(attend_f32_agrees_with_double) { check_against_double<Float32>(); }
TEST(attend_bf16_agrees_with_double) { check_against_double<BFloat16>(); }

template <class Type>
void check_rows_are_independent() {
  Draw draw(2);
  for (const KernelTable& table : runnable_isas()) {
    for_each_shape(draw, [&](int64_t rows, int64_t head_dim, int64_t tokens) {
      const Queries queries(rows, head_dim, [&] { return draw.real(); });
      const Page<Type> page(tokens, head_dim, [&] { return draw.real(); });
      const std::vector<int32_t> visible = draw.visible(rows, tokens);
      State all(rows, head_dim);
      attend(table, queries, 0, rows, visible, page, all);
      for (int trial = 0; trial < 8; ++trial) {
        const int64_t first = draw.integer(0, rows - 1);
        const int64_t count = trial < 4 ? 1 : draw.integer(1, rows - first);
        State some(count, head_dim);
        attend(table, queries, first, count,
               {visible.begin() + first, visible.begin() + first + count}, page, some);
        for (int64_t r = 0; r < count; ++r) CHECK(some.same_row(r, all, first + r));
      }
    });
  }
}
TEST(attend_f32_rows_are_independent) { check_rows_are_independent<Float32>(); }
TEST(attend_bf16_rows_are_independent) { check_rows_are_independent<BFloat16>(); }

template <class Type>
void check_hidden_tokens_do_not_matter() {
  Draw draw(3);
  for (const KernelTable& table : runnable_isas()) {
    for_each_shape(draw, [&](int64_t rows, int64_t head_dim, int64_t tokens) {
      const Queries queries(rows, head_dim, [&] { return draw.real(); });
      Page<Type> page(tokens, head_dim, [&] { return draw.real(); });
      const std::vector<int32_t> visible = draw.visible(rows, tokens);
      // A state that has seen something already; negative zeros must survive, too.
      State before(rows, head_dim);
      for (int64_t r = 0; r < rows; ++r) {
        before.m[r] = draw.real();
        before.l[r] = 1 + std::fabs(draw.real());
        for (int64_t c = 0; c < head_dim; ++c) {
          before.o[r * head_dim + c] = c % 3 ? draw.real() : -0.0f;
        }
      }
      State expected = before;
      attend(table, queries, 0, rows, visible, page, expected);
      for (int64_t r = 0; r < rows; ++r) {
        if (visible[r] == 0) CHECK(expected.same_row(r, before, r));
      }
      // What no row sees becomes garbage, and so does the rest of a page cut after the last token.
      page.spoil(*std::max_element(visible.begin(), visible.end()), [&] { return draw.garbage(); });
      State spoilt = before;
      attend(table, queries, 0, rows, visible, page, spoilt);
      for (int64_t r = 0; r < rows; ++r) CHECK(spoilt.same_row(r, expected, r));
      // The same for one row, beside a neighbour that sees all the garbage.
      page.spoil(visible[0], [&] { return draw.garbage(); });
      std::vector<int32_t> everything(rows, static_cast<int32_t>(tokens));
      everything[0] = visible[0];
      spoilt = before;
      attend(table, queries, 0, rows, everything, page, spoilt);
      CHECK(spoilt.same_row(0, expected, 0));
    });
  }
}
TEST(attend_f32_ignores_hidden_tokens) { check_hidden_tokens_do_not_matter<Float32>(); }
TEST(attend_bf16_ignores_hidden_tokens) { check_hidden_tokens_do_not_matter<BFloat16>(); }

TEST(attend_takes_scores_of_any_size) {
  // exp must neither overflow nor lose the largest weight: token t scores 1000 t.
  for (const KernelTable& table : runnable_isas()) {
    const int64_t head_dim = 16, tokens = 40;
    const Queries queries(1, head_dim, [] { return 1.0f; });
    int64_t drawn = 0;
    Page<Float32> page(tokens, head_dim, [&] { return static_cast<float>(drawn++ % 97); });
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t c = 0; c < head_dim; ++c) page.k[page.key_index(t, c)] = 62.5f * t;
    }
    State state(1, head_dim);
    attend(table, queries, 0, 1, {static_cast<int32_t>(tokens)}, page, state);
    CHECK_EQ(state.m[0], 1000.0f * (tokens - 1));
    CHECK_EQ(state.l[0], 1.0f);
    for (int64_t c = 0; c < head_dim; ++c) {
      CHECK_EQ(state.o[c], page.v[(tokens - 1) * head_dim + c]);
    }
  }
}

}  // namespace
