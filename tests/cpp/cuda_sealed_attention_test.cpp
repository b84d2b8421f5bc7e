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

// How many pages in a row blocks take, instead of what the backend chooses.
int32_t forced_run = 1;
int attend_by_forced_runs(void* device, const cuda::AttendCall* call) {
  cuda::AttendCall forced = *call;
  if (call->kind == cuda::kAttendPages) forced.run_pages = forced_run;
  return emulator::device_table().attend(device, &forced);
}

// The pages of a cache that holds so many full pages, and part of one, with any contents: codes of
// all kinds, and what nobody has written is no number.
void fill(std::mt19937& random, Cache& cache, int64_t pages, int64_t tokens) {
  const Shape& shape = *cache.shape;
  const std::vector<float> values = randoms(random, 1009);
  cache.length = pages * kPageTokens + tokens;
  for (int64_t page = 0; page <= pages; ++page) {
    const bool open = page == pages;
    const size_t bytes = open ? shape.open().page_bytes() : shape.sealed_bytes();
    auto& of = *(open ? cache.open : cache.sealed)
                    .emplace_back(std::make_shared<std::vector<char>>(bytes));
    auto* const words = reinterpret_cast<uint16_t*>(of.data());
    const size_t codes = open || shape.seal == KvSeal::kNone
                             ? 0
                             : shape.sealed().key_scale_offset(0) / sizeof(uint16_t);
    for (size_t i = 0; i < bytes / sizeof(uint16_t); ++i)
      words[i] = i < codes ? static_cast<uint16_t>(random())
                           : bf16_of_float(values[random() % values.size()]);
    const KvPageLayout layout = shape.open();
    for (int64_t token = tokens; open && token < kPageTokens; ++token)
      for (int64_t head = 0; head < shape.kv_heads; ++head)
        for (int64_t c = 0; c < shape.head_dim; ++c) {
          const auto at = [&](size_t offset, int64_t index) -> uint16_t& {
            return reinterpret_cast<uint16_t*>(of.data() + offset)[index];
          };
          at(layout.key_offset(head), layout.key_index(token, c)) = bf16_of_float(NAN);
          at(layout.value_offset(head), layout.value_index(token, c)) = bf16_of_float(NAN);
        }
  }
}

// A block may take any number of pages in a row, which ends at the end of a group of pages or of a
// sequence; a last page that is open may be beside others or alone. The bits are those of many
// rows, which have a kernel of their own.
TEST(runs_of_pages_change_nothing) {
  std::mt19937 random(8);
  cuda::DeviceTable table = emulator::device_table();
  table.attend = attend_by_forced_runs;
  const int64_t many = 10, few = 3;
  for (const auto& [dim, seal] : {std::pair<int64_t, KvSeal>{64, KvSeal::kNone},
                                  {64, KvSeal::kInt8},
                                  {64, KvSeal::kInt4},
                                  {128, KvSeal::kNone},
                                  {128, KvSeal::kInt8},
                                  {128, KvSeal::kInt4}}) {
    const Shape shape{5, 1, dim, DType::kBF16, seal};
    // Full pages, beyond the end of a group and within one, and tokens of the last page.
    std::vector<std::pair<int64_t, int64_t>> lengths = {{2, 240}};
    if (dim == 64) lengths = {{18, 77}, {1, 64}};
    std::vector<Sequence> sequences;
    std::vector<Cache> caches;
    for (const auto& [pages, tokens] : lengths) {
      sequences.emplace_back(random, shape, pages * kPageTokens + tokens);
      fill(random, caches.emplace_back(shape), pages, tokens - many);
    }
    const auto last = [&](Backend& backend, int64_t rows) {
      std::vector<Piece> pieces;
      for (size_t i = 0; i < caches.size(); ++i) {
        caches[i].length = sequences[i].tokens - rows;
        pieces.push_back({&sequences[i], &caches[i], rows});
      }
      return attend(backend, shape, pieces);
    };
    const std::vector<float> whole = last(*subjects()[0][0].backend, many);
    std::vector<float> expected;
    for (size_t i = 0; i < caches.size(); ++i) {
      const auto end = whole.begin() + static_cast<int64_t>(i + 1) * many * shape.out_cols();
      expected.insert(expected.end(), end - few * shape.out_cols(), end);
    }
    for (const int ordinal : ordinals()) {
      const auto backend = make_cuda_backend(table, ordinal, make_cpu_backend({"", 1}), 1);
      // The longest first: states that are not there yet would be found from the runs before.
      for (const int32_t run : {16, 8, 4, 2, 1}) {
        forced_run = run;
        check_same_bits("runs of " + std::to_string(run) + " on " + backend->description(),
                        last(*backend, few).data(), expected.data(), expected.size());
      }
    }
  }
}

// Rows that each have a tile are appended by the block that attends to their page: the first token
// of all, one beyond whole pages, and one within a page; runs that end with that page, and that are
// it alone. A row beside another of its sequence, and heads that fill two tiles, have it done
// before.
TEST(rows_appended_by_attention_have_the_bits_of_rows_appended_before) {
  std::mt19937 random(9);
  cuda::DeviceTable table = emulator::device_table();
  table.attend = attend_by_forced_runs;
  using Wanted = std::optional<std::span<const int32_t>>;
  const auto compare = [&](const Shape& shape,
                           const std::vector<std::pair<int64_t, int64_t>>& lengths,
                           const std::vector<int64_t>& rows, const Wanted& wanted = {}) {
    std::vector<Sequence> sequences;
    std::vector<Cache> caches;
    for (const auto& [pages, tokens] : lengths) {
      sequences.emplace_back(random, shape, pages * kPageTokens + tokens + 2);
      fill(random, caches.emplace_back(shape), pages, tokens);
    }
    // What comes out, and the open pages.
    const auto results = [&](int ordinal, size_t batch_kernels) {
      const auto backend =
          make_cuda_backend(table, ordinal, make_cpu_backend({"", 1}), batch_kernels);
      std::vector<Cache> copies = caches;
      std::vector<Piece> pieces;
      std::vector<Page> open;
      for (size_t i = 0; i < copies.size(); ++i) {
        Page& page = copies[i].open.front();
        page = std::make_shared<std::vector<char>>(*page);
        open.push_back(page);
        pieces.push_back({&sequences[i], &copies[i], rows[i]});
      }
      std::pair<std::vector<float>, std::vector<std::vector<char>>> of;
      of.first = attend(*backend, shape, pieces, wanted);
      for (const Page& page : open) of.second.push_back(*page);
      return of;
    };
    forced_run = 1;
    const auto apart = results(0, 1);
    CHECK(std::ranges::none_of(apart.first, [](float value) { return std::isnan(value); }));
    for (const int ordinal : ordinals())
      for (const int32_t run : {1, 4}) {
        forced_run = run;
        CHECK(results(ordinal, 0) == apart);
      }
  };
  for (const int64_t dim : {64, 128})
    for (const KvSeal seal : {KvSeal::kNone, KvSeal::kInt8, KvSeal::kInt4})
      compare({6, 2, dim, DType::kBF16, seal}, {{0, 0}, {1, 0}, {2, 77}}, {1, 1, 1});
  compare({20, 2, 64, DType::kBF16, KvSeal::kNone}, {{1, 255}, {0, 17}}, {1, 1});
  compare({16, 1, 64, DType::kBF16, KvSeal::kNone}, {{0, 90}, {0, 17}}, {2, 1});
  // As many tiles as rows, but of one of these.
  compare({17, 1, 64, DType::kBF16, KvSeal::kNone}, {{0, 3}, {0, 9}}, {1, 1},
          std::vector<int32_t>{1});
  // Each row has a page to itself, but the second sees the first one's.
  compare({6, 2, 64, DType::kBF16, KvSeal::kNone}, {{1, 255}, {0, 17}}, {2, 1});
  compare({17, 1, 64, DType::kBF16, KvSeal::kNone}, {{0, 90}}, {1});
}
