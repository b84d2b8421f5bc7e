// Attention of the CUDA backend on the emulator:
#include "cuda_subjects.h"

// by the tests of every backend.
#include "backend_attention_test.cpp"

// Several groups of pages on the tensor cores, for few rows and for many, which have kernels of
// their own: near the reference, and with the same bits. The last rows are on both sides of the end
// of a group; what follows them in their page was never written.
TEST(groups_of_pages_are_near_the_reference) {
  std::mt19937 random(10);
  const Shape shape{5, 1, 64, DType::kBF16, false, false, false};
  const int64_t many = 100, few = 3, tokens = 16 * kPageTokens + 9;
  const Sequence sequence(random, shape, 0, tokens);
  Pages pages(ref(), sequence);
  for (Buffer& page : pages.buffers) {
    auto* const values = static_cast<uint16_t*>(page.data());
    const bool last = &page == &pages.buffers.back();
    for (size_t i = 0; i < page.bytes() / sizeof(uint16_t); ++i)
      values[i] = bf16_of_float(last ? NAN : randoms(random, 1)[0]);
  }
  const auto last = [&](int64_t rows) { return Piece{&sequence, &pages, tokens - rows, rows}; };
  const std::vector<float> expected = attend(ref(), shape, {last(many)});
  const std::vector<double> bound(expected.size(), attention_bound(sequence));
  for (Named& subject : subjects()[0]) {
    const std::vector<float> got = attend(*subject.backend, shape, {last(many)});
    check_close("many rows on " + subject.name, got, expected, bound);
    const std::vector<float> rows = attend(*subject.backend, shape, {last(few)});
    check_same_bits("few rows on " + subject.name, rows.data(),
                    got.data() + (many - few) * shape.out_cols(), rows.size());
  }
}

// Heads of rows that are appended by their attention are turned there.
TEST(rows_turned_by_attention_have_the_bits_of_rows_turned_before) {
  std::mt19937 random(12);
  for (const Shape& shape : {Shape{6, 2, 64, DType::kBF16, true, true, true},
                             Shape{3, 3, 128, DType::kBF16, true, false, false}}) {
    const Sequence first(random, shape, 0, 20), second(random, shape, 512, 270);
    const auto result = [&](int ordinal, size_t batch_kernels) {
      const auto backend = make_cuda_backend(emulator::device_table(), ordinal,
                                             make_cpu_backend({"", 1}), batch_kernels);
      Pages first_pages(*backend, first), second_pages(*backend, second);
      attend(*backend, shape, {{&first, &first_pages, 0, 19}, {&second, &second_pages, 0, 269}});
      return attend(*backend, shape,
                    {{&first, &first_pages, 19, 1}, {&second, &second_pages, 269, 1}});
    };
    const std::vector<float> before = result(0, 1);
    for (const int ordinal : ordinals()) CHECK(result(ordinal, 0) == before);
  }
}

// What attention_bound() grants is for any values. Standard normal ones lose far less to roundings
// to bfloat16: of a score, over sqrt(n), 4 standard deviations of a half of kEpsBF16, evenly
// spread, in each of n terms, for queries and for keys; of an output, twice that, and a half of
// kEpsBF16 for its weights and for its values.
double rounding_bound(const std::vector<float>& qkv) {
  const double score = 4 / std::sqrt(12.0) * std::sqrt(2.0) * kEpsBF16;
  return largest(qkv) * (2 * score + kEpsBF16);
}

TEST(roundings_are_all_that_is_lost) {
  std::mt19937 random(11);
  const Shape shape{10, 2, 64, DType::kBF16, true, false, false};
  const Sequence sequence(random, shape, 0, 70);
  const std::vector<float> expected = attend_whole(ref(), sequence);
  const int64_t tokens = 65, heads = 2, n = 66;
  const std::vector<float> qkv = randoms(random, tokens * 3 * heads * n);
  const std::vector<float> cos(tokens * n / 2, std::cos(0.5f)), sin(tokens * n / 2, std::sin(0.5f));
  const auto see = [&](Backend& backend) {
    std::vector<float> scratch = qkv, out(tokens * heads * n);
    backend.vision_attention({out.data(), tokens, heads * n},
                             {scratch.data(), tokens, 3 * heads * n}, 1, tokens, heads, cos.data(),
                             sin.data(), DType::kBF16);
    return out;
  };
  const std::vector<float> seen = see(ref());
  for (Named& subject : subjects()[0]) {
    check_close("attention on " + subject.name, attend_whole(*subject.backend, sequence), expected,
                std::vector<double>(expected.size(), rounding_bound(sequence.qkv)));
    check_close("vision on " + subject.name, see(*subject.backend), seen,
                std::vector<double>(seen.size(), rounding_bound(qkv)));
  }
}
