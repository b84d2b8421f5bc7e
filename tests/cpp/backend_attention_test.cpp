// Attention of the CPU backend against the reference: pages, leaves, segments, chunk starts; and
// equal bits however a prompt is cut, whatever is batched with it, on any number of threads.
#include <algorithm>
#include <span>

#include "backend_fixture.h"

using namespace fixture;

namespace {

struct Shape {
  int64_t heads, kv_heads, head_dim;
  DType page_type;
  bool rope, norm, temperature;
  int64_t cols() const { return (heads + 2 * kv_heads) * head_dim; }
  int64_t out_cols() const { return heads * head_dim; }
  KvPageLayout layout() const { return {page_type, kv_heads, head_dim}; }
};

// One sequence: its projected rows, and pages for them. Positions count from `start`, which is
// where its pages begin.
struct Sequence {
  Sequence(std::mt19937& random, const Shape& shape, int64_t start, int64_t tokens)
      : shape(shape), start(start), tokens(tokens) {
    qkv = randoms(random, tokens * shape.cols());
    for (int64_t i = 0; i < tokens * shape.head_dim / 2; ++i) {
      const float angle = static_cast<float>(random() % 10000) * 1e-3f;
      cos.push_back(std::cos(angle));
      sin.push_back(std::sin(angle));
    }
    for (int64_t i = 0; i < tokens; ++i)
      temperature.push_back(1 + static_cast<float>(random() % 100) * 1e-2f);
  }

  const Shape& shape;
  int64_t start, tokens;
  std::vector<float> qkv, cos, sin, temperature;
};

// Pages of a sequence in one backend.
struct Pages {
  Pages(Backend& backend, const Sequence& sequence) {
    for (int64_t t = 0; t < sequence.tokens; t += kPageTokens) {
      buffers.push_back(backend.allocate(sequence.shape.layout().page_bytes()));
      table.push_back(buffers.back().data());
    }
  }
  std::vector<Buffer> buffers;
  std::vector<void*> table;
};

struct Piece {
  const Sequence* sequence;
  Pages* pages;
  int64_t first, count;  // rows of the sequence
};

// One call of attention over pieces of sequences; results in the order of the pieces.
std::vector<float> attend(Backend& backend, const Shape& shape, const std::vector<Piece>& pieces) {
  std::vector<float> qkv, cos, sin, temperature;
  std::vector<AttentionSegment> segments;
  int64_t rows = 0;
  const auto copy = [](std::vector<float>& to, const std::vector<float>& from, int64_t first,
                       int64_t count, int64_t cols) {
    to.insert(to.end(), from.begin() + first * cols, from.begin() + (first + count) * cols);
  };
  for (const Piece& piece : pieces) {
    const Sequence& sequence = *piece.sequence;
    copy(qkv, sequence.qkv, piece.first, piece.count, shape.cols());
    copy(cos, sequence.cos, piece.first, piece.count, shape.head_dim / 2);
    copy(sin, sequence.sin, piece.first, piece.count, shape.head_dim / 2);
    copy(temperature, sequence.temperature, piece.first, piece.count, 1);
    AttentionSegment& segment = segments.emplace_back();
    segment.first_row = rows;
    segment.rows = piece.count;
    segment.position = sequence.start + piece.first;
    segment.first_position = sequence.start;
    segment.open = piece.pages->table;
    rows += piece.count;
  }
  AttentionInput input;
  input.qkv = {qkv.data(), rows, shape.cols()};
  input.heads = shape.heads;
  input.layout = shape.layout();
  if (shape.rope) {
    input.cos = cos.data();
    input.sin = sin.data();
  }
  input.qk_norm = shape.norm;
  input.qk_norm_eps = 1e-5f;
  if (shape.temperature) input.temperature = temperature.data();
  input.segments = segments;
  std::vector<float> out(rows * shape.out_cols());
  backend.attention({out.data(), rows, shape.out_cols()}, input);
  backend.to_host(nullptr, {nullptr, 0, 0});  // of a device: it has been done
  return out;
}

std::vector<float> attend_whole(Backend& backend, const Sequence& sequence) {
  Pages pages(backend, sequence);
  return attend(backend, sequence.shape, {{&sequence, &pages, 0, sequence.tokens}});
}

double largest(const std::vector<float>& values) {
  double most = 0;
  for (const float value : values) most = std::max(most, std::abs(static_cast<double>(value)));
  return most;
}

// How far fp32 may be from the reference. A score is a sum of head_dim products of values that went
// through RoPE, norm and scale; a relative error of exp(score), twice (weight and total), and the
// sums over at most one leaf, whose roundings have random signs (4 standard deviations taken).
// bfloat16 pages: a key or value next to a rounding boundary may fall to the other side; one
// channel of a score and one value are granted. That is also more than is lost where queries and
// weights are rounded to bfloat16: of a score, whose n terms are products of standard normal
// values, 4 standard deviations are 4 / sqrt(12) sqrt(n) kEpsBF16, while the largest of thousands
// of channels, squared, is above 20; of a weight half of kEpsBF16.
double attention_bound(const Sequence& sequence) {
  const Shape& shape = sequence.shape;
  const auto n = static_cast<double>(shape.head_dim);
  // RoPE can make sqrt(2) of a value; after the norm |q| = |k| = sqrt(n), so a value is at most
  // sqrt(n).
  double value = largest(sequence.qkv), length = value * std::sqrt(n);
  double channel = value * std::sqrt(2.0);
  if (shape.norm) {
    length = std::sqrt(n);
    channel = std::min(channel / 0.5, length);  // norms below half of the usual are not seen here
  }
  const double factor = (shape.temperature ? 2 : 1) / std::sqrt(n);
  double score = (n + 32) * kEps * length * length * factor;
  double added = 0;
  if (shape.page_type == DType::kBF16) {
    score += 2 * kEpsBF16 * channel * channel * factor;
    added = 2 * kEpsBF16 * value;
  }
  const auto terms = static_cast<double>(std::min<int64_t>(sequence.tokens, 2048));
  return value * (4 * score + (4 * std::sqrt(terms) + 32) * kEps) + added;
}

const Shape kShapes[] = {
    {4, 2, 24, DType::kF32, true, true, false},   {5, 1, 16, DType::kF32, false, false, true},
    {6, 3, 18, DType::kBF16, true, false, false}, {3, 3, 128, DType::kBF16, false, false, true},
    {2, 1, 34, DType::kBF16, true, true, true},   {1, 1, 2, DType::kF32, true, false, false},
    {11, 1, 4, DType::kF32, false, false, false}, {10, 2, 64, DType::kBF16, true, true, false},
};

}  // namespace

TEST(attention_is_near_the_reference) {
  std::mt19937 random(1);
  const std::pair<int64_t, int64_t> places[] = {{8192, 257}, {0, 1}, {512, 40}, {0, 300}};
  for (const Shape& shape : kShapes)
    for (const auto& [start, tokens] : std::span(places).first(check::trials(4))) {
      const Sequence sequence(random, shape, start, tokens);
      const std::vector<float> expected = attend_whole(ref(), sequence);
      const std::vector<double> bound(expected.size(), attention_bound(sequence));
      for (std::vector<Named>& same_isa : subjects()) {
        const std::vector<float> got = attend_whole(*same_isa[0].backend, sequence);
        check_close("attention on " + same_isa[0].name, got, expected, bound);
        for (Named& other : same_isa)
          check_same_bits("attention on " + other.name,
                          attend_whole(*other.backend, sequence).data(), got.data(), got.size());
      }
    }
}

// Several leaves: the last rows of a long sequence, one at a time, as a decoder would.
TEST(long_contexts_are_near_the_reference) {
  std::mt19937 random(2);
  const Shape shape{2, 1, 8, DType::kF32, true, false, true};
  const int64_t prompt = kLongContext, decoded = 3;
  const Sequence sequence(random, shape, 0, prompt + decoded);
  std::vector<float> expected;
  {
    Pages pages(ref(), sequence);
    attend(ref(), shape, {{&sequence, &pages, 0, prompt}});
    for (int64_t i = 0; i < decoded; ++i) {
      const auto row = attend(ref(), shape, {{&sequence, &pages, prompt + i, 1}});
      expected.insert(expected.end(), row.begin(), row.end());
    }
  }
  const std::vector<double> bound(expected.size(), attention_bound(sequence));
  for (std::vector<Named>& same_isa : subjects()) {
    std::vector<float> first;
    for (Named& cpu : same_isa) {
      const std::vector<float> whole = attend_whole(*cpu.backend, sequence);
      Pages pages(*cpu.backend, sequence);
      attend(*cpu.backend, shape, {{&sequence, &pages, 0, prompt}});
      std::vector<float> got;
      for (int64_t i = 0; i < decoded; ++i) {
        const auto row = attend(*cpu.backend, shape, {{&sequence, &pages, prompt + i, 1}});
        got.insert(got.end(), row.begin(), row.end());
      }
      check_close("decode on " + cpu.name, got, expected, bound);
      check_same_bits("decode and prefill on " + cpu.name, got.data(),
                      whole.data() + prompt * shape.out_cols(), got.size());
      if (first.empty()) first = got;
      check_same_bits("decode on " + cpu.name, got.data(), first.data(), got.size());
    }
  }
}

// More leaves than are worked on at once: one row over pages whose contents are drawn at random.
TEST(many_leaves_are_near_the_reference) {
  std::mt19937 random(8);
  const Shape shape{2, 1, 8, DType::kF32, false, false, false};
  const int64_t tokens = kVeryLongContext;
  Sequence sequence(random, shape, 0, tokens);
  Pages pages(ref(), sequence);
  for (Buffer& page : pages.buffers) {
    const std::vector<float> values =
        randoms(random, static_cast<int64_t>(page.bytes() / sizeof(float)));
    std::copy(values.begin(), values.end(), page.floats());
  }
  const Piece last{&sequence, &pages, tokens - 1, 1};
  const std::vector<float> expected = attend(ref(), shape, {last});
  const std::vector<double> bound(expected.size(), attention_bound(sequence));
  const Sequence company(random, shape, 0, 300);  // of few leaves, in the same call
  for (std::vector<Named>& same_isa : subjects()) {
    const std::vector<float> first = attend(*same_isa[0].backend, shape, {last});
    check_close("many leaves on " + same_isa[0].name, first, expected, bound);
    std::vector<float> both = attend_whole(*same_isa[0].backend, company);
    both.erase(both.begin(), both.end() - shape.out_cols());
    both.insert(both.begin(), first.begin(), first.end());
    for (Named& cpu : same_isa) {
      check_same_bits("many leaves on " + cpu.name, attend(*cpu.backend, shape, {last}).data(),
                      first.data(), first.size());
      Pages its(*cpu.backend, company);
      attend(*cpu.backend, shape, {{&company, &its, 0, 299}});
      const std::vector<float> got = attend(*cpu.backend, shape, {last, {&company, &its, 299, 1}});
      check_same_bits("few leaves beside many on " + cpu.name, got.data(), both.data(),
                      both.size());
    }
  }
}

// The softmax must neither overflow nor lose the largest weight: in each page one token scores a
// thousand more than, or less than, all of the page before, and its value is what comes out.
TEST(scores_may_be_of_any_size) {
  std::mt19937 random(9);
  const Shape shape{2, 1, 4, DType::kF32, false, false, false};
  const int64_t tokens = 3 * kPageTokens + 5;
  for (const bool rising : {true, false}) {
    Sequence sequence(random, shape, 0, tokens);
    for (int64_t t = 0; t < tokens; ++t) {
      float* row = sequence.qkv.data() + t * shape.cols();
      const auto page = static_cast<float>(rising ? t / kPageTokens : 3 - t / kPageTokens);
      for (int c = 0; c < 8; ++c) row[c] = 1;                                             // queries
      for (int c = 8; c < 12; ++c) row[c] = t % kPageTokens == 3 ? 500 * (page + 1) : 0;  // key
    }
    const int64_t best = rising ? tokens - 2 : 3;
    const float* const value = sequence.qkv.data() + best * shape.cols() + 12;
    for (std::vector<Named>& same_isa : subjects()) {
      const std::vector<float> out = attend_whole(*same_isa[0].backend, sequence);
      const float* const last = out.data() + (tokens - 1) * shape.out_cols();
      for (int c = 0; c < 8; ++c) CHECK_EQ(last[c], value[c % 4]);
    }
  }
}

TEST(any_cut_of_a_prompt_gives_the_same_bits) {
  std::mt19937 random(3);
  for (const Shape& shape : kShapes) {
    const Sequence sequence(random, shape, 256, kPrompt);
    for (std::vector<Named>& same_isa : subjects())
      for (Named& cpu : std::span(same_isa).first(kBatched)) {
        const std::vector<float> whole = attend_whole(*cpu.backend, sequence);
        Pages pages(*cpu.backend, sequence);
        std::vector<float> pieces;
        for (int64_t done = 0; done < sequence.tokens;) {
          const int64_t limits[] = {1, 7, 90, 300};
          const int64_t piece = std::min<int64_t>(
              sequence.tokens - done, 1 + static_cast<int64_t>(random() % limits[random() % 4]));
          const auto rows = attend(*cpu.backend, shape, {{&sequence, &pages, done, piece}});
          pieces.insert(pieces.end(), rows.begin(), rows.end());
          done += piece;
        }
        check_same_bits("cuts on " + cpu.name, pieces.data(), whole.data(), whole.size());
      }
  }
}

TEST(a_batch_gives_each_sequence_its_own_result) {
  std::mt19937 random(4);
  for (const Shape& shape : kShapes) {
    const Sequence a(random, shape, 0, 290), b(random, shape, 8192, 265), c(random, shape, 64, 1);
    for (std::vector<Named>& same_isa : subjects())
      for (Named& cpu : std::span(same_isa).first(kBatched)) {
        Backend& backend = *cpu.backend;
        Pages pages_a(backend, a), pages_b(backend, b), pages_c(backend, c);
        // Most of a and of b alone, then the rest, which sees full pages, beside each other and c.
        attend(backend, shape, {{&a, &pages_a, 0, 270}});
        attend(backend, shape, {{&b, &pages_b, 0, 250}});
        const std::vector<float> together =
            attend(backend, shape,
                   {{&b, &pages_b, 250, 15}, {&a, &pages_a, 270, 20}, {&c, &pages_c, 0, 1}});
        std::vector<float> alone = attend_whole(backend, b);
        alone.erase(alone.begin(), alone.begin() + 250 * shape.out_cols());
        const std::vector<float> rest = attend_whole(backend, a), last = attend_whole(backend, c);
        alone.insert(alone.end(), rest.begin() + 270 * shape.out_cols(), rest.end());
        alone.insert(alone.end(), last.begin(), last.end());
        check_same_bits("batch on " + cpu.name, together.data(), alone.data(), alone.size());
      }
  }
}

TEST(pages_are_in_the_stated_layout) {
  std::mt19937 random(5);
  const Shape shape{2, 2, 6, DType::kBF16, false, false, false};
  const Sequence sequence(random, shape, 0, 270);
  std::vector<Backend*> all = {&ref()};
  for (std::vector<Named>& same_isa : subjects()) all.push_back(same_isa.back().backend.get());
  const KvPageLayout layout = shape.layout();
  for (Backend* backend : all) {
    Pages pages(*backend, sequence);
    attend(*backend, shape, {{&sequence, &pages, 0, sequence.tokens}});
    int64_t wrong = 0;
    for (int64_t t = 0; t < 2 * kPageTokens; ++t)
      for (int64_t head = 0; head < 2; ++head)
        for (int64_t c = 0; c < 6; ++c) {
          const auto* page = static_cast<const char*>(pages.table[t / kPageTokens]);
          const auto* keys = reinterpret_cast<const uint16_t*>(page + layout.key_offset(head));
          const auto* values = reinterpret_cast<const uint16_t*>(page + layout.value_offset(head));
          const bool held = t < sequence.tokens;
          const float* row = sequence.qkv.data() + t * shape.cols();
          wrong += keys[layout.key_index(t % kPageTokens, c)] !=
                   (held ? bf16_of_float(row[(2 + head) * 6 + c]) : 0);
          wrong += values[layout.value_index(t % kPageTokens, c)] !=
                   (held ? bf16_of_float(row[(4 + head) * 6 + c]) : 0);
        }
    CHECK_EQ(wrong, 0);
  }
}

TEST(vision_attention) {
  std::mt19937 random(6);
  const std::array<int64_t, 4> shapes[] = {
      {3, 17, 2, 24}, {1, 65, 1, 66}, {1, 1, 1, 2}, {2, 577, 2, 22}};
  for (const auto& [tiles, tokens, heads, n] :
       std::span(shapes).first(check::trials(4) < 4 ? 2 : 4))
    for (const DType operands : {DType::kF32, DType::kBF16}) {
      const int64_t cols = 3 * heads * n, out_cols = heads * n;
      const std::vector<float> qkv = randoms(random, tiles * tokens * cols);
      std::vector<float> cos, sin;
      for (int64_t i = 0; i < tokens * n / 2; ++i) {
        const float angle = static_cast<float>(random() % 10000) * 1e-3f;
        cos.push_back(std::cos(angle));
        sin.push_back(std::sin(angle));
      }
      const auto run = [&](Backend& backend, int64_t first, int64_t count) {
        std::vector<float> scratch(qkv.begin() + first * tokens * cols,
                                   qkv.begin() + (first + count) * tokens * cols);
        std::vector<float> out(count * tokens * out_cols);
        backend.vision_attention({out.data(), count * tokens, out_cols},
                                 {scratch.data(), count * tokens, cols}, count, tokens, heads,
                                 cos.data(), sin.data(), operands);
        return out;
      };
      const std::vector<float> expected = run(ref(), 0, tiles);
      const Shape shape{heads, heads, n, operands, true, false, false};
      Sequence sequence(random, shape, 0, tokens);
      sequence.qkv = qkv;  // for the size of its values
      // In bfloat16 queries are rounded as keys are, and weights as values are.
      const int roundings = operands == DType::kBF16 ? 2 : 1;
      const std::vector<double> bound(expected.size(), roundings * attention_bound(sequence));
      for (std::vector<Named>& same_isa : subjects()) {
        const std::vector<float> got = run(*same_isa[0].backend, 0, tiles);
        check_close("vision attention on " + same_isa[0].name, got, expected, bound);
        for (Named& other : same_isa) {
          const std::string what = "vision attention on " + other.name;
          check_same_bits(what, run(*other.backend, 0, tiles).data(), got.data(), got.size());
          check_same_bits(what + ", last tile alone", run(*other.backend, tiles - 1, 1).data(),
                          got.data() + (tiles - 1) * tokens * out_cols, tokens * out_cols);
        }
      }
    }
}

TEST(wrong_attention_is_refused) {
  std::mt19937 random(7);
  const Shape shape{2, 1, 4, DType::kF32, false, false, false};
  const Sequence sequence(random, shape, 0, 300);
  std::vector<Backend*> all = {&ref()};
  for (std::vector<Named>& same_isa : subjects()) all.push_back(same_isa.back().backend.get());
  for (Backend* backend : all) {
    Pages pages(*backend, sequence);
    pages.table.pop_back();
    CHECK_THROWS(ErrorCode::kInternal, attend(*backend, shape, {{&sequence, &pages, 0, 300}}));
    pages.table.push_back(nullptr);
    CHECK_THROWS(ErrorCode::kInternal, attend(*backend, shape, {{&sequence, &pages, 0, 300}}));
    const Shape uneven{3, 2, 4, DType::kF32, false, false, false};
    const Sequence other(random, uneven, 0, 2);
    Pages its(*backend, other);
    CHECK_THROWS(ErrorCode::kInternal, attend(*backend, uneven, {{&other, &its, 0, 2}}));
    const Shape eight{2, 1, 4, DType::kI8, false, false, false};
    CHECK_THROWS(ErrorCode::kUnsupported, attend(*backend, eight, {{&other, &its, 0, 1}}));
  }
}
