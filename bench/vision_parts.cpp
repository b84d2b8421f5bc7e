#include "vision_parts.h"

#include <algorithm>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace puna::bench {
namespace {

struct Part {
  std::string name;
  int64_t rows;
  double times;                      // in a tower; 0: no part of the sum
  double bytes, operations;          // that it must read and write at least, and multiply and add
  std::function<void(int64_t)> run;  // with the weights of the i-th layer
  double seconds = 0;
};

class Timer {
 public:
  Timer(Backend& backend, bool small)
      : backend_(backend), small_(small), mark_(backend.allocate(sizeof(float))) {}

  // Of one run, of many in a row.
  double seconds_each(const std::function<void(int64_t)>& run) const {
    const auto batch = [&](int64_t count) {
      return seconds_of([&] {
        for (int64_t i = 0; i < count; ++i) run(i);
        float waited = 0;
        backend_.to_host(&waited, {mark_.floats(), 1, 1});
      });
    };
    batch(1);
    const double once = batch(1);
    if (small_) return once;
    constexpr double kBatchSeconds = 0.05;
    const auto count = std::clamp<int64_t>(static_cast<int64_t>(kBatchSeconds / once), 2, 200);
    std::vector<double> each;
    for (int round = 0; round < 5; ++round)
      each.push_back(batch(count) / static_cast<double>(count));
    return median(each);
  }

 private:
  Backend& backend_;
  bool small_;
  Buffer mark_;
};

}  // namespace

void time_vision_parts(Report& report, Backend& backend, const ModelSpec& spec,
                       const VisionParameters& parameters, const MachineCeilings& ceilings,
                       int64_t tiles, int64_t layers, bool small) {
  const VisionSpec& vision = *spec.vision;
  const int64_t grid = vision.grid(), patches = grid * grid, tokens = patches + 1;
  const int64_t dim = vision.hidden, inner_dim = vision.intermediate;
  const int64_t factor = vision.shuffle_factor, joined_dim = factor * factor * dim;
  const int64_t rows = tiles * tokens, joined_rows = tiles * vision.tokens_per_tile();
  std::vector<Buffer> buffers;
  const auto make = [&](int64_t count, int64_t cols) {
    buffers.push_back(backend.allocate(static_cast<size_t>(count * cols) * sizeof(float)));
    const Rows made(buffers.back().floats(), count, cols);
    // Small numbers that differ.
    std::vector<float> values(static_cast<size_t>(count * cols));
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i % 251) / 251 - 0.5f;
    backend.from_host(made, values.data());
    return made;
  };
  const Rows unfolded = make(tiles * patches, 3 * vision.patch_size * vision.patch_size);
  const Rows hidden = make(rows, dim), normed = make(rows, dim), qkv = make(rows, 3 * dim);
  const Rows attended = make(rows, dim), inner = make(rows, inner_dim);
  const Rows joined = make(joined_rows, joined_dim);
  const Rows adapted1 = make(joined_rows, vision.adapter_width);
  const Rows adapted2 = make(joined_rows, vision.output_width);
  const Rows out = make(joined_rows, spec.hidden);
  const int64_t half = dim / vision.heads / 2;
  const std::vector<float> cos(static_cast<size_t>(tokens * half), 0.8f);
  const std::vector<float> sin(static_cast<size_t>(tokens * half), 0.6f);
  const auto eps = static_cast<float>(VisionSpec::kNormEps);
  const auto layer = [&](int64_t i) -> const VisionParameters::Layer& {
    return parameters.layers[static_cast<size_t>(i % std::ssize(parameters.layers))];
  };
  const auto norm = [&](int64_t i) {
    backend.layer_norm(normed, hidden, layer(i).input_norm, layer(i).input_norm_bias, eps);
  };

  std::vector<Part> parts;
  const auto each_layer = static_cast<double>(layers);
  const auto floats = [](int64_t count, int64_t cols) {
    return 4.0 * static_cast<double>(count * cols);
  };
  // A product, with its weights, rows and results; `added`: results are read, too.
  const auto product = [&](const std::string& name, double times, int64_t count, int64_t cols,
                           int64_t outs, bool added, std::function<void(int64_t)> run) {
    parts.push_back({name, count, times,
                     2.0 * static_cast<double>(cols * outs) + floats(count, cols) +
                         floats(count, outs) * (added ? 2 : 1),
                     2.0 * static_cast<double>(count * cols * outs), std::move(run)});
  };
  product("patch embedding", 1, tiles * patches, unfolded.cols, dim, true, [&](int64_t) {
    for (int64_t t = 0; t < tiles; ++t)
      backend.matmul(hidden.slice(t * tokens, patches), unfolded.slice(t * patches, patches),
                     parameters.patch_embedding, {.accumulate = true, .many_rows = true});
  });
  parts.push_back({"layer norm alone", rows, 0, 2 * floats(rows, dim), 0, norm});
  product("layer norm, q, k and v", each_layer, rows, dim, 3 * dim, false, [&](int64_t i) {
    norm(i);
    backend.matmul(qkv, normed, layer(i).qkv, {.bias = &layer(i).qkv_bias, .many_rows = true});
  });
  parts.push_back({"attention", rows, each_layer, floats(rows, 4 * dim),
                   4.0 * static_cast<double>(rows * tokens * dim), [&](int64_t) {
                     backend.vision_attention(attended, qkv, tiles, tokens, vision.heads,
                                              cos.data(), sin.data(), DType::kBF16);
                   }});
  product("attention's output", each_layer, rows, dim, dim, true, [&](int64_t i) {
    backend.matmul(hidden, attended, layer(i).output,
                   {.bias = &layer(i).output_bias, .accumulate = true, .many_rows = true});
  });
  product("layer norm, fc1 and GELU", each_layer, rows, dim, inner_dim, false, [&](int64_t i) {
    norm(i);
    backend.matmul(inner, normed, layer(i).fc1,
                   {.bias = &layer(i).fc1_bias, .gelu = true, .many_rows = true, .passing = true});
  });
  product("fc2", each_layer, rows, inner_dim, dim, true, [&](int64_t i) {
    backend.matmul(hidden, inner, layer(i).fc2,
                   {.bias = &layer(i).fc2_bias, .accumulate = true, .many_rows = true});
  });
  // What one operation makes for the next saves both time, which the sum does not show.
  const std::vector<Part> of_layer(parts.begin() + 2, parts.end());
  Part whole{"a whole layer", rows, 0, 0, 0, [of_layer](int64_t l) {
               for (const Part& part : of_layer) part.run(l);
             }};
  for (const Part& part : of_layer) {
    whole.bytes += part.bytes;
    whole.operations += part.operations;
  }
  parts.push_back(std::move(whole));
  parts.push_back(
      {"pixel shuffle", joined_rows, 1, 2 * floats(joined_rows, joined_dim), 0, [&](int64_t) {
         for (int64_t t = 0; t < tiles; ++t)
           backend.pixel_shuffle(
               joined.slice(t * vision.tokens_per_tile(), vision.tokens_per_tile()),
               hidden.slice(t * tokens, patches), 1, grid, factor);
       }});
  const auto adapter = [&](const std::string& name, const Rows& to, const Rows& from,
                           const WeightRef& weight, bool gelu) {
    product(name, 1, joined_rows, from.cols, to.cols, false,
            [&backend, &weight, to, from, gelu](int64_t) {
              backend.matmul(to, from, weight, {.gelu = gelu, .many_rows = true, .passing = gelu});
            });
  };
  adapter("adapter's first product", adapted1, joined, parameters.adapter1, true);
  adapter("adapter's second product", adapted2, adapted1, parameters.adapter2, true);
  adapter("projector", out, adapted2, parameters.projector, false);

  const Timer timer(backend, small);
  double tower = 0;
  for (Part& part : parts) {
    // What accumulates would grow beyond all bounds.
    backend.layer_norm(hidden, normed, parameters.pre_norm, parameters.pre_norm_bias, eps);
    part.seconds = timer.seconds_each(part.run);
    tower += part.times * part.seconds;
  }
  report.fact("sum of the parts, ms", tower * 1e3);
  for (const Part& part : parts)
    report.row({{"operation", part.name},
                {"rows", part.rows},
                {"us", part.seconds * 1e6},
                {"ms of a tower", part.times * part.seconds * 1e3},
                {"% of a tower", 100 * part.times * part.seconds / tower},
                {"GB/s", part.bytes / part.seconds / 1e9},
                {"% of read", 100 * part.bytes / part.seconds / ceilings.read()},
                {"TFLOP/s", part.operations / part.seconds / 1e12},
                {"% of bf16", 100 * part.operations / part.seconds / ceilings.bf16()}});
}

}  // namespace puna::bench
