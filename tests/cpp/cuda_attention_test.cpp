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
