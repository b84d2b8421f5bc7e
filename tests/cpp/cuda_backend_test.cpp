// Every row-wise operation of the CUDA backend on the emulator:
#include "cuda_subjects.h"

// by the tests of every backend.
#include "backend_test.cpp"

// What the host computes is as near to the reference as what the device computes.
TEST(experts_of_the_host_are_near_the_reference) { check_moe(true); }

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
