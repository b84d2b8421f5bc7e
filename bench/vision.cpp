// puna-bench vision: the vision tower of Llama 4, in its true size, with random weights.
#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "bench.h"
#include "device_ceilings.h"
#include "engine/factory.h"
#include "kernels/cpu/dispatch.h"
#include "model/parameters.h"
#include "model/vision_model.h"
#include "platform/system.h"
#include "synthetic.h"
#include "vision_parts.h"

namespace puna::bench {
namespace {

// Multiplies and adds of products and attention for one tile.
double tile_operations(const VisionSpec& vision, int64_t text_hidden) {
  const int64_t patches = vision.grid() * vision.grid(), tokens = patches + 1;
  const int64_t hidden = vision.hidden, joined = vision.shuffle_factor * vision.shuffle_factor;
  const int64_t layer =
      2 * tokens * hidden * (4 * hidden + 2 * vision.intermediate) + 4 * tokens * tokens * hidden;
  const int64_t adapter =
      2 * vision.tokens_per_tile() *
      (joined * hidden * vision.adapter_width + vision.adapter_width * vision.output_width +
       vision.output_width * text_hidden);
  const int64_t patch_embedding = 2 * patches * hidden * 3 * vision.patch_size * vision.patch_size;
  return static_cast<double>(patch_embedding + vision.layers * layer + adapter);
}

// As few operations as show that all of it runs.
void make_small(VisionSpec& vision) {
  vision.image_size = 4 * vision.patch_size;
  vision.hidden = 2 * vision.hidden / vision.heads;
  vision.heads = 2;
  vision.layers = 1;
  vision.intermediate = vision.adapter_width = vision.output_width = 100;
}

}  // namespace

int run_vision(int argc, char** argv) {
  const Arguments arguments("vision",
                            {{"tiles", "N", "tiles encoded together (default: 1, then 5)"},
                             {"layers", "N", "of the tower's 34 layers (default: all)"},
                             {"device", "NAME", "cpu (default), cuda or cuda:N"},
                             {"threads", "N", "compute threads (default: the usable cores)"},
                             {"isa", "NAME", "instruction set (default: the best)"},
                             {"rounds", "N", "rounds of which the medians are taken (default 3)"},
                             {"parts", nullptr, "each kind of its operations instead"},
                             {"warpgroups", nullptr, "products by warpgroups (Hopper)"},
                             {"small", nullptr, "a tiny tower, to see that it runs"},
                             {"json", nullptr, "print JSON"}},
                            argc, argv);
  if (arguments.wants_help()) {
    std::cout << arguments.help();
    return 0;
  }
  const auto threads = static_cast<int>(arguments.integer("threads", 0, 1, ThreadPool::kMaxLanes));
  const std::string isa = arguments.text("isa", "");
  const int64_t rounds = arguments.integer("rounds", 3, 1, 1000);

  // The text model is of no account: one layer, none of it loaded.
  ModelSpec spec = published_spec("guard", {.layers = 1, .vocab = 1});
  const bool small = arguments.has("small");
  if (small) make_small(*spec.vision);
  const int64_t all_layers = spec.vision->layers;
  spec.vision->layers = arguments.integer("layers", all_layers, 1, all_layers);
  if (arguments.has("warpgroups")) setenv("PUNA_CUDA_PRODUCTS", "warpgroups", 1);
  const VisionSpec& vision = *spec.vision;
  const std::unique_ptr<Backend> backend =
      make_backend(arguments.text("device", "cpu"), {isa, threads});
  auto source = std::make_unique<SyntheticWeights>(spec);
  const QuantRecipe recipe;
  SyntheticLoader loader(*backend, recipe, *source);
  VisionParameters parameters = load_vision(*source->weights().vision, loader);
  source.reset();
  MachineCeilings ceilings(*backend, isa, threads, small);
  if (arguments.has("parts")) {
    Report report;
    report.fact("device", backend->description());
    if (!backend->device_memory()) ceilings.sample();
    report.fact("read GB/s", ceilings.read() / 1e9);
    report.fact("bf16 TFLOP/s", ceilings.bf16() / 1e12);
    const int64_t tiles = arguments.integer("tiles", 1, 1, 1000);
    report.fact("tiles", tiles);
    time_vision_parts(report, *backend, spec, parameters, ceilings, tiles, all_layers, small);
    report.print(std::cout, arguments.has("json"));
    return 0;
  }
  const auto model = std::make_unique<VisionModel>(spec, std::move(parameters), *backend);

  std::vector<Case> cases;
  std::vector<int64_t> tile_counts = {1, 5};
  if (arguments.has("tiles")) tile_counts = {arguments.integer("tiles", 1, 1, 1000)};
  for (const int64_t tiles : tile_counts) {
    const int64_t rows = tiles * model->tokens_per_tile();
    const auto out = std::make_shared<Buffer>(
        backend->allocate(static_cast<size_t>(rows * spec.hidden) * sizeof(float)));
    const auto pixels = std::make_shared<std::vector<float>>(
        tiles * 3 * vision.image_size * vision.image_size, 0.25f);
    cases.push_back({std::to_string(tiles),
                     tile_operations(vision, spec.hidden) * static_cast<double>(tiles),
                     [&backend, &model, &spec, tiles, rows, out, pixels] {
                       model->encode({out->floats(), rows, spec.hidden}, *pixels, tiles, {});
                       backend->to_host(nullptr, {out->floats(), 0, spec.hidden});  // waits
                     },
                     {}});
  }
  for (int64_t round = 0; round < rounds; ++round) {
    for (Case& encode : cases) {
      ceilings.sample();
      encode.sample();
    }
  }

  Report report;
  report.fact("processor", processor_name());
  report.fact("device", backend->description());
  report.fact("isa", backend->device_memory() ? "" : std::string(resolve_isa(isa).isa));
  report.fact("memory GiB", static_cast<double>(total_memory_bytes()) / (1 << 30));
  report.fact("rounds", rounds);
  report.fact("tower", std::to_string(vision.layers) + " layers of " +
                           std::to_string(vision.hidden) + ", tiles of " +
                           std::to_string(vision.image_size) + " pixels, random bfloat16 weights");
  report.fact("weights GiB", static_cast<double>(loader.bytes()) / (1 << 30));
  report.fact("peak resident GiB, ceilings' 1 GiB included",
              static_cast<double>(peak_resident_bytes()) / (1 << 30));
  report.fact("bf16 peak GFLOP/s", ceilings.bf16() / 1e9);
  for (size_t i = 0; i < cases.size(); ++i) {
    report.row({{"tiles", tile_counts[i]},
                {"seconds", median(cases[i].seconds)},
                {"tiles/s", static_cast<double>(tile_counts[i]) / median(cases[i].seconds)},
                {"GFLOP/s", cases[i].median_rate() / 1e9},
                {"% of bf16 peak", 100 * cases[i].median_rate() / ceilings.bf16()}});
  }
  report.print(std::cout, arguments.has("json"));
  return 0;
}

}  // namespace puna::bench
