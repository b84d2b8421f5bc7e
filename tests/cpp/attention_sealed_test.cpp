// Attention over sealed pages, on every instruction set that this machine can run: against softmax
// in double over the values that the codes stand for, row by row independent, and with the same
// bits everywhere where whole numbers are summed.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "backend/kv_seal.h"
#include "base/half.h"
#include "check.h"
#include "kernels/cpu/dispatch.h"

using namespace puna;

namespace {

static_assert(kSealedTokens == kPageTokens);

constexpr double kEps = 0x1p-24;

std::vector<KernelTable> runnable_isas() {
  std::vector<KernelTable> tables;
  for (const KernelTable* isa : compiled_isas()) {
    if (isa->supported()) tables.push_back(resolve_isa(isa->isa));
  }
  return tables;
}

using Random = std::mt19937;

// A sealed page of one head.
struct Page {
  KvSealedLayout layout;
  std::vector<uint8_t> bytes;

  Page(KvSeal format, int64_t head_dim)
      : layout{format, 1, head_dim}, bytes(layout.page_bytes() + 64) {}

  uint8_t* data() { return bytes.data(); }
  const uint8_t* at(size_t offset) const { return bytes.data() + offset; }
  uint16_t* key_scales() {
    return reinterpret_cast<uint16_t*>(data() + layout.key_scale_offset(0));
  }
  uint16_t* value_scales() {
    return reinterpret_cast<uint16_t*>(data() + layout.value_scale_offset(0));
  }
  double key(int64_t t, int64_t c) const { return sealed_key(bytes.data(), layout, 0, t, c); }
  double value(int64_t t, int64_t c) const { return sealed_value(bytes.data(), layout, 0, t, c); }
};

// Keys with channels of their own size and offset, as real ones have.
Page random_page(Random& random, KvSeal format, int64_t head_dim) {
  std::normal_distribution<float> normal;
  const KvPageLayout open{DType::kBF16, 1, head_dim};
  std::vector<uint16_t> page(open.page_bytes() / 2);
  uint16_t *keys = page.data(), *values = page.data() + open.value_offset(0) / 2;
  for (int64_t c = 0; c < head_dim; ++c) {
    const float size = std::exp(normal(random) * 0.5f), offset = normal(random);
    for (int64_t t = 0; t < kPageTokens; ++t) {
      keys[open.key_index(t, c)] = bf16_of_float(normal(random) * size + offset);
      values[open.value_index(t, c)] = bf16_of_float(normal(random));
    }
  }
  Page sealed(format, head_dim);
  seal_head(sealed.data(), sealed.layout, page.data(), open, 0);
  return sealed;
}

// Codes at random; scales are powers of two and zero points take off the middle of the codes, so
// that the offsets of the scores and of the outputs are 0.
Page centred_page(Random& random, KvSeal format, int64_t head_dim) {
  Page page(format, head_dim);
  for (size_t i = 0; i < page.layout.key_scale_offset(0); ++i)
    page.data()[i] = static_cast<uint8_t>(random());
  const float centre = format == KvSeal::kInt8 ? -128.0f : -8.0f;
  const auto put = [&](uint16_t* scales, int64_t i, int64_t count) {
    const float scale = std::ldexp(1.0f, static_cast<int>(random() % 5) - 6);
    scales[i] = bf16_of_float(scale);
    scales[count + i] = bf16_of_float(scale * centre);
  };
  for (int64_t c = 0; c < head_dim; ++c) put(page.key_scales(), c, page.layout.padded_dim());
  for (int64_t t = 0; t < kPageTokens; ++t) put(page.value_scales(), t, kPageTokens);
  return page;
}

struct Queries {
  int64_t rows, head_dim, stride;
  std::vector<float> q;  // NaN between the rows

  Queries(Random& random, int64_t rows, int64_t head_dim, float size)
      : rows(rows),
        head_dim(head_dim),
        stride(head_dim + 3),
        q(static_cast<size_t>(rows * stride), std::numeric_limits<float>::quiet_NaN()) {
    std::normal_distribution<float> normal;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < head_dim; ++c) q[r * stride + c] = size * normal(random);
  }
  const float* row(int64_t r) const { return q.data() + r * stride; }
};

struct State {
  std::vector<float> m, l, o;
  State(int64_t rows, int64_t head_dim)
      : m(rows, -std::numeric_limits<float>::infinity()), l(rows, 0.0f), o(rows * head_dim, 0.0f) {}
  bool same_row(int64_t row, const State& other, int64_t other_row) const {
    const size_t n = o.size() / m.size();
    return std::memcmp(&m[row], &other.m[other_row], 4) == 0 &&
           std::memcmp(&l[row], &other.l[other_row], 4) == 0 &&
           std::memcmp(&o[row * n], &other.o[other_row * n], 4 * n) == 0;
  }
};

// Rows [first, first + count) of the queries; the state belongs to these rows.
void attend(const KernelTable& table, const Queries& queries, int64_t first, int64_t count,
            const Page& page, State& state) {
  std::vector<uint8_t> memory(static_cast<size_t>(count * kSealedScratch + 64), 0xff);
  void* scratch = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
  const KvSealedLayout& layout = page.layout;
  AttendSealed call = {};
  call.q = queries.row(first);
  call.q_stride = queries.stride;
  call.upper = page.at(layout.upper_offset(0));
  if (layout.format == KvSeal::kInt8) call.lower = page.at(layout.lower_offset(0));
  call.values = page.at(layout.value_offset(0));
  call.key_scales = reinterpret_cast<const uint16_t*>(page.at(layout.key_scale_offset(0)));
  call.value_scales = reinterpret_cast<const uint16_t*>(page.at(layout.value_scale_offset(0)));
  call.rows = static_cast<int32_t>(count);
  call.head_dim = static_cast<int32_t>(layout.head_dim);
  call.m = state.m.data();
  call.l = state.l.data();
  call.o = state.o.data();
  call.scratch = scratch;
  (layout.format == KvSeal::kInt8 ? table.attend_sealed_int8 : table.attend_sealed_int4)(call);
}

const KvSeal kFormats[] = {KvSeal::kInt8, KvSeal::kInt4};
const int64_t kDims[] = {128, 1, 7, 20, 32, 64, 88, 100, 256};

// Checks one row, which has seen `pages`, against double.
void check_row(const KernelTable& table, const Queries& queries, int64_t row,
               const std::vector<Page>& pages, const State& state) {
  const int64_t n = queries.head_dim;
  const double root = std::sqrt(static_cast<double>(n));
  const float* q = queries.row(row);
  const double codes = pages[0].layout.format == KvSeal::kInt8 ? 128 : 8;
  std::vector<double> scores;
  double score_error = 0, value_error = 0, largest_value = 0;
  for (const Page& page : pages) {
    const auto* scales =
        reinterpret_cast<const uint16_t*>(page.at(page.layout.key_scale_offset(0)));
    double largest = 0, offsets = 0;
    for (int64_t c = 0; c < n; ++c) {
      const double scale = float_of_bf16(scales[c]);
      const double zero = float_of_bf16(scales[page.layout.padded_dim() + c]);
      largest = std::max(largest, std::fabs(q[c] * scale));
      offsets += std::fabs(q[c] * (zero + codes * scale));
    }
    double most_score = 0;
    for (int64_t t = 0; t < kPageTokens; ++t) {
      double sum = 0;
      for (int64_t c = 0; c < n; ++c) {
        sum += q[c] * page.key(t, c);
        largest_value = std::max(largest_value, std::fabs(page.value(t, c)));
      }
      scores.push_back(sum);
      most_score = std::max(most_score, std::fabs(sum));
    }
    // Each channel of the query is off by up to half a step (4 deviations of n such are taken); the
    // offsets are n products and sums in fp32; the whole sum and its result are rounded once each.
    score_error =
        std::max(score_error, 4 * root * 0.5 * codes * largest / 32512 +
                                  kEps * ((8 + 4 * root) * offsets + 4 * (most_score + offsets)));
    // Each weight * scale likewise, over 256 tokens; their largest is at most the largest scale.
    const auto* value_scales =
        reinterpret_cast<const uint16_t*>(page.at(page.layout.value_scale_offset(0)));
    for (int64_t t = 0; t < kPageTokens; ++t)
      value_error = std::max<double>(value_error,
                                     4 * 16 * 0.5 * codes * float_of_bf16(value_scales[t]) / 32512);
  }
  const double top = *std::max_element(scores.begin(), scores.end());
  const double spread = top - *std::min_element(scores.begin(), scores.end());
  double total = 0;
  std::vector<double> out(n, 0.0);
  for (size_t i = 0; i < scores.size(); ++i) {
    const double weight = std::exp(scores[i] - top);
    total += weight;
    for (int64_t c = 0; c < n; ++c)
      out[c] += weight * pages[i / kPageTokens].value(i % kPageTokens, c);
  }
  // As in attention_test.cpp: the errors of a weight, and sqrt(tokens) roundings of the sums.
  const double relative = 4 * score_error + 2 * (kEps * spread + 4e-7) +
                          4 * std::sqrt(static_cast<double>(scores.size())) * kEps;
  const std::string where = std::string(table.isa) + " row " + std::to_string(row) + " of " +
                            std::to_string(queries.rows) + ", head_dim " + std::to_string(n) +
                            ", codes around " + std::to_string(codes);
  check::report(std::fabs(state.m[row] - top) <= score_error, __FILE__, __LINE__, where + ": m");
  const double got = std::log(state.l[row]) + state.m[row];
  check::report(std::fabs(got - std::log(total) - top) <= relative + score_error, __FILE__,
                __LINE__, where + ": l");
  double worst = 0;
  for (int64_t c = 0; c < n; ++c) {
    const double error = std::fabs(state.o[row * n + c] / state.l[row] - out[c] / total);
    worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : std::max(worst, error);
  }
  // A page's share of the total weight is at least that of its largest weight, on which the steps
  // of the page depend: hence one page's error, not the sum over pages.
  const double bound = 2 * relative * largest_value + 2 * value_error;
  check::report(worst <= bound, __FILE__, __LINE__,
                where + ": o is off by " + std::to_string(worst) + " of " + std::to_string(bound));
}

}  // namespace

TEST(sealed_pages_agree_with_double) {
  Random random(1);
  const std::vector<KernelTable> tables = runnable_isas();
  for (const KvSeal format : kFormats)
    for (const int64_t head_dim : kDims)
      for (const int64_t rows : {int64_t{1}, int64_t{5}, static_cast<int64_t>(random() % 40 + 1)}) {
        const Queries queries(random, rows, head_dim,
                              2.0f / std::sqrt(static_cast<float>(head_dim)));
        std::vector<Page> pages;
        for (int i = 0; i < 2; ++i) pages.push_back(random_page(random, format, head_dim));
        for (const KernelTable& table : tables) {
          State state(rows, head_dim);
          for (const Page& page : pages) attend(table, queries, 0, rows, page, state);
          // The reference is slow: some rows of many.
          for (int64_t r = 0; r < rows; r += 1 + rows / 4)
            check_row(table, queries, r, pages, state);
        }
      }
}

TEST(sealed_rows_are_independent) {
  Random random(2);
  for (const KernelTable& table : runnable_isas())
    for (const KvSeal format : kFormats)
      for (const int64_t head_dim : kDims) {
        const int64_t rows = static_cast<int64_t>(random() % 40 + 1);
        const Queries queries(random, rows, head_dim, 0.3f);
        const Page page = random_page(random, format, head_dim);
        State all(rows, head_dim);
        attend(table, queries, 0, rows, page, all);
        for (int trial = 0; trial < 8; ++trial) {
          const int64_t first = static_cast<int64_t>(random()) % rows;
          const int64_t count = trial < 4 ? 1 : 1 + static_cast<int64_t>(random()) % (rows - first);
          State some(count, head_dim);
          attend(table, queries, first, count, page, some);
          for (int64_t r = 0; r < count; ++r) CHECK(some.same_row(r, all, first + r));
        }
      }
}

// With offsets of zero a score is one whole number times one step, and with queries of zero all
// weights are one: what differs between instruction sets then can only be the whole numbers.
TEST(whole_sums_are_the_same_everywhere) {
  Random random(3);
  const std::vector<KernelTable> tables = runnable_isas();
  for (const KvSeal format : kFormats)
    for (const int64_t head_dim : kDims)
      for (int trial = 0; trial < 4; ++trial) {
        const int64_t rows = static_cast<int64_t>(random() % 24 + 1);
        const Page page = centred_page(random, format, head_dim);
        const Queries queries(random, rows, head_dim, 0.5f);
        const Queries zeros(random, rows, head_dim, 0.0f);
        State scores(rows, head_dim), values(rows, head_dim);
        attend(tables[0], queries, 0, rows, page, scores);
        attend(tables[0], zeros, 0, rows, page, values);
        for (const KernelTable& table : tables) {
          State other(rows, head_dim);
          attend(table, queries, 0, rows, page, other);
          CHECK(std::memcmp(other.m.data(), scores.m.data(), 4 * other.m.size()) == 0);
          State sums(rows, head_dim);
          attend(table, zeros, 0, rows, page, sums);
          CHECK(std::memcmp(sums.o.data(), values.o.data(), 4 * sums.o.size()) == 0);
          for (int64_t r = 0; r < rows; ++r) CHECK_EQ(sums.l[r], 256.0f);
        }
      }
}

// Everything at the ends of its range at once, with the most channels there may be.
TEST(the_largest_sums_fit) {
  for (const KernelTable& table : runnable_isas())
    for (const KvSeal format : kFormats)
      for (const int code : {0, 255}) {
        Page page(format, kSealedDim);
        std::memset(page.data(), code, page.layout.key_scale_offset(0));
        for (int64_t c = 0; c < kSealedDim; ++c) page.key_scales()[c] = bf16_of_float(1);
        for (int64_t t = 0; t < kPageTokens; ++t) page.value_scales()[t] = bf16_of_float(1);
        for (const float q : {-1.0f, 1.0f}) {
          Random random(0);
          Queries queries(random, 7, kSealedDim, 0);
          std::fill(queries.q.begin(), queries.q.end(), q);
          State state(7, kSealedDim);
          attend(table, queries, 0, 7, page, state);
          const float value = code == 0 ? 0.0f : format == KvSeal::kInt8 ? 255.0f : 15.0f;
          for (int64_t r = 0; r < 7; ++r) {
            CHECK(std::fabs(state.m[r] - q * kSealedDim * value) <= 0.01f);
            CHECK_EQ(state.l[r], 256.0f);
            for (int64_t c = 0; c < kSealedDim; ++c)
              CHECK(std::fabs(state.o[r * kSealedDim + c] - 256 * value) <= 0.01f);
          }
        }
      }
}

// A state that has seen higher scores keeps what it has; nothing is lost of later, higher ones.
TEST(sealed_pages_take_scores_of_any_size) {
  Random random(4);
  for (const KernelTable& table : runnable_isas())
    for (const KvSeal format : kFormats) {
      const int64_t n = 64;
      const Page page = random_page(random, format, n);
      Queries queries(random, 3, n, 1);
      State before(3, n);
      for (int64_t r = 0; r < 3; ++r) {
        before.m[r] = 5000;
        before.l[r] = 2;
        for (int64_t c = 0; c < n; ++c) before.o[r * n + c] = static_cast<float>(c);
      }
      State high = before;
      attend(table, queries, 0, 3, page, high);
      for (int64_t r = 0; r < 3; ++r) CHECK(high.same_row(r, before, r));
      State low = before, fresh(3, n);
      for (float& m : low.m) m = -5000;
      attend(table, queries, 0, 3, page, low);
      attend(table, queries, 0, 3, page, fresh);
      for (int64_t r = 0; r < 3; ++r) CHECK(low.same_row(r, fresh, r));
    }
}

TEST(what_is_not_finite_shows) {
  Random random(5);
  const uint16_t nan = 0x7fc0;
  for (const KernelTable& table : runnable_isas())
    for (const KvSeal format : kFormats)
      for (const int64_t n : {40, 128}) {
        const Queries queries(random, 6, n, 0.1f);
        for (const bool value : {false, true}) {
          Page page = random_page(random, format, n);
          uint16_t* scales = value ? page.value_scales() : page.key_scales();
          const int64_t count = value ? kPageTokens : page.layout.padded_dim();
          const int64_t place = static_cast<int64_t>(random()) % (value ? kPageTokens : n);
          scales[place] = scales[count + place] = nan;
          State state(6, n);
          attend(table, queries, 0, 6, page, state);
          for (int64_t r = 0; r < 6; ++r)
            for (int64_t c = 0; c < n; ++c) CHECK(std::isnan(state.o[r * n + c] / state.l[r]));
        }
      }
}

// Pages that are constant have scales of 0.
TEST(constant_pages) {
  Random random(6);
  for (const KernelTable& table : runnable_isas())
    for (const KvSeal format : kFormats) {
      const int64_t n = 40;
      Page page(format, n);
      for (int64_t c = 0; c < n; ++c)
        page.key_scales()[page.layout.padded_dim() + c] = bf16_of_float(1);
      for (int64_t t = 0; t < kPageTokens; ++t)
        page.value_scales()[kPageTokens + t] = bf16_of_float(0.75f);
      Queries queries(random, 4, n, 1);
      State state(4, n);
      attend(table, queries, 0, 4, page, state);
      for (int64_t r = 0; r < 4; ++r)
        for (int64_t c = 0; c < n; ++c) CHECK_EQ(state.o[r * n + c] / state.l[r], 0.75f);
    }
}
