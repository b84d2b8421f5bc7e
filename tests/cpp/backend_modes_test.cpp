// Attention that leaves out pages: within its bounds of the exact one, with equal bits whatever is
// batched with it and on any number of threads, and with a true report.
#include <algorithm>
#include <cmath>
#include <limits>

#include "sealed_attention_fixture.h"

using namespace fixture;

namespace {

const Shape kShapes[] = {
    {4, 2, 24, DType::kBF16, KvSeal::kInt8},
    {5, 1, 16, DType::kBF16, KvSeal::kInt4},
    {3, 1, 33, DType::kF32, KvSeal::kInt8},
};
constexpr int64_t kTokens = 21 * kPageTokens + 100;

AttentionMode certified(double tau, double delta) {
  AttentionMode mode;
  mode.kind = AttentionMode::Kind::kCertified;
  mode.tau = tau;
  mode.delta = delta;
  return mode;
}
AttentionMode budget(double fraction, double sample) {
  AttentionMode mode;
  mode.kind = AttentionMode::Kind::kBudget;
  mode.fraction = fraction;
  mode.sample = sample;
  mode.recent_pages = 2;
  return mode;
}

// Each page has a topic, of which all its keys are; the last row asks for that of one page.
Sequence topical(std::mt19937& random, const Shape& shape, int64_t page, float sharpness) {
  Sequence sequence(random, shape, kTokens);
  const int64_t n = shape.head_dim, pages = kTokens / kPageTokens + 1;
  const std::vector<float> topics = randoms(random, pages * n);
  const auto norm = static_cast<float>(std::sqrt(static_cast<double>(n)));
  for (int64_t t = 0; t < kTokens; ++t) {
    float* row = sequence.qkv.data() + t * shape.cols();
    const float* topic = topics.data() + t / kPageTokens * n;
    for (int64_t h = 0; h < shape.kv_heads; ++h)
      for (int64_t c = 0; c < n; ++c) {
        float& key = row[(shape.heads + h) * n + c];
        key = 0.3f * key + topic[c];
      }
    if (t + 1 < kTokens) continue;
    const float* wanted = topics.data() + page * n;
    for (int64_t c = 0; c < shape.heads * n; ++c)
      row[c] = 0.1f * row[c] + sharpness * wanted[c % n] / norm;
  }
  return sequence;
}

struct Asked {
  std::vector<float> out;
  AttentionReport report;
  int64_t waits = 0, restarts = 0;  // of the stream
};

// Which pages stream, and whether the scales of their keys are known.
struct Streaming {
  int64_t from = -1;  // the first; -1: none
  bool scales_known = false;
};

// Keys and values of all rows but the last.
void append(Backend& backend, const Sequence& sequence, Cache& cache) {
  attend(backend, sequence.shape, {{&sequence, &cache, sequence.tokens - 1}},
         std::span<const int32_t>());
}

// The last row after all others; with `company`, beside a row of another sequence.
Asked ask(Backend& backend, const Sequence& sequence, const AttentionMode* mode,
          const Sequence* company = nullptr, const Streaming& streaming = {}) {
  const Shape& shape = sequence.shape;
  Cache cache(shape), other(shape);
  append(backend, sequence, cache);
  TestStream stream(cache);
  if (streaming.from >= 0) {
    cache.stream = &stream;
    cache.scales_known = streaming.scales_known;
    for (int64_t p = streaming.from; p < static_cast<int64_t>(cache.sealed.size()); ++p)
      cache.elsewhere.insert(p);
  }
  Asked asked;
  std::vector<Piece> pieces;
  if (company) {
    append(backend, *company, other);
    pieces.push_back({company, &other, 1});
  }
  pieces.push_back({&sequence, &cache, 1, mode, mode ? &asked.report : nullptr});
  asked.out = attend(backend, shape, pieces);
  asked.out.erase(asked.out.begin(), asked.out.end() - shape.out_cols());
  asked.waits = stream.waits;
  asked.restarts = stream.restarts;
  return asked;
}

double largest_value(const Sequence& sequence) {
  const Shape& shape = sequence.shape;
  double largest = 0;
  for (int64_t t = 0; t < sequence.tokens; ++t)
    for (int64_t c = (shape.heads + shape.kv_heads) * shape.head_dim; c < shape.cols(); ++c)
      largest =
          std::max(largest, std::fabs(static_cast<double>(sequence.qkv[t * shape.cols() + c])));
  return largest;
}

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i)
    largest = std::max(largest, std::fabs(static_cast<double>(a[i]) - b[i]));
  return largest;
}

}  // namespace

TEST(certified_attention_is_as_near_as_it_says) {
  std::mt19937 random(1);
  for (const Shape& shape : kShapes)
    for (auto& same_isa : subjects())
      for (const float sharpness : {1.0f, 6.0f, 20.0f})
        for (const auto& [tau, delta] : {std::pair(1e-4, 0.0), {1e-2, 1e-9}, {0.3, 1e-9}}) {
          const Sequence sequence = topical(random, shape, 7, sharpness);
          Backend& backend = *same_isa.back().backend;
          const AttentionMode mode = certified(tau, delta);
          const Asked exact = ask(backend, sequence, nullptr);
          const Asked some = ask(backend, sequence, &mode);
          CHECK_EQ(some.report.pages, 21 * shape.kv_heads);
          CHECK(some.report.read <= some.report.pages);
          CHECK(some.report.worst_share <= tau * (1 + 1e-5));
          // What was left out is at most worst_share of what was read. Sums of fp32 in another
          // order, beside.
          const double bound =
              (2 * some.report.worst_share + 2000 * kEps) * largest_value(sequence);
          CHECK(largest_difference(some.out, exact.out) <= bound);
        }
}

TEST(a_sharp_row_leaves_most_pages_out_and_a_flat_one_none) {
  std::mt19937 random(2);
  for (const Shape& shape : kShapes) {
    Backend& backend = *subjects().back().back().backend;
    const AttentionMode mode = certified(1e-3, 1e-9);
    const Asked sharp = ask(backend, topical(random, shape, 7, 30), &mode);
    CHECK(sharp.report.read <= 6 * shape.kv_heads);
    CHECK(sharp.report.read >= shape.kv_heads);
    const Asked flat = ask(backend, topical(random, shape, 7, 0), &mode);
    CHECK_EQ(flat.report.read, flat.report.pages);
    CHECK_EQ(flat.report.worst_share, 0.0);
  }
}

TEST(budget_attention_reads_what_it_may) {
  std::mt19937 random(3);
  for (const Shape& shape : kShapes)
    for (auto& same_isa : subjects()) {
      Backend& backend = *same_isa.back().backend;
      const Sequence sequence = topical(random, shape, 7, 20);
      const Asked exact = ask(backend, sequence, nullptr);
      const double value = largest_value(sequence);
      // Everything: the same bits.
      const AttentionMode all = budget(1, 0);
      const Asked whole = ask(backend, sequence, &all);
      CHECK_EQ(whole.report.read, whole.report.pages);
      check_same_bits("all pages", whole.out.data(), exact.out.data(), exact.out.size());
      // A sample of all that is left is all of it, in another order.
      const AttentionMode sampled = budget(0.1, 1);
      const Asked second = ask(backend, sequence, &sampled);
      CHECK_EQ(second.report.read, second.report.pages);
      CHECK(largest_difference(second.out, exact.out) <= 2000 * kEps * value);
      CHECK_EQ(second.report.worst_interval, 0.0);
      // The first, the last two, and a tenth of 21: three.
      const AttentionMode few = budget(0.1, 0);
      const Asked some = ask(backend, sequence, &few);
      CHECK_EQ(some.report.read, 6 * shape.kv_heads);
      CHECK(largest_difference(some.out, exact.out) <= 0.1 * value);  // it has the page
    }
}

// Scores of 0: every token weighs the same, so what is left out is known.
TEST(a_sample_estimates_what_was_left_out) {
  std::mt19937 random(4);
  const Shape& shape = kShapes[0];
  Sequence sequence = topical(random, shape, 7, 0);
  float* last = sequence.qkv.data() + (kTokens - 1) * shape.cols();
  std::fill_n(last, shape.heads * shape.head_dim, 0.0f);
  const AttentionMode mode = budget(0.1, 0.25);
  const Asked some = ask(*subjects().back().back().backend, sequence, &mode);
  const auto sampled = static_cast<double>(some.report.read / shape.kv_heads - 6);
  CHECK(sampled > 0 && sampled < 15);
  const double pages = 6 + 4 * sampled + 100.0 / kPageTokens;
  CHECK(std::fabs(some.report.worst_share - 3 * sampled / pages) < 1e-5);
  CHECK(some.report.worst_interval > 0);
}

TEST(what_is_left_out_depends_on_the_row_alone) {
  std::mt19937 random(5);
  for (const Shape& shape : kShapes) {
    const Sequence sequence = topical(random, shape, 7, 8), company = topical(random, shape, 3, 2);
    for (auto& same_isa : subjects())
      for (const AttentionMode& mode : {certified(1e-2, 0), budget(0.1, 0.3)}) {
        const Asked expected = ask(*same_isa[0].backend, sequence, &mode);
        for (const Named& cpu : same_isa)
          for (const Sequence* beside : {static_cast<const Sequence*>(nullptr), &company}) {
            const Asked again = ask(*cpu.backend, sequence, &mode, beside);
            check_same_bits(cpu.name, again.out.data(), expected.out.data(), expected.out.size());
            CHECK_EQ(again.report.read, expected.report.read);
            CHECK_EQ(again.report.worst_share, expected.report.worst_share);
          }
      }
  }
}

// The exact rows of a call have the bits that they have without company of another mode.
TEST(company_of_another_mode_changes_nothing) {
  std::mt19937 random(6);
  const Shape& shape = kShapes[0];
  const Sequence exact = topical(random, shape, 7, 8), other = topical(random, shape, 3, 8);
  const AttentionMode mode = certified(1e-2, 1e-9);
  AttentionReport report;
  for (auto& same_isa : subjects())
    for (const Named& cpu : same_isa) {
      const Asked alone = ask(*cpu.backend, exact, nullptr);
      Cache a(shape), b(shape);
      append(*cpu.backend, exact, a);
      append(*cpu.backend, other, b);
      const std::vector<float> out =
          attend(*cpu.backend, shape, {{&exact, &a, 1}, {&other, &b, 1, &mode, &report}});
      check_same_bits(cpu.name, out.data(), alone.out.data(), alone.out.size());
    }
}

TEST(pages_that_stream_are_used) {
  std::mt19937 random(7);
  const Shape& shape = kShapes[0];
  const Sequence sequence = topical(random, shape, 7, 30);
  const AttentionMode mode = certified(1e-3, 1e-9);
  for (const Named& cpu : subjects().back()) {
    const Asked exact = ask(*cpu.backend, sequence, nullptr);
    const Asked some = ask(*cpu.backend, sequence, &mode, nullptr, {10, false});
    CHECK(some.report.read >= 11 * shape.kv_heads);
    CHECK(some.report.read < some.report.pages);
    CHECK_EQ(some.waits, 11);
    CHECK_EQ(some.report.unread_bytes, 0);
    CHECK(largest_difference(some.out, exact.out) <=
          (2e-3 + 2000 * kEps) * largest_value(sequence));
  }
}

// A budget's choice goes by the scales alone, so it is the same wherever pages lie; the sample of
// those that stream is read in a second round.
TEST(pages_on_disk_that_a_budget_leaves_out_are_not_read) {
  std::mt19937 random(9);
  for (const Shape& shape : kShapes) {
    const Sequence sequence = topical(random, shape, 7, 8);
    for (auto& same_isa : subjects())
      for (const AttentionMode& mode : {budget(0.1, 0), budget(0.1, 0.2), budget(1, 0)}) {
        const Asked expected = ask(*same_isa[0].backend, sequence, &mode);
        CHECK_EQ(expected.report.unread_bytes, 0);
        for (const Named& cpu : same_isa)
          for (const int64_t from : {0, 5}) {
            const Asked some = ask(*cpu.backend, sequence, &mode, nullptr, {from, true});
            check_same_bits(cpu.name, some.out.data(), expected.out.data(), expected.out.size());
            CHECK_EQ(some.report.read, expected.report.read);
            CHECK_EQ(some.report.worst_share, expected.report.worst_share);
            const int64_t unread =
                some.report.unread_bytes / static_cast<int64_t>(shape.sealed().page_bytes());
            // Heads that read different pages share the reading.
            CHECK(unread + some.waits >= 21 - from);
            CHECK(unread + some.waits <= 2 * (21 - from));
            CHECK(some.waits <= some.report.read);
            if (mode.fraction == 1) {
              CHECK_EQ(unread, 0);
              CHECK_EQ(some.restarts, 1);  // for a second round, in which there is nothing to do
            } else {
              CHECK(unread >= (mode.sample > 0 ? 1 : 21 - from - some.report.read));
            }
          }
      }
  }
}

TEST(pages_on_disk_are_left_out_where_their_ranges_say_so) {
  std::mt19937 random(10);
  for (const Shape& shape : kShapes)
    for (const double tau : {1e-3, 0.2}) {
      const Sequence sequence = topical(random, shape, 7, 400);
      const AttentionMode mode = certified(tau, 1e-9);
      for (auto& same_isa : subjects()) {
        const Asked exact = ask(*same_isa[0].backend, sequence, nullptr);
        Asked first;
        for (const Named& cpu : same_isa)
          for (const int64_t from : {0, 10}) {
            const Asked some = ask(*cpu.backend, sequence, &mode, nullptr, {from, true});
            CHECK(some.report.unread_bytes > 0);
            CHECK(some.waits < 21 - from);
            CHECK(some.report.worst_share <= tau * (1 + 1e-5));
            CHECK(largest_difference(some.out, exact.out) <=
                  (2 * some.report.worst_share + 2000 * kEps) * largest_value(sequence));
            if (from == 0 && first.out.empty()) first = some;
            if (from == 0)
              check_same_bits(cpu.name, some.out.data(), first.out.data(), first.out.size());
          }
      }
    }
}

// A call that reads everything for one sequence reads it for the other as well.
TEST(a_stream_is_read_for_all_who_share_it) {
  std::mt19937 random(11);
  const Shape& shape = kShapes[0];
  const Sequence sequence = topical(random, shape, 7, 400);
  const AttentionMode mode = certified(1e-2, 1e-9);
  for (const Named& cpu : subjects().back()) {
    const Asked exact = ask(*cpu.backend, sequence, nullptr);
    const Asked some = ask(*cpu.backend, sequence, &mode, nullptr, {1, true});
    Cache cache(shape);
    append(*cpu.backend, sequence, cache);
    Cache fork = cache;
    TestStream stream(cache);
    for (Cache* one : {&cache, &fork}) {
      one->stream = &stream;
      one->scales_known = true;
      for (int64_t page = 1; page < 21; ++page) one->elsewhere.insert(page);
    }
    AttentionReport report;
    const std::vector<float> out = attend(
        *cpu.backend, shape, {{&sequence, &cache, 1}, {&sequence, &fork, 1, &mode, &report}});
    const auto cols = static_cast<size_t>(shape.out_cols());
    check_same_bits("exact", out.data(), exact.out.data(), cols);
    check_same_bits("certified", out.data() + cols, some.out.data(), cols);
    CHECK_EQ(stream.waits, 20);
    CHECK_EQ(report.unread_bytes, 0);
  }
}

TEST(what_is_not_a_number_is_not_left_out) {
  std::mt19937 random(8);
  const Shape& shape = kShapes[0];
  Sequence sequence = topical(random, shape, 7, 30);
  // A key on another page.
  sequence.qkv[(3 * kPageTokens + 5) * shape.cols() + shape.heads * shape.head_dim] =
      std::numeric_limits<float>::quiet_NaN();
  const AttentionMode mode = certified(1e-3, 1e-9);
  const Asked some = ask(*subjects().back().back().backend, sequence, &mode);
  CHECK(std::isnan(some.out[0]));
}
