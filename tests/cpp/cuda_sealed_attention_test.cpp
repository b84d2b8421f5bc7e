// Attention over sealed pages of the CUDA backend on the emulator, and sealing itself, whose bytes
// are the reference's:
#include "cuda_subjects.h"

// by the tests of every backend.
#include "backend_sealed_attention_test.cpp"

// Pages whose values cannot be sealed, or only just: every byte is the reference's, into memory
// that held something else.
TEST(odd_pages_are_sealed_as_the_reference_does) {
  std::mt19937 random(7);
  for (const KvSeal seal : {KvSeal::kInt8, KvSeal::kInt4})
    for (const DType type : {DType::kF32, DType::kBF16}) {
      const Shape shape{2, 2, 21, type, seal};
      Sequence sequence(random, shape, kPageTokens);
      const auto at = [&](int64_t token, int64_t head, int64_t channel) -> float& {
        return sequence.qkv[token * shape.cols() + (shape.heads + head) * shape.head_dim + channel];
      };
      for (int64_t t = 0; t < kPageTokens; ++t) {  // channels of keys
        at(t, 0, 0) = 0;
        at(t, 0, 1) = -3.5f;
        at(t, 0, 2) *= 1e-38f;
        at(t, 0, 3) *= 1e38f;
        at(t, 1, 4) = std::abs(at(t, 1, 4)) + 5;
        at(t, 1, 5) = 1.00001f;  // not a bfloat16
        at(t, 1, 6) = -1.00001f;
      }
      at(17, 1, 7) = NAN;
      at(255, 0, 20) = INFINITY;
      // Tokens of values, which follow the keys.
      for (int64_t c = 0; c < shape.head_dim; ++c) at(4, 2, c) = -2.0f / 3;
      at(9, 3, 2) = -INFINITY;
      at(10, 2, 20) = NAN;
      const auto sealed = [&](Backend& backend) {
        Cache cache(shape);
        cache.sealed.push_back(std::make_shared<std::vector<char>>(shape.sealed_bytes(), '\x5a'));
        attend(backend, shape, {{&sequence, &cache, kPageTokens}}, std::span<const int32_t>{});
        return *cache.sealed[0];
      };
      const std::vector<char> expected = sealed(ref());
      for (Named& subject : subjects()[0]) CHECK(sealed(*subject.backend) == expected);
    }
}
