// Routed experts that the CPU backend computes for another: each slot is a feed-forward block of
// its own, on each instruction set and any number of threads.
#include <algorithm>

#include "backend/cpu/cpu_backend.h"
#include "backend_fixture.h"
#include "kernels/cpu/dispatch.h"

using namespace fixture;

namespace {

struct Shape {
  int64_t rows, hidden, width, experts, top_k;
};
constexpr Shape kShapes[] = {
    {1, 72, 50, 5, 1}, {3, 130, 33, 7, 2}, {40, 72, 96, 5, 3}, {9, 64, 1030, 2, 1}};

// The routing of random logits, as it comes from a device.
Routing routed(std::mt19937& random, const Shape& shape) {
  Routing made;
  made.reserve(shape.rows, shape.experts, shape.top_k);
  made.assign(randoms(random, shape.rows * shape.experts).data(), shape.rows, shape.experts,
              shape.top_k);
  const std::vector<int32_t> rows(made.row.begin(), made.row.end());
  const std::vector<int32_t> offsets(made.offset.begin(), made.offset.end());
  Routing adopted;
  adopted.adopt(rows, made.score, offsets);
  CHECK(adopted.row == made.row && adopted.score == made.score);
  CHECK(adopted.offset == made.offset && adopted.occupied == made.occupied);
  return adopted;
}

}  // namespace

TEST(each_slot_is_a_feed_forward_block_of_a_scaled_row) {
  std::mt19937 random(21);
  for (const Shape& shape : kShapes)
    for (const std::optional<WeightFormat> format :
         {std::optional<WeightFormat>(), std::optional(WeightFormat::kInt4G32),
          std::optional(WeightFormat::kFP8)}) {
      const DType dtype = shape.rows % 2 == 0 ? DType::kBF16 : DType::kF32;
      const MoeData data(random, shape.hidden, shape.width, shape.experts, shape.top_k, dtype);
      const std::vector<float> x = randoms(random, shape.rows * shape.hidden);
      const ConstRows rows(x.data(), shape.rows, shape.hidden);
      const Routing routing = routed(random, shape);
      const int64_t slots = std::ssize(routing.row), stride = shape.hidden + 5;
      for (const KernelTable* table : compiled_isas()) {
        if (!table->supported()) continue;
        const auto backend = make_cpu_backend({table->isa, 1});
        const MoeWeights weights = data.load(*backend, false, format);
        std::vector<float> expected(static_cast<size_t>(slots * shape.hidden));
        for (const int64_t e : routing.occupied)
          for (int64_t slot = routing.offset[e]; slot < routing.offset[e + 1]; ++slot) {
            std::vector<float> scaled(rows.row(routing.row[slot]),
                                      rows.row(routing.row[slot]) + shape.hidden);
            for (float& value : scaled) value *= routing.score[slot];
            backend->mlp({expected.data() + slot * shape.hidden, 1, shape.hidden},
                         {scaled.data(), 1, shape.hidden}, weights.gate_up[e], weights.down[e]);
          }
        for (const int threads : {1, 2, 3}) {
          const auto other = make_cpu_backend({table->isa, threads});
          std::vector<float> made(static_cast<size_t>(slots * stride), -1.0f);
          other->experts({made.data(), slots, shape.hidden, stride}, rows, routing, weights.gate_up,
                         weights.down);
          bool same = true;
          for (int64_t slot = 0; slot < slots; ++slot)
            same &= std::equal(&made[slot * stride], &made[slot * stride] + shape.hidden,
                               &expected[slot * shape.hidden]) &&
                    std::all_of(&made[slot * stride] + shape.hidden, &made[slot * stride] + stride,
                                [](float value) { return value == -1.0f; });
          check::report(same, __FILE__, __LINE__, other->description());
        }
      }
    }
}

TEST(wrong_experts_are_refused_before_work) {
  std::mt19937 random(22);
  const Shape& shape = kShapes[1];
  const auto backend = make_cpu_backend({"", 1});
  const MoeData data(random, shape.hidden, shape.width, shape.experts, shape.top_k, DType::kF32);
  MoeWeights weights = data.load(*backend);
  const Routing right = routed(random, shape);
  const int64_t slots = std::ssize(right.row);
  std::vector<float> x(static_cast<size_t>(shape.rows * shape.hidden)),
      out(static_cast<size_t>(slots * shape.hidden));
  const auto compute = [&](const Routing& routing, int64_t out_rows) {
    backend->experts({out.data(), out_rows, shape.hidden}, {x.data(), shape.rows, shape.hidden},
                     routing, weights.gate_up, weights.down);
  };
  compute(right, slots);
  CHECK_THROWS(ErrorCode::kInternal, compute(right, slots - 1));
  Routing wrong = right;
  wrong.row[0] = shape.rows;
  CHECK_THROWS(ErrorCode::kInternal, compute(wrong, slots));
  wrong = right;
  wrong.offset.pop_back();
  CHECK_THROWS(ErrorCode::kInternal, compute(wrong, slots));
  weights.down.pop_back();
  CHECK_THROWS(ErrorCode::kInternal, compute(right, slots));
}
