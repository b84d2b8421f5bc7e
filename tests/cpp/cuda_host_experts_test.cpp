// Routed experts that the CUDA backend leaves to the host: with quantised weights every bit is that
// of experts on the device, in passes as a model makes them, whether the CPU computes them or their
// matrices are sent to the device.
#include <algorithm>
#include <array>

#include "backend/cuda/expert_window.h"
#include "cuda_subjects.h"
#include "environment_variable.h"
#include "kernels/cpu/dispatch.h"

using namespace fixture;

namespace {

struct Shape {
  int64_t rows, hidden, width, experts, top_k;
  WeightFormat format;
};
// Few rows, which the router's own kernel routes, and many; widths that are no whole blocks.
constexpr Shape kShapes[] = {
    {1, 260, 96, 11, 1, WeightFormat::kInt4G32},
    {3, 136, 72, 5, 2, WeightFormat::kInt8G32},
    {5, 72, 130, 6, 3, WeightFormat::kTable4G32},
    {37, 384, 128, 4, 1, WeightFormat::kInt4MinG64},
};
constexpr int kPasses = 3;

// What passes through layers give, whose experts are on the host where `on_host` says so, and sent
// to the device of so many rows.
std::vector<std::vector<float>> results(const Shape& shape, std::span<const MoeData> layers,
                                        std::span<const bool> on_host, size_t batch_kernels,
                                        const BackendOptions& host, const char* sent_rows) {
  const Variable sent("PUNA_CUDA_SENT_ROWS", sent_rows);
  const auto backend =
      make_cuda_backend(emulator::device_table(), 1, make_cpu_backend(host), batch_kernels);
  std::vector<MoeWeights> weights;
  for (size_t l = 0; l < layers.size(); ++l)
    weights.push_back(layers[l].load(*backend, on_host[l], shape.format));
  const int64_t stride = shape.hidden + 4;
  const Buffer memory[] = {backend->allocate(static_cast<size_t>(shape.rows * stride) * 4),
                           backend->allocate(static_cast<size_t>(shape.rows * stride) * 4)};
  const Rows hidden(memory[0].floats(), shape.rows, shape.hidden, stride);
  const Rows normed(memory[1].floats(), shape.rows, shape.hidden, stride);
  std::mt19937 random(17);
  const VectorRef norm = load_vector(*backend, randoms(random, shape.hidden));
  std::vector<std::vector<float>> all;
  for (int pass = 0; pass < kPasses; ++pass) {
    backend->from_host(hidden, randoms(random, shape.rows * shape.hidden).data());
    for (const MoeWeights& layer : weights) {
      backend->rms_norm(normed, hidden, norm, 1e-5f);
      backend->moe(hidden, normed, layer);
    }
    backend->rms_norm(normed, hidden, norm, 1e-5f);
    for (const ConstRows rows : {ConstRows(hidden), ConstRows(normed)}) {
      all.emplace_back(static_cast<size_t>(shape.rows * shape.hidden));
      backend->to_host(all.back().data(), rows);
    }
  }
  return all;
}

}  // namespace

TEST(experts_have_the_same_bits_wherever_they_lie) {
  std::mt19937 random(16);
  for (const Shape& shape : kShapes) {
    std::vector<MoeData> layers;
    for (int l = 0; l < 3; ++l)
      layers.emplace_back(random, shape.hidden, shape.width, shape.experts, shape.top_k,
                          DType::kF32);
    const auto with = [&](const std::array<bool, 3>& on_host, size_t batch_kernels,
                          const BackendOptions& host = {"", 2}, const char* sent_rows = "0") {
      return results(shape, layers, on_host, batch_kernels, host, sent_rows);
    };
    const auto on_device = with({false, false, false}, 0);
    CHECK(on_device[0] != on_device[2]);
    CHECK(with({true, true, true}, 1) == on_device);
    CHECK(with({true, true, true}, 0) == on_device);
    CHECK(with({false, true, false}, 0) == on_device);
    CHECK(with({true, false, true}, 0) == on_device);
    for (const bool late : {false, true}) {
      emulator::set_late(late);
      CHECK(with({true, true, true}, 0, {"", 2}, "1") == on_device);
      CHECK(with({false, true, false}, 1, {"", 1}, "1") == on_device);
    }
    emulator::set_late(false);
    // By every instruction set that has fused multiply-adds.
    if (&shape != &kShapes[1]) continue;
    for (const KernelTable* table : compiled_isas())
      if (table->supported() && std::string(table->isa) != "scalar")
        CHECK(with({true, true, true}, 0, {table->isa, 1}) == on_device);
  }
}

namespace {

// Whether `rows` rows have the experts, which lie in the host's memory, sent to the device.
bool are_sent(const MoeData& data, WeightFormat format, const char* isa, const char* sent_rows,
              int64_t rows) {
  const Variable sent("PUNA_CUDA_SENT_ROWS", sent_rows);
  const auto backend =
      make_cuda_backend(emulator::device_table(), 0, make_cpu_backend({isa, 1}), 0);
  const MoeWeights weights = data.load(*backend, true, format);
  const int64_t hidden = weights.router.cols;
  const Buffer x = backend->allocate(static_cast<size_t>(rows * hidden) * sizeof(float)),
               residual = backend->allocate(static_cast<size_t>(rows * hidden) * sizeof(float));
  const int64_t before = emulator::sends();
  backend->moe({residual.floats(), rows, hidden}, {x.floats(), rows, hidden}, weights);
  backend->to_host(nullptr, {x.floats(), 0, hidden});
  return emulator::sends() > before;
}

}  // namespace

TEST(experts_are_sent_where_rows_are_many_and_bits_are_the_same) {
  std::mt19937 random(18);
  const MoeData data(random, 64, 32, 4, 1, DType::kF32);
  const auto int4 = WeightFormat::kInt4G32;
  CHECK(are_sent(data, int4, "", "3", 3));
  CHECK(!are_sent(data, int4, "", "3", 2));
  CHECK(!are_sent(data, int4, "", "0", 3));
  // Where bits would differ, the CPU has all rows.
  CHECK(!are_sent(data, WeightFormat::kF32, "", "1", 3));
  CHECK(!are_sent(data, WeightFormat::kFP8, "", "1", 3));
  CHECK(!are_sent(data, int4, "scalar", "1", 3));
  // By the rates: 4 experts of 64 x 96 weights of 4.5 bits, of which a row has one.
  const double bytes = 4 * 64 * 96 * 4.5 / 8;
  const int64_t enough = rows_worth_sending({}, bytes, 64 * 96, 1);
  CHECK(enough > 10 && enough < 100);
  CHECK(are_sent(data, int4, "", nullptr, enough));
  CHECK(!are_sent(data, int4, "", nullptr, enough - 1));
  for (const char* wrong : {"x", "-1", "2x", "1000000001"})
    CHECK_THROWS(ErrorCode::kInvalidRequest, are_sent(data, int4, "", wrong, 1));
}

TEST(rows_worth_sending_follow_the_rates) {
  // A layer of Scout in 4 bits, 16 experts of 126e6 weights: on PCIe 5 with 16 threads, and where
  // the threads' copies are slower than the link.
  const double weights = 3.0 * 5120 * 8192, bytes = 16 * weights * 4.25 / 8;
  CHECK_EQ(rows_worth_sending({}, bytes, weights, 16), 517);
  CHECK_EQ(rows_worth_sending({}, bytes, weights, 2), rows_worth_sending({}, bytes, weights, 4));
  CHECK(rows_worth_sending({}, bytes, weights, 64) > 4 * 500);
  CHECK(rows_worth_sending({.link = 25e9}, bytes, weights, 16) > 1000);
  // Exactly as long: so many operations of one thread as take the time of the copies.
  CHECK_EQ(rows_worth_sending({10, 10, 4}, 100, 1, 1), 20);
  CHECK_EQ(rows_worth_sending({10, 10, 4}, 101, 1, 1), 21);
}
