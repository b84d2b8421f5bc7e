// Every row-wise operation of the CUDA backend on the emulator:
#include <algorithm>
#include <limits>

#define PUNA_TEST_PRODUCTS
#include "cuda_subjects.h"
#include "model/vision_model.h"

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

// Products of bfloat16 by warpgroups have the bits of those of warps: here, where both add up one
// term after the other. A row alone, some that share a part with none, one more than a small tile
// has and than a large one; rows of W and columns that end anywhere; more spans than the ring has.
TEST(products_of_bfloat16_by_warpgroups_have_the_bits_of_warps) {
  std::mt19937 random(17);
  const int64_t shapes[][3] = {{1, 72, 50},    {64, 1, 1},      {65, 300, 70}, {129, 700, 130},
                               {128, 128, 64}, {257, 1100, 60}, {300, 20, 200}};
  for (const auto& [rows, k, n] : shapes) {
    const Matrix weight = random_matrix(random, n, k, DType::kBF16);
    const std::vector<float> x = randoms(random, rows * k), bias = randoms(random, n);
    const std::vector<float> start = randoms(random, rows * (n + 3));
    for (const int epilogue : {0, 1, 2}) {
      std::vector<float> expected;
      for (Named& subject : subjects()[0])
        for (const bool many_rows : {false, true}) {
          const VectorRef bias_ref = load_vector(*subject.backend, bias);
          std::vector<float> out = start;
          subject.backend->matmul(
              {out.data(), rows, n, n + epilogue}, {x.data(), rows, k},
              weight.load(*subject.backend),
              {epilogue > 0 ? &bias_ref : nullptr, epilogue == 1, epilogue == 2, many_rows});
          if (expected.empty()) expected = out;
          check_same_bits("product of " + std::to_string(rows) + " x " + std::to_string(k) + " x " +
                              std::to_string(n) + " on " + subject.name,
                          out.data(), expected.data(), expected.size());
        }
    }
  }
}

// A layer norm makes the operand of the product behind it, where both are noted together.
TEST(rows_rounded_by_a_norm_have_the_bits_of_rows_rounded_apart) {
  std::mt19937 random(18);
  constexpr int64_t kRows = 11, kOut = 40;
  for (const int64_t cols : {60, 300, 1536, 1700}) {
    const Matrix weight = random_matrix(random, kOut, cols, DType::kBF16);
    const std::vector<float> x = randoms(random, kRows * cols), scale = randoms(random, cols),
                             bias = randoms(random, cols);
    const auto result = [&](size_t batch_kernels) {
      const auto backend =
          make_cuda_backend(emulator::device_table(), 1, make_cpu_backend({"", 1}), batch_kernels);
      const WeightRef packed = weight.load(*backend);
      const VectorRef norm = load_vector(*backend, scale), norm_bias = load_vector(*backend, bias);
      const Buffer memory[] = {backend->allocate(kRows * cols * 4),
                               backend->allocate(kRows * cols * 4),
                               backend->allocate(kRows * kOut * 4)};
      const Rows in(memory[0].floats(), kRows, cols), normed(memory[1].floats(), kRows, cols);
      const Rows out(memory[2].floats(), kRows, kOut);
      backend->from_host(in, x.data());
      backend->layer_norm(normed, in, norm, norm_bias, 1e-5f);
      backend->matmul(out, normed, packed);
      std::vector<float> values(kRows * kOut);
      backend->to_host(values.data(), out);
      return values;
    };
    CHECK(result(0) == result(1));
  }
}

// Likewise what a product makes of its rows for the next one, and attention among patches: by
// warpgroups, and on a device that has none.
TEST(rows_rounded_where_they_are_made_have_the_bits_of_rows_rounded_apart) {
  std::mt19937 random(21);
  constexpr int64_t kRows = 150, kTokens = 75, kHeads = 8, kDim = 16, kCols = kHeads * kDim;
  std::vector<Matrix> matrices;
  for (const auto& [rows, cols] : {std::array<int64_t, 2>{3 * kCols, kCols},
                                   {2 * kCols, kCols},
                                   {2 * kCols, 2 * kCols},
                                   {40, 2 * kCols}})
    matrices.push_back(random_matrix(random, rows, cols, DType::kBF16));
  const std::vector<float> x = randoms(random, kRows * kCols), bias = randoms(random, 2 * kCols);
  const std::vector<float> angles(kTokens * kDim / 2, 0.7f);
  const auto results = [&](int ordinal, size_t batch_kernels) {
    const auto backend = make_cuda_backend(emulator::device_table(), ordinal,
                                           make_cpu_backend({"", 1}), batch_kernels);
    std::vector<WeightRef> weights;
    for (const Matrix& matrix : matrices) weights.push_back(matrix.load(*backend));
    const VectorRef added = load_vector(*backend, bias);
    std::vector<Buffer> memory;
    const auto rows = [&](int64_t cols) {
      memory.push_back(backend->allocate(kRows * cols * sizeof(float)));
      return Rows(memory.back().floats(), kRows, cols);
    };
    const Rows in = rows(kCols), qkv = rows(3 * kCols), attended = rows(kCols);
    const Rows inner = rows(2 * kCols), hidden = rows(2 * kCols), out = rows(40);
    backend->from_host(in, x.data());
    backend->matmul(qkv, in, weights[0], {.many_rows = true});
    backend->vision_attention(attended, qkv, kRows / kTokens, kTokens, kHeads, angles.data(),
                              angles.data(), DType::kBF16);
    backend->matmul(inner, attended, weights[1],
                    {.bias = &added, .gelu = true, .many_rows = true, .passing = true});
    backend->matmul(hidden, inner, weights[2], {.accumulate = true, .many_rows = true});
    backend->matmul(out, hidden, weights[3], {.many_rows = true});
    std::vector<std::vector<float>> all;
    for (const Rows& each : {attended, hidden, out}) {
      all.emplace_back(static_cast<size_t>(each.rows * each.cols));
      backend->to_host(all.back().data(), each);
    }
    return all;
  };
  setenv("PUNA_CUDA_PRODUCTS", "warpgroups", 1);  // as for subjects()
  const auto apart = results(0, 1);
  for (const int ordinal : {0, 2, 3}) CHECK(results(ordinal, 0) == apart);
}

namespace {

ModelSpec tiny_tower() {
  ModelSpec spec;
  spec.hidden = 40;
  VisionSpec& vision = spec.vision.emplace();
  vision.image_size = 8;
  vision.patch_size = 2;
  vision.hidden = 48;
  vision.heads = 2;
  vision.layers = 2;
  vision.intermediate = 70;
  vision.adapter_width = 60;
  vision.output_width = 52;
  return spec;
}

VisionParameters tower_parameters(const ModelSpec& spec, Backend& backend, DType dtype) {
  std::mt19937 random(19);
  const VisionSpec& of = *spec.vision;
  const auto matrix = [&](int64_t rows, int64_t cols) {
    return random_matrix(random, rows, cols, dtype).load(backend);
  };
  const auto vector = [&](int64_t count) { return load_vector(backend, randoms(random, count)); };
  VisionParameters made;
  made.patch_embedding = matrix(of.hidden, 3 * of.patch_size * of.patch_size);
  made.adapter1 = matrix(of.adapter_width, 4 * of.hidden);
  made.adapter2 = matrix(of.output_width, of.adapter_width);
  made.projector = matrix(spec.hidden, of.output_width);
  made.positions = vector((of.grid() * of.grid() + 1) * of.hidden);
  for (VectorRef* const each : {&made.class_embedding, &made.pre_norm, &made.pre_norm_bias,
                                &made.post_norm, &made.post_norm_bias})
    *each = vector(of.hidden);
  for (int64_t i = 0; i < of.layers; ++i) {
    VisionParameters::Layer& layer = made.layers.emplace_back();
    for (VectorRef* const each : {&layer.input_norm, &layer.input_norm_bias, &layer.post_norm,
                                  &layer.post_norm_bias, &layer.output_bias, &layer.fc2_bias})
      *each = vector(of.hidden);
    layer.qkv_bias = vector(3 * of.hidden);
    layer.fc1_bias = vector(of.intermediate);
    layer.qkv = matrix(3 * of.hidden, of.hidden);
    layer.output = matrix(of.hidden, of.hidden);
    layer.fc1 = matrix(of.intermediate, of.hidden);
    layer.fc2 = matrix(of.hidden, of.intermediate);
  }
  return made;
}

}  // namespace

// A GPU encodes tiles together, as many as there is memory for: a tile's bits do not tell.
TEST(tiles_encoded_together_have_the_bits_of_tiles_alone) {
  std::mt19937 random(20);
  const ModelSpec spec = tiny_tower();
  const int64_t tiles = 5, pixels = 3 * spec.vision->image_size * spec.vision->image_size;
  const std::vector<float> image = randoms(random, tiles * pixels);
  // In calls of so many tiles.
  const auto encoded = [&](Backend& backend, DType dtype, int64_t each) {
    VisionModel model(spec, tower_parameters(spec, backend, dtype), backend);
    const int64_t rows = model.tokens_per_tile();
    const Buffer out = backend.allocate(tiles * rows * spec.hidden * sizeof(float));
    for (int64_t first = 0; first < tiles; first += each) {
      const int64_t count = std::min(each, tiles - first);
      model.encode({out.floats() + first * rows * spec.hidden, count * rows, spec.hidden},
                   std::span(image).subspan(first * pixels, count * pixels), count, {});
    }
    std::vector<float> values(tiles * rows * spec.hidden);
    backend.to_host(values.data(), {out.floats(), tiles * rows, spec.hidden});
    return values;
  };
  const std::vector<float> expected = encoded(ref(), DType::kF32, tiles);
  double largest = 0;
  for (const float value : expected) largest = std::max(largest, std::abs(double{value}));
  for (Named& subject : subjects()[0]) {
    Backend& backend = *subject.backend;
    // A few hundred roundings of fp32 deep.
    check_close("tiles on " + subject.name, encoded(backend, DType::kF32, tiles), expected,
                std::vector<double>(expected.size(), 1e-4 * largest));
    const std::vector<float> together = encoded(backend, DType::kBF16, tiles);
    check_same_bits("tiles alone on " + subject.name, encoded(backend, DType::kBF16, 1).data(),
                    together.data(), together.size());
    // Memory for two tiles at a time, then for one.
    for (const char* const memory : {"400000", "1"}) {
      setenv("EMULATOR_MEMORY", memory, 1);
      check_same_bits("tiles in little memory on " + subject.name,
                      encoded(backend, DType::kBF16, tiles).data(), together.data(),
                      together.size());
      unsetenv("EMULATOR_MEMORY");
    }
  }
}

// What the device does at best is measured by kernels that must be in order like the others.
TEST(exercises_run_on_every_device) {
  const cuda::DeviceTable& table = emulator::device_table();
  int count = 0;
  table.device_count(&count);
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    void *device = nullptr, *memory = nullptr;
    constexpr int64_t kBytes = 100 * 16;  // not as many as threads load
    CHECK_EQ(table.open(ordinal, nullptr, &device), 0);
    CHECK_EQ(table.allocate(device, kBytes, &memory), 0);
    for (int32_t kind = cuda::kExerciseRead; kind <= cuda::kExerciseWarpgroupsBF16; ++kind) {
      const cuda::ExerciseCall call = {.data = memory,
                                       .bytes = kBytes,
                                       .rounds = 2,
                                       .out = static_cast<int32_t*>(memory),
                                       .kind = kind,
                                       .blocks = 2};
      CHECK_EQ(table.exercise(device, &call), 0);
      CHECK_EQ(table.synchronise(device), 0);
    }
    CHECK_EQ(table.release(device, memory), 0);
    table.close(device);
  }
}
