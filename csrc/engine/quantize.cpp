#include "engine/quantize.h"

#include <filesystem>

#include "base/error.h"
#include "engine/calibrate.h"
#include "engine/factory.h"
#include "model/packed.h"
#include "quant/encode.h"

namespace puna {
namespace {

namespace fs = std::filesystem;

// What makes a checkpoint besides its weights.
constexpr const char* kCompanions[] = {"generation_config.json",   "tokenizer.json",
                                       "tokenizer.model",          "tokenizer_config.json",
                                       "special_tokens_map.json",  "chat_template.jinja",
                                       "chat_template.json",       "processor_config.json",
                                       "preprocessor_config.json", "config.json"};

}  // namespace

std::vector<FormatStatus> weight_formats() {
  std::vector<FormatStatus> all;
  for (const WeightFormat format : all_formats())
    all.push_back({name_of(format), bits_per_weight(format), can_encode(format)});
  return all;
}

void quantize(const QuantizeOptions& options) {
  const QuantRecipe recipe(options.quant, options.quant_overrides);
  if (recipe.as_stored())
    fail(ErrorCode::kInvalidRequest, "[quantize] quant is not given; use \"int4\" or \"int8\"");
  const ModelSpec spec = read_model_spec(options.path);
  const Checkpoint checkpoint(options.path);
  if (is_packed(checkpoint))
    fail(ErrorCode::kInvalidRequest, "[quantize] ", options.path,
         " is in the packed form already; quantise from the original checkpoint");
  const ModelWeights weights = resolve_weights(spec, checkpoint);
  std::error_code problem;
  fs::create_directories(options.out, problem);
  if (problem || !fs::is_directory(options.out))
    fail(ErrorCode::kInvalidRequest, "[quantize] ", options.out,
         " cannot be made: ", problem.message());
  if (fs::equivalent(options.path, options.out, problem))
    fail(ErrorCode::kInvalidRequest, "[quantize] the output folder is the checkpoint's own");
  const auto backend = make_backend("cpu", {"", options.threads});
  const auto importance = [&]() -> Importance {
    if (options.calibration.empty()) return {};
    return calibrate(spec, checkpoint, weights, *backend, options.calibration,
                     options.calibration_progress);
  };
  write_packed(spec, checkpoint, weights, recipe, *backend,
               (fs::path(options.out) / "model.safetensors").string(), importance,
               options.progress);
  // The configuration last: a folder without it is no checkpoint.
  for (const char* name : kCompanions) {
    const fs::path from = fs::path(options.path) / name;
    if (!fs::exists(from)) continue;
    fs::copy_file(from, fs::path(options.out) / name, fs::copy_options::overwrite_existing,
                  problem);
    if (problem)
      fail(ErrorCode::kDevice, "[quantize] ", from.string(),
           " could not be copied: ", problem.message());
  }
}

}  // namespace puna
