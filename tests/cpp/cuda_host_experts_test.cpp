// Routed experts that the CUDA backend leaves to the host: with quantised weights every bit is that
// of experts on the device, in passes as a model makes them.
#include <algorithm>
#include <array>

#include "cuda_subjects.h"
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

// What passes through layers give, whose experts are on the host where `on_host` says so.
std::vector<std::vector<float>> results(const Shape& shape, std::span<const MoeData> layers,
                                        std::span<const bool> on_host, size_t batch_kernels,
                                        const BackendOptions& host) {
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
                          const BackendOptions& host = {"", 2}) {
      return results(shape, layers, on_host, batch_kernels, host);
    };
    const auto on_device = with({false, false, false}, 0);
    CHECK(on_device[0] != on_device[2]);
    CHECK(with({true, true, true}, 1) == on_device);
    CHECK(with({true, true, true}, 0) == on_device);
    CHECK(with({false, true, false}, 0) == on_device);
    CHECK(with({true, false, true}, 0) == on_device);
    // By every instruction set that has fused multiply-adds.
    if (&shape != &kShapes[1]) continue;
    for (const KernelTable* table : compiled_isas())
      if (table->supported() && std::string(table->isa) != "scalar")
        CHECK(with({true, true, true}, 0, {table->isa, 1}) == on_device);
  }
}
