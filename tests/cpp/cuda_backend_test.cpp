// Every row-wise operation of the CUDA backend on the emulator:
#include <algorithm>
#include <limits>

#include "cuda_subjects.h"

// by the tests of every backend.
#include "backend_test.cpp"

// What the host computes is as near to the reference as what the device computes.
TEST(experts_of_the_host_are_near_the_reference) { check_moe(true); }

// The largest elements, and the weight of all, of rows of every kind.
TEST(candidates_are_the_largest_elements) {
  std::mt19937 random(16);
  const float inf = std::numeric_limits<float>::infinity();
  constexpr int64_t kRows = 8;
  for (const int64_t cols : {1, 40, 2048, 2049, 5003, 9001})
    for (Named& subject : subjects()[0]) {
      const int64_t stride = cols + 1;
      std::vector<float> x = randoms(random, kRows * stride, 4);
      const auto row = [&](int64_t r) { return x.data() + r * stride; };
      const auto at = [&] { return static_cast<int64_t>(random()) % cols; };
      for (int64_t c = 0; c < cols; ++c) {
        row(1)[c] *= 20;                        // few of 32 below the largest
        row(2)[c] = std::floor(row(2)[c]) / 8;  // ties, at the ends of steps
        row(3)[c] = -7;                         // all in one step: too many of them
      }
      row(4)[at()] = inf;
      row(5)[at()] = std::nanf("");
      row(6)[at()] = -inf;
      const std::vector<double> temperatures = {0.6, 1.3, 0.2, 1, 1, 1, 50, 0};
      std::vector<Candidates> all;
      for (int repeat = 0; repeat < 2; ++repeat)
        all = subject.backend->candidates({x.data(), kRows, cols, stride}, temperatures);
      CHECK_EQ(std::ssize(all), kRows);
      for (int64_t r = 0; r < kRows; ++r) {
        std::vector<Candidate>& got = all[static_cast<size_t>(r)].largest;
        const bool is_broken = r == 4 || r == 5 || (r == 6 && cols == 1);
        if (is_broken || r == 7 || (r == 3 && cols > cuda::kMostCandidates)) {
          CHECK(got.empty());
          continue;
        }
        const Candidates& of = all[static_cast<size_t>(r)];
        std::vector<Candidate> order;
        for (int64_t c = 0; c < cols; ++c) order.push_back({row(r)[c], static_cast<int32_t>(c)});
        std::sort(order.begin(), order.end(), is_likelier);
        std::sort(got.begin(), got.end(), is_likelier);
        const auto is_same = [](const Candidate& a, const Candidate& b) {
          return a.id == b.id && a.logit == b.logit;
        };
        CHECK(got.size() <= order.size() && !got.empty());
        CHECK(std::equal(got.begin(), got.end(), order.begin(), is_same));
        // Another step would be too many.
        const auto step = [&](size_t i) {
          return (order[0].logit - order[i].logit) * cuda::kCandidateSteps;
        };
        size_t end = got.size();
        while (end < order.size() && std::floor(step(end)) == std::floor(step(got.size()))) ++end;
        CHECK(got.size() == order.size() || step(got.size()) >= cuda::kCandidateBins ||
              end > cuda::kMostCandidates);
        if (got.size() < order.size()) CHECK(order[got.size()].logit < got.back().logit);
        double total = 0;
        for (int64_t c = 0; c < cols; ++c)
          total += std::exp((static_cast<double>(row(r)[c]) - order[0].logit) /
                            temperatures[static_cast<size_t>(r)]);
        CHECK(std::abs(of.total - total) <= of.error * total);
        CHECK(of.error < 1e-10);
      }
    }
}

// Passes of which every one brings other tables, whose kernels are started one by one, in batches
// of which some are cut anywhere, and at the end of the pass: the third time as graphs. Operations
// that do another's work must not change a bit either.
TEST(passes_in_batches_have_the_bits_of_single_kernels) {
  std::mt19937 random(11);
  // So few rows that the router routes, of experts that more than one of its warps has.
  constexpr int64_t kRows = 2, kHidden = 260, kWidth = 96, kExperts = 11;
  const MoeData experts(random, kHidden, kWidth, kExperts, 2, DType::kBF16);
  const Matrix square = random_matrix(random, kHidden, kHidden, DType::kF32);
  const std::vector<float> weight = randoms(random, kHidden);
  std::vector<std::vector<float>> inputs;
  std::vector<std::vector<int32_t>> orders = {{1, 0}, {0, 1}, {0, 0}, {1, 0}};
  for (size_t pass = 0; pass < orders.size(); ++pass)
    inputs.push_back(randoms(random, kRows * kHidden));

  const auto passes = [&](size_t batch_kernels) {
    const auto backend =
        make_cuda_backend(emulator::device_table(), 0, make_cpu_backend({"", 1}), batch_kernels);
    const MoeWeights moe = experts.load(*backend);
    const MatrixSource part = square.source();
    const WeightRef quantized = backend->load_matrix({&part, 1}, {WeightFormat::kInt8G32});
    const VectorRef norm = load_vector(*backend, weight);
    const Buffer memory[] = {backend->allocate(kRows * kHidden * 4),
                             backend->allocate(kRows * kHidden * 4),
                             backend->allocate(kRows * kHidden * 4)};
    const auto rows = [&](int i) { return Rows(memory[i].floats(), kRows, kHidden); };
    std::vector<std::vector<float>> results;
    for (size_t pass = 0; pass < orders.size(); ++pass) {
      backend->from_host(rows(0), inputs[pass].data());
      backend->gather(rows(1), rows(0), orders[pass]);
      for (int layer = 0; layer < 3; ++layer) {
        backend->rms_norm(rows(2), rows(1), norm, 1e-5f);
        backend->matmul(rows(1), rows(2), quantized, {.accumulate = true});
        backend->rms_norm(rows(2), rows(1), norm, 1e-5f);
        backend->moe(rows(1), rows(2), moe);
      }
      backend->rms_norm(rows(2), rows(1), norm, 1e-5f);
      for (const int i : {1, 2}) {
        results.emplace_back(kRows * kHidden);
        backend->to_host(results.back().data(), rows(i));
      }
    }
    return results;
  };
  const auto single = passes(1);
  CHECK(single[0] != single[2]);
  for (const size_t batch_kernels : {2, 7, 0}) CHECK(passes(batch_kernels) == single);
}

// The same of attention and the product behind it, which takes what attention made as its operand.
TEST(attention_in_batches_has_the_bits_of_single_kernels) {
  std::mt19937 random(12);
  constexpr int64_t kRows = 3, kHeads = 4, kKvHeads = 2, kDim = 128, kHidden = 72;
  constexpr int64_t kCols = (kHeads + 2 * kKvHeads) * kDim;
  const Matrix output = random_matrix(random, kHidden, kHeads * kDim, DType::kF32);
  const std::vector<float> qkv = randoms(random, kRows * kCols);
  const auto result = [&](size_t batch_kernels) {
    const auto backend =
        make_cuda_backend(emulator::device_table(), 0, make_cpu_backend({"", 1}), batch_kernels);
    const MatrixSource part = output.source();
    const WeightRef weight = backend->load_matrix({&part, 1}, {WeightFormat::kInt4G64});
    AttentionInput input;
    input.heads = kHeads;
    input.layout = {DType::kBF16, kKvHeads, kDim};
    const Buffer page = backend->allocate(input.layout.page_bytes());
    const Buffer memory[] = {backend->allocate(kRows * kCols * 4),
                             backend->allocate(kRows * kHeads * kDim * 4),
                             backend->allocate(kRows * kHidden * 4)};
    input.qkv = Rows(memory[0].floats(), kRows, kCols);
    const Rows attended(memory[1].floats(), kRows, kHeads * kDim);
    const Rows out(memory[2].floats(), kRows, kHidden);
    void* const pages[] = {page.data()};
    AttentionSegment segment;
    segment.rows = kRows;
    segment.open = pages;
    input.segments = {&segment, 1};
    backend->from_host(input.qkv, qkv.data());
    backend->attention(attended, input);
    backend->matmul(out, attended, weight);
    std::vector<float> values(kRows * kHidden);
    backend->to_host(values.data(), out);
    return values;
  };
  CHECK(result(0) == result(1));
}
