// Attention over sealed and streamed pages: near the reference, and with equal bits however the
// prompt is cut, wherever its pages lie, whatever is batched with it, on any number of threads.
#include <algorithm>
#include <span>

#include "sealed_attention_fixture.h"

using namespace fixture;

namespace {

std::vector<float> attend_whole(Backend& backend, const Sequence& sequence) {
  Cache cache(sequence.shape);
  return attend(backend, sequence.shape, {{&sequence, &cache, sequence.tokens}});
}

std::vector<float> rows_of(const std::vector<float>& all, int64_t first, int64_t count,
                           int64_t cols) {
  return {all.begin() + first * cols, all.begin() + (first + count) * cols};
}

// As attention_bound() of backend_attention_test.cpp for fp32 arithmetic, where keys and values are
// the same on both sides. Sealed pages add, per score and per output, what the whole numbers of a
// query and of the weights are off by (attention_sealed_test.cpp), where they become such; the
// scale of a channel is at most its range, twice the largest value, over the levels, and rounded
// up. Where the operands of products are bfloat16 each term of a score loses two roundings, of the
// query and of the unsealed key, a half of kEpsBF16 at most and evenly spread; the terms are
// products of standard normal values, and 4 standard deviations are granted. An output loses those
// of a weight and of a value.
double bound_of(const Sequence& sequence) {
  const Shape& shape = sequence.shape;
  const auto n = static_cast<double>(shape.head_dim);
  double value = 0;
  for (const float x : sequence.qkv) value = std::max(value, std::abs(static_cast<double>(x)));
  const double factor = 2 / std::sqrt(n);  // temperatures stay below 2
  double score = (n + 32) * kEps * value * value * std::sqrt(n) * factor, added = 0;
  if (shape.page_type == DType::kBF16) added = 2 * kEps * value;
  if (shape.seal != KvSeal::kNone && kSealedInIntegers) {
    const double codes = shape.seal == KvSeal::kInt8 ? 128.0 / 255 : 8.0 / 15;
    const double word = 0.5 * codes * 2.05 * value / 32512;
    score += 4 * std::sqrt(n) * word * value * factor;
    added += 4 * 16 * word;
  }
  if (kRoundsOperands && shape.page_type == DType::kBF16) {
    score += 4 / std::sqrt(12.0) * std::sqrt(2 * n) * kEpsBF16 * factor;
    added += kEpsBF16 * value;
  }
  const auto terms = static_cast<double>(std::min<int64_t>(sequence.tokens, 2048));
  return value * (4 * score + (4 * std::sqrt(terms) + 32) * kEps) + added;
}

const Shape kShapes[] = {
    {4, 2, 24, DType::kBF16, KvSeal::kInt8}, {5, 1, 16, DType::kBF16, KvSeal::kInt4},
    {3, 1, 33, DType::kF32, KvSeal::kInt8},  {8, 4, 7, DType::kBF16, KvSeal::kInt4},
    {3, 3, 20, DType::kBF16, KvSeal::kNone}, {5, 1, 64, DType::kBF16, KvSeal::kInt4},
    {6, 2, 64, DType::kBF16, KvSeal::kInt8},
};
// For short texts: plain code takes its time.
const Shape kWide[] = {{5, 1, 128, DType::kBF16, KvSeal::kInt8},
                       {10, 2, 128, DType::kBF16, KvSeal::kInt4},
                       {1, 1, 256, DType::kBF16, KvSeal::kInt8}};

void check_near_the_reference(std::mt19937& random, const Shape& shape, int64_t tokens) {
  const Sequence sequence(random, shape, tokens);
  // The reference is slow: some rows, those around the ends of pages among them.
  std::vector<int32_t> wanted;
  for (int32_t row = 0; row < tokens; ++row)
    if (row == tokens - 1 || row % 512 == 255 || row % 512 == 256 || random() % 200 == 0)
      wanted.push_back(row);
  Cache expected_cache(shape);
  const std::vector<float> expected =
      attend(ref(), shape, {{&sequence, &expected_cache, tokens}}, wanted);
  const std::vector<double> bound(expected.size(), bound_of(sequence));
  for (std::vector<Named>& same_isa : subjects()) {
    Cache cache(shape);
    const std::vector<float> got =
        attend(*same_isa.back().backend, shape, {{&sequence, &cache, tokens}}, wanted);
    check_close("sealed attention on " + same_isa.back().name, got, expected, bound);
    CHECK_EQ(cache.sealed.size(), expected_cache.sealed.size());
    for (size_t i = 0; i < cache.sealed.size(); ++i)
      CHECK(*cache.sealed[i] == *expected_cache.sealed[i]);
  }
}

}  // namespace

TEST(sealed_attention_is_near_the_reference) {
  std::mt19937 random(1);
  for (const Shape& shape : kShapes)
    for (const int64_t tokens : {1, 255, 256, 257, 600, 2400})
      check_near_the_reference(random, shape, tokens);
  for (const Shape& shape : kWide) check_near_the_reference(random, shape, 520);
}

// Random cuts, pages elsewhere, wanted rows, threads and company.
TEST(where_pages_lie_and_how_a_prompt_is_cut_does_not_matter) {
  std::mt19937 random(2);
  const auto draw = [&](int64_t low, int64_t high) {
    return low + static_cast<int64_t>(random() % static_cast<uint64_t>(high - low + 1));
  };
  for (std::vector<Named>& same_isa : subjects())
    for (const Shape& shape : kShapes) {
      const Sequence sequence(random, shape, draw(300, kCutContext));
      const Sequence company(random, shape, 500);
      const std::vector<float> whole = attend_whole(*same_isa[0].backend, sequence);
      const std::vector<float> company_whole = attend_whole(*same_isa[0].backend, company);
      const int64_t cols = shape.out_cols();
      for (int trial = 0; trial < check::trials(kCutTrials); ++trial) {
        Named& cpu = same_isa[random() % same_isa.size()];
        Cache cache(shape), beside(shape);
        TestStream stream(cache);
        cache.stream = &stream;
        while (cache.length < sequence.tokens) {
          const int64_t limits[] = {3, 40, 700, 3000}, first = cache.length;
          const int64_t count = std::min(sequence.tokens - first, draw(1, limits[draw(0, 3)]));
          // Pages that are sealed by now may go, or come back.
          for (int64_t page = 0; page < first / kPageTokens; ++page)
            if (draw(0, 2) == 0) {
              if (!cache.elsewhere.erase(page)) cache.elsewhere.insert(page);
            }
          stream.rewind();
          std::vector<Piece> pieces = {{&sequence, &cache, count}};
          const int64_t other = std::min(company.tokens - beside.length, draw(0, 300));
          const int64_t company_first = beside.length;
          if (other > 0) pieces.insert(pieces.begin() + draw(0, 1), {&company, &beside, other});
          std::vector<int32_t> wanted;
          std::vector<float> expected;
          const bool some = draw(0, 1) == 1;
          int32_t row = 0;
          for (const Piece& piece : pieces) {
            const bool mine = piece.sequence == &sequence;
            for (int64_t i = 0; i < piece.count; ++i, ++row) {
              if (some && draw(0, 4) != 0) continue;
              wanted.push_back(row);
              const auto part = mine ? rows_of(whole, first + i, 1, cols)
                                     : rows_of(company_whole, company_first + i, 1, cols);
              expected.insert(expected.end(), part.begin(), part.end());
            }
          }
          std::vector<float> got;
          if (some)
            got = attend(*cpu.backend, shape, pieces, wanted);
          else
            got = attend(*cpu.backend, shape, pieces);
          CHECK_EQ(got.size(), expected.size());
          check_same_bits("cut at " + std::to_string(first) + " on " + cpu.name, got.data(),
                          expected.data(), expected.size());
        }
      }
    }
}

// Questions about one long text, whose pages they share: in memory, or through one stream.
TEST(shared_prefixes_are_read_once_and_change_nothing) {
  std::mt19937 random(3);
  for (const Shape& shape : kShapes) {
    // Their rows, which grow with each, are what takes the time.
    const int64_t prefix = kSharedPrefix, forks = check::trials(kForks - 1) + 1;
    const Sequence text(random, shape, prefix);
    std::vector<Sequence> questions;
    for (int64_t i = 0; i < forks; ++i) questions.emplace_back(random, shape, prefix + 1 + i * 37);
    for (std::vector<Named>& same_isa : subjects()) {
      Cache source(shape);
      attend(*same_isa.back().backend, shape, {{&text, &source, prefix}},
             std::span<const int32_t>{});
      const auto fork = [&] {
        Cache copy = source;
        for (Page& page : copy.open)  // its own from here on
          page = std::make_shared<std::vector<char>>(*page);
        return copy;
      };
      std::vector<float> expected;
      for (const Sequence& question : questions) {
        Cache alone = fork();
        const std::vector<float> rows =
            attend(*same_isa[0].backend, shape, {{&question, &alone, question.tokens - prefix}});
        expected.insert(expected.end(), rows.begin(), rows.end());
      }
      for (Named& cpu : std::span(same_isa).first(kBatched))
        for (const bool streamed : {false, true}) {
          std::set<int64_t> elsewhere;
          if (streamed)
            for (int64_t page = 1; page < prefix / kPageTokens; ++page) elsewhere.insert(page);
          std::vector<Cache> caches;
          for (int64_t i = 0; i < forks; ++i) {
            caches.push_back(fork());
            caches.back().elsewhere = elsewhere;
          }
          TestStream stream(caches[0]);
          std::vector<Piece> pieces;
          for (int64_t i = 0; i < forks; ++i) {
            caches[i].stream = &stream;
            pieces.push_back({&questions[i], &caches[i], questions[i].tokens - prefix});
          }
          const std::vector<float> got = attend(*cpu.backend, shape, pieces);
          check_same_bits("shared prefix on " + cpu.name, got.data(), expected.data(),
                          expected.size());
          const int64_t once = streamed ? prefix / kPageTokens - 1 : 0;
          CHECK(stream.waits >= once && stream.waits <= kMostReadings * once);
        }
    }
  }
}

// More pages than may be held at once, and more leaves than lanes work on at once.
TEST(long_streams) {
  std::mt19937 random(4);
  const Shape shape{2, 1, 8, DType::kBF16, KvSeal::kInt8};
  const int64_t tokens = kVeryLongContext * 2 / 3;
  Sequence sequence(random, shape, tokens + 1);
  for (std::vector<Named>& same_isa : subjects()) {
    Cache cache(shape);
    attend(*same_isa[0].backend, shape, {{&sequence, &cache, tokens}},
           std::span<const int32_t>{});  // stored, nothing wanted
    CHECK_EQ(cache.length, tokens);
    Cache expected_cache = cache;
    expected_cache.open[0] = std::make_shared<std::vector<char>>(*cache.open[0]);
    const std::vector<float> expected = attend(ref(), shape, {{&sequence, &expected_cache, 1}});
    std::vector<float> first;
    for (Named& cpu : same_isa)
      for (const bool streamed : {false, true}) {
        Cache mine = cache;
        mine.open[0] = std::make_shared<std::vector<char>>(*cache.open[0]);
        TestStream stream(mine);
        mine.stream = &stream;
        if (streamed)
          for (int64_t page = 0; page < tokens / kPageTokens; ++page)
            if (page % 7 != 3) mine.elsewhere.insert(page);
        const std::vector<float> got = attend(*cpu.backend, shape, {{&sequence, &mine, 1}});
        if (first.empty()) {
          first = got;
          check_close("long stream on " + cpu.name, got, expected,
                      std::vector<double>(got.size(), bound_of(sequence)));
        }
        check_same_bits("long stream on " + cpu.name, got.data(), first.data(), got.size());
        CHECK_EQ(stream.waits, static_cast<int64_t>(mine.elsewhere.size()));
      }
  }
}

TEST(a_stream_that_fails_or_is_not_read_is_reported) {
  std::mt19937 random(5);
  const Shape shape{4, 2, 16, DType::kBF16, KvSeal::kInt8};
  const Sequence sequence(random, shape, 2001);
  for (std::vector<Named>& same_isa : subjects()) {
    Cache last(shape);
    attend(*same_isa[0].backend, shape, {{&sequence, &last, 2000}}, std::span<const int32_t>{});
    const std::vector<float> whole = attend(*same_isa[0].backend, shape, {{&sequence, &last, 1}});
    for (Named& cpu : same_isa) {
      Cache cache(shape);
      attend(*cpu.backend, shape, {{&sequence, &cache, 2000}}, std::span<const int32_t>{});
      TestStream stream(cache);
      cache.stream = &stream;
      cache.elsewhere = {1, 4, 5};
      stream.broken = 4;
      CHECK_THROWS(ErrorCode::kDevice, attend(*cpu.backend, shape, {{&sequence, &cache, 1}}));
      stream.broken = -1;
      stream.rewind();
      const std::vector<float> got = attend(*cpu.backend, shape, {{&sequence, &cache, 1}});
      check_same_bits("after a failure on " + cpu.name, got.data(), whole.data(), got.size());
    }
  }
}

TEST(wrong_pages_are_refused) {
  std::mt19937 random(6);
  const Shape shape{2, 1, 4, DType::kBF16, KvSeal::kInt8};
  const Sequence sequence(random, shape, 600);
  std::vector<Backend*> all = {&ref()};
  for (std::vector<Named>& same_isa : subjects()) all.push_back(same_isa.back().backend.get());
  for (Backend* backend : all) {
    Cache cache(shape);
    attend(*backend, shape, {{&sequence, &cache, 520}});
    const auto refused = [&](auto change) {
      Cache broken = cache;
      change(broken);
      CHECK_THROWS(ErrorCode::kInternal, attend(*backend, shape, {{&sequence, &broken, 10}}));
    };
    refused([](Cache& broken) { broken.elsewhere = {0}; });  // without a stream
    refused([](Cache& broken) { broken.sealed_table_short = true; });
    const int32_t twice[] = {3, 3}, outside[] = {10}, backwards[] = {4, 2};
    for (const std::span<const int32_t> rows :
         {std::span<const int32_t>(twice), std::span<const int32_t>(outside),
          std::span<const int32_t>(backwards)}) {
      Cache copy = cache;
      CHECK_THROWS(ErrorCode::kInternal, attend(*backend, shape, {{&sequence, &copy, 10}}, rows));
    }
    const Shape wide{1, 1, 260, DType::kBF16, KvSeal::kInt8};
    const Sequence other(random, wide, 2);
    Cache its(wide);
    CHECK_THROWS(ErrorCode::kUnsupported, attend(*backend, wide, {{&other, &its, 1}}));
  }
}
