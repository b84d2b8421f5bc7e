#include "engine/quantize.h"

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "engine/calibrate.h"
#include "engine/factory.h"
#include "engine/model_files.h"
#include "model/open_model.h"
#include "model/packed.h"
#include "quant/encode.h"

namespace puna {
namespace {

namespace fs = std::filesystem;

// What makes a checkpoint besides its weights. The configuration last: a folder without it is no
// checkpoint.
constexpr const char* kCompanions[] = {"generation_config.json",
                                       "tokenizer.json",
                                       "tokenizer.model",
                                       "tokenizer_config.json",
                                       "special_tokens_map.json",
                                       "chat_template.jinja",
                                       "chat_template.json",
                                       "processor_config.json",
                                       "preprocessor_config.json",
                                       "additional_chat_templates/tool_use.jinja",
                                       "config.json"};

void copy_companions(const fs::path& from, const fs::path& to) {
  for (const char* name : kCompanions) {
    if (!fs::exists(from / name)) continue;
    std::error_code problem;
    fs::create_directories((to / name).parent_path(), problem);
    fs::copy_file(from / name, to / name, fs::copy_options::overwrite_existing, problem);
    if (problem)
      fail(ErrorCode::kDevice, "[quantize] ", (from / name).string(),
           " could not be copied: ", problem.message());
  }
}

// The same files as copy_companions() leaves, by their names, from the metadata of a GGUF file;
// what it does not have is empty.
using Texts = std::vector<std::pair<std::string, std::string>>;

Texts companions_of(const GgufFile& file, const ModelSpec& spec) {
  ConfigTexts configs = config_texts(spec);
  parse_model_spec(configs.config, configs.generation_config);  // checks them, too
  GgufChat chat = gguf_chat(file);
  const std::optional<GgufVocabulary> vocabulary = gguf_vocabulary(file);
  if (vocabulary) Tokenizer::from_gguf(*vocabulary);  // checks it
  return {{"generation_config.json", std::move(configs.generation_config)},
          {"tokenizer.json", vocabulary ? tokenizer_json(*vocabulary) : ""},
          {"tokenizer_config.json", nlohmann::json(chat.tokens).dump(2)},
          {"chat_template.jinja", chat.templates["default"]},
          {"additional_chat_templates/tool_use.jinja", chat.templates["tool_use"]},
          {"config.json", std::move(configs.config)}};
}

void write_companions(const Texts& texts, const fs::path& to) {
  for (const auto& [name, text] : texts) {
    if (text.empty()) continue;
    std::error_code ignored;
    fs::create_directories((to / name).parent_path(), ignored);
    std::ofstream file(to / name, std::ios::binary);
    file << text;
    if (!file.flush())
      fail(ErrorCode::kDevice, "[quantize] ", (to / name).string(), " could not be written");
  }
}

}  // namespace

std::vector<FormatStatus> weight_formats() {
  std::vector<FormatStatus> all;
  for (const WeightFormat format : all_formats())
    all.push_back({name_of(format), bits_per_weight(format), can_encode(format)});
  return all;
}

std::vector<std::string> quantize(const QuantizeOptions& options) {
  const QuantRecipe recipe(options.quant, options.quant_overrides);
  if (recipe.as_stored() && !is_gguf(options.path))
    fail(ErrorCode::kInvalidRequest, "[quantize] quant is not given; use \"int4\" or \"int8\"");
  const OpenedModel model = open_model(options.path, options.mmproj);
  const ModelSpec& spec = model.spec;
  const Checkpoint& checkpoint = *model.checkpoint;
  if (model.packed)
    fail(ErrorCode::kInvalidRequest, "[quantize] ", options.path,
         " is in the packed form already; quantise from the original checkpoint");
  // Before the long work: a configuration, a tokenizer or a template that cannot be kept is
  // refused.
  const Texts texts = checkpoint.gguf() ? companions_of(*checkpoint.gguf(), spec) : Texts();
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
    return calibrate(spec, checkpoint, model.weights, *backend, options.calibration,
                     options.calibration_progress);
  };
  write_packed(spec, checkpoint, model.weights, recipe, *backend,
               (fs::path(options.out) / "model.safetensors").string(), importance,
               options.progress);
  if (checkpoint.gguf())
    write_companions(texts, options.out);
  else
    copy_companions(options.path, options.out);
  return spec.warnings;
}

}  // namespace puna
