#include "model/spec.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <numbers>

#include "base/error.h"
#include "io/checkpoint.h"
#include "io/json_file.h"
#include "io/message.h"
#include "model/spec_limits.h"

namespace puna {

namespace {

using nlohmann::json;

// Typed, checked reading of one JSON object of a file; messages name the file and the field.
class Fields {
 public:
  // `path` leads to the object within the file: "" or "text_config."
  Fields(const json& object, const std::string& file, const std::string& path = "")
      : object_(object), file_(file), path_(path) {
    if (!object.is_object()) {
      refuse(ErrorCode::kModelFormat,
             path.empty() ? "the document" : path.substr(0, path.size() - 1), " is no JSON object");
    }
  }

  // Absent and null are the same, as in transformers.
  const json* find(const char* name) const {
    const auto found = object_.find(name);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }

  // Whether the field is given at all, if only as null.
  bool has(const char* name) const { return object_.contains(name); }

  std::vector<std::string> names() const {
    std::vector<std::string> all;
    for (const auto& [name, value] : object_.items()) all.push_back(name);
    return all;
  }

  std::optional<Fields> object(const char* name) const {
    const json* value = find(name);
    if (!value) return std::nullopt;
    return Fields(*value, file_, path_ + name + ".");
  }

  int64_t integer(const char* name, int64_t otherwise, int64_t least, int64_t most) const {
    const json* value = find(name);
    return value ? integer(name, *value, least, most) : otherwise;
  }

  double number(const char* name, double otherwise, double least, double most) const {
    const json* value = find(name);
    return value ? number(name, *value, least, most) : otherwise;
  }

  // For fields that have no default.
  double number(const char* name, double least, double most) const {
    const json* value = find(name);
    if (!value) refuse(ErrorCode::kModelFormat, path_, name, " is missing");
    return number(name, *value, least, most);
  }

  // true, false, or a number (some checkpoints say 4 for true).
  bool flag(const char* name, bool otherwise) const {
    const json* value = find(name);
    if (!value) return otherwise;
    if (value->is_boolean()) return value->get<bool>();
    if (value->is_number_integer()) return *value != 0;
    bad(name, *value, "true or false");
  }

  std::string text(const char* name, const std::string& otherwise) const {
    const json* value = find(name);
    if (!value) return otherwise;
    if (!value->is_string()) bad(name, *value, "a string");
    return value->get<std::string>();
  }

  // A list of whole numbers in [least, most], or nothing if absent.
  std::optional<std::vector<int64_t>> integers(const char* name, int64_t least,
                                               int64_t most) const {
    const json* value = find(name);
    if (!value) return std::nullopt;
    if (!value->is_array()) bad(name, *value, "a list");
    std::vector<int64_t> numbers;
    for (const json& item : *value) numbers.push_back(integer(name, item, least, most));
    return numbers;
  }

  // A list of numbers in [least, most].
  std::vector<double> numbers(const char* name, double least, double most) const {
    const json* value = find(name);
    if (!value) refuse(ErrorCode::kModelFormat, path_, name, " is missing");
    if (!value->is_array()) bad(name, *value, "a list");
    std::vector<double> numbers;
    for (const json& item : *value) numbers.push_back(number(name, item, least, most));
    return numbers;
  }

  // Refuses the file because of one field.
  [[noreturn]] void bad(const char* name, const json& value, const std::string& expected,
                        ErrorCode code = ErrorCode::kModelFormat) const {
    refuse(code, path_, name, " is ",
           printable(value.dump(-1, ' ', true, json::error_handler_t::replace), 60),
           "; it must be ", expected);
  }

  template <class... Parts>
  [[noreturn]] void refuse(ErrorCode code, const Parts&... parts) const {
    fail(code, "[config] ", file_, ": ", parts...);
  }

  const std::string& path() const { return path_; }

 private:
  int64_t integer(const char* name, const json& value, int64_t least, int64_t most) const {
    if (!value.is_number_integer()) bad(name, value, "a whole number");
    const bool too_large =
        value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(most);
    if (too_large || value.get<int64_t>() < least || value.get<int64_t>() > most) {
      bad(name, value, "from " + std::to_string(least) + " to " + std::to_string(most));
    }
    return value.get<int64_t>();
  }

  double number(const char* name, const json& value, double least, double most) const {
    if (!value.is_number()) bad(name, value, "a number");
    const auto x = value.get<double>();
    if (!(x >= least && x <= most)) {
      std::ostringstream range;
      range << "from " << least << " to " << most;
      bad(name, value, range.str());
    }
    return x;
  }

  const json& object_;
  std::string file_, path_;
};

// A type of RoPE of this project alone: the divisors of a GGUF file, which has no other form.
std::vector<double> read_divisors(const Fields& fields, int64_t head_dim) {
  std::vector<double> divisors = fields.numbers("divisors", kMinRopeDivisor, kMaxRopeDivisor);
  if (static_cast<int64_t>(divisors.size()) != head_dim / 2) {
    fields.refuse(ErrorCode::kModelFormat, fields.path(), "divisors has ", divisors.size(),
                  " numbers; heads of ", head_dim, " have ", head_dim / 2, " frequencies");
  }
  return divisors;
}

RopeSpec read_rope(const Fields& text, const ModelSpec& spec, std::vector<std::string>& warnings) {
  RopeSpec rope;
  rope.theta = text.number("rope_theta", 500000, 1, 1e12);
  // transformers 4 has rope_scaling beside rope_theta, 5 has both in rope_parameters; where a file
  // has both forms, the older goes before, as in transformers.
  const json* older = text.find("rope_scaling");
  const bool has_older = older && !(older->is_object() && older->empty());
  const std::optional<Fields> fields = text.object(has_older ? "rope_scaling" : "rope_parameters");
  if (!fields) return rope;
  rope.theta = fields->number("rope_theta", rope.theta, 1, 1e12);
  for (const char* layer_type : {"full_attention", "chunked_attention"}) {
    if (fields->has(layer_type)) {
      fields->refuse(ErrorCode::kUnsupported, fields->path(), layer_type,
                     ": RoPE parameters of their own for a type of layers are not supported");
    }
  }
  if (fields->number("partial_rotary_factor", 1, 0, 1) != 1) {
    fields->bad("partial_rotary_factor", *fields->find("partial_rotary_factor"), "1",
                ErrorCode::kUnsupported);
  }
  const char* const type_name = fields->find("rope_type") ? "rope_type" : "type";
  const std::string type = fields->text(type_name, "default");
  if (type == "default") return rope;
  if (type == kDivisorsRopeType) {
    rope.divisors = read_divisors(*fields, spec.head_dim);
    return rope;
  }
  if (type != "llama3") {
    fields->bad(type_name, type, "\"default\" or \"llama3\"", ErrorCode::kUnsupported);
  }
  rope.llama3 = true;
  // No defaults: of the two sets of values in use, a wrong guess would go unnoticed.
  rope.factor = fields->number("factor", 1e-3, 1e6);
  rope.low_freq_factor = fields->number("low_freq_factor", 1e-6, 1e6);
  rope.high_freq_factor = fields->number("high_freq_factor", 1e-6, 1e6);
  rope.original_max_position = fields->number("original_max_position_embeddings",
                                              static_cast<double>(spec.max_position), 1, 1e12);
  if (rope.high_freq_factor < rope.low_freq_factor) {
    fields->bad("high_freq_factor", *fields->find("high_freq_factor"),
                "low_freq_factor or more (" + std::to_string(rope.low_freq_factor) + ")");
  }
  if (rope.factor == 8 && rope.high_freq_factor == 4) {
    warnings.push_back(
        "config.json scales RoPE by factor 8 with high_freq_factor 4, as the first uploads of "
        "Scout did; Meta corrected this to 16 and 1. The file is obeyed: check for a newer one");
  }
  return rope;
}

// Which layers use RoPE: no_rope_layers has 1 for those that do, in spite of its name.
std::vector<bool> read_rope_layers(const Fields& text, int64_t count,
                                   std::vector<std::string>& warnings) {
  const int64_t interval = text.integer("no_rope_layer_interval", 4, 1, kMaxSize);
  const auto listed = text.integers("no_rope_layers", 0, 1);
  std::vector<bool> ropes;
  for (int64_t l = 0; l < count; ++l) ropes.push_back((l + 1) % interval != 0);
  if (!listed || listed->empty()) return ropes;
  if (static_cast<int64_t>(listed->size()) < count) {
    text.bad("no_rope_layers", *text.find("no_rope_layers"),
             "null, [], or a list of " + std::to_string(count) + " entries, one per layer");
  }
  if (static_cast<int64_t>(listed->size()) > count) {
    warnings.push_back("config.json has no_rope_layers for " + std::to_string(listed->size()) +
                       " layers, but the model has " + std::to_string(count));
  }
  for (int64_t l = 0; l < count; ++l) ropes[l] = (*listed)[l] != 0;
  return ropes;
}

std::vector<bool> read_moe_layers(const Fields& text, int64_t count,
                                  std::vector<std::string>& warnings) {
  const int64_t step = text.integer("interleave_moe_layer_step", 1, 0, kMaxSize);
  const auto listed = text.integers("moe_layers", 0, kMaxLayers);
  std::vector<bool> moe(static_cast<size_t>(count), false);
  if (!listed) {
    for (int64_t l = step - 1; step > 0 && l < count; l += step) moe[l] = true;
    return moe;
  }
  int64_t last = -1;
  for (const int64_t l : *listed) {
    if (l < count) moe[l] = true;
    last = std::max(last, l);
  }
  if (last >= count) {
    warnings.push_back("config.json names layer " + std::to_string(last) +
                       " in moe_layers, but the model has " + std::to_string(count) + " layers");
  }
  return moe;
}

// Which layers attend within chunks only; by default those with RoPE.
std::vector<bool> read_chunked_layers(const Fields& text, std::vector<bool> ropes) {
  const json* types = text.find("layer_types");
  if (!types) return ropes;
  if (!types->is_array() || types->size() != ropes.size()) {
    text.bad("layer_types", *types, "a list of " + std::to_string(ropes.size()) + " names");
  }
  std::vector<bool> chunked;
  for (const json& type : *types) {
    if (type != "chunked_attention" && type != "full_attention") {
      text.bad("layer_types", type, "\"chunked_attention\" or \"full_attention\"",
               type.is_string() ? ErrorCode::kUnsupported : ErrorCode::kModelFormat);
    }
    chunked.push_back(type == "chunked_attention");
  }
  return chunked;
}

std::vector<LayerSpec> read_layers(const Fields& text, std::vector<std::string>& warnings) {
  const int64_t count = text.integer("num_hidden_layers", 48, 1, kMaxLayers);
  const std::vector<bool> ropes = read_rope_layers(text, count, warnings);
  const std::vector<bool> moe = read_moe_layers(text, count, warnings);
  const std::vector<bool> chunked = read_chunked_layers(text, ropes);
  // null, as Guard 4 has it, lifts the chunks; a missing field does not.
  const int64_t chunk =
      text.integer("attention_chunk_size", text.has("attention_chunk_size") ? 0 : 8192, 1,
                   std::numeric_limits<int32_t>::max());
  const bool qk_norm = text.flag("use_qk_norm", true);
  const bool temperature = text.flag("attn_temperature_tuning", true);
  const int64_t experts = text.integer("num_local_experts", 16, 0, kMaxExperts);
  const int64_t top_k = text.integer("num_experts_per_tok", 1, 0, kMaxExperts);
  const int64_t expert_width = text.integer("intermediate_size", 8192, 1, kMaxSize);
  const int64_t dense_width = text.integer("intermediate_size_mlp", 16384, 1, kMaxSize);

  std::vector<LayerSpec> layers(static_cast<size_t>(count));
  for (int64_t l = 0; l < count; ++l) {
    LayerSpec& layer = layers[l];
    layer.rope = ropes[l];
    layer.chunk = chunked[l] ? chunk : 0;
    layer.qk_norm = layer.rope && qk_norm;
    layer.temperature = !layer.rope && temperature;
    layer.moe = moe[l];
    layer.intermediate = layer.moe ? expert_width : dense_width;
    if (!layer.moe) continue;
    if (experts < 1) {
      text.refuse(ErrorCode::kModelFormat, "layer ", l, " is a mixture of experts, but ",
                  text.path(), "num_local_experts is ", experts);
    }
    if (top_k < 1 || top_k > experts) {
      text.refuse(ErrorCode::kModelFormat, text.path(), "num_experts_per_tok is ", top_k,
                  "; it must be from 1 to num_local_experts = ", experts);
    }
    layer.experts = experts;
    layer.top_k = top_k;
  }
  return layers;
}

// A square size given as a number or as [n, n].
int64_t square(const Fields& fields, const char* name, int64_t otherwise) {
  const json* value = fields.find(name);
  if (value && value->is_array()) {
    const auto sides = fields.integers(name, 1, kMaxTile);
    if (sides->size() != 2 || (*sides)[0] != (*sides)[1])
      fields.bad(name, *value, "a number or two equal ones");
    return (*sides)[0];
  }
  return fields.integer(name, otherwise, 1, kMaxTile);
}

VisionSpec read_vision(const Fields& fields, std::vector<std::string>& warnings) {
  VisionSpec vision;
  vision.image_size = square(fields, "image_size", 448);
  vision.patch_size = square(fields, "patch_size", 14);
  vision.hidden = fields.integer("hidden_size", 768, 1, kMaxSize);
  vision.layers = fields.integer("num_hidden_layers", 34, 0, kMaxLayers);
  vision.heads = fields.integer("num_attention_heads", 16, 1, kMaxHeads);
  vision.intermediate = fields.integer("intermediate_size", 5632, 1, kMaxSize);
  vision.adapter_width = fields.integer("projector_input_dim", 4096, 1, kMaxSize);
  vision.output_width = fields.integer("vision_output_dim", 7680, 1, kMaxSize);
  warn_of_norm_eps(fields.number("norm_eps", VisionSpec::kNormEps, 0, 1), "norm_eps", warnings);
  vision.rope_theta = fields.number("rope_theta", 10000, 1, 1e12);
  if (const std::optional<Fields> rope = fields.object("rope_parameters")) {
    vision.rope_theta = rope->number("rope_theta", vision.rope_theta, 1, 1e12);
    if (const std::string type = rope->text("rope_type", "default"); type != "default") {
      rope->bad("rope_type", type, "\"default\"", ErrorCode::kUnsupported);
    }
  }
  const auto require = [&](bool ok, const auto&... parts) {
    if (!ok) fields.refuse(ErrorCode::kModelFormat, fields.path(), parts...);
  };
  if (fields.integer("num_channels", 3, 1, kMaxSize) != 3) {
    fields.bad("num_channels", *fields.find("num_channels"), "3", ErrorCode::kUnsupported);
  }
  if (const std::string act = fields.text("hidden_act", "gelu"); act != "gelu") {
    fields.bad("hidden_act", act, "\"gelu\"", ErrorCode::kUnsupported);
  }
  if (fields.flag("multi_modal_projector_bias", false)) {
    fields.bad("multi_modal_projector_bias", true, "false", ErrorCode::kUnsupported);
  }
  require(vision.image_size % vision.patch_size == 0, "image_size is ", vision.image_size,
          "; it must be a multiple of patch_size = ", vision.patch_size);
  require(vision.hidden % vision.heads == 0 && vision.hidden / vision.heads % 4 == 0,
          "hidden_size is ", vision.hidden, ", over ", vision.heads,
          " heads; that must give a head dimension that is a multiple of 4 (2-D RoPE)");
  const double ratio = fields.number("pixel_shuffle_ratio", 0.5, 1e-3, 1);
  vision.shuffle_factor = std::lround(1 / ratio);
  require(std::abs(ratio * static_cast<double>(vision.shuffle_factor) - 1) < 1e-6,
          "pixel_shuffle_ratio is ", ratio, "; it must be 1 / n");
  require(vision.grid() % vision.shuffle_factor == 0, "image_size gives a grid of ", vision.grid(),
          " patches; that must be a multiple of ", vision.shuffle_factor,
          " (1 / pixel_shuffle_ratio)");
  const int64_t joined = vision.hidden * vision.shuffle_factor * vision.shuffle_factor;
  require(vision.intermediate == joined, "intermediate_size is ", vision.intermediate,
          "; the adapter wants hidden_size / pixel_shuffle_ratio^2 = ", joined);
  const int64_t output = fields.integer("projector_output_dim", 4096, 1, kMaxSize);
  require(vision.adapter_width == output && vision.output_width == output,
          "projector_input_dim is ", vision.adapter_width, ", projector_output_dim ", output,
          ", vision_output_dim ", vision.output_width, "; they must be equal");
  return vision;
}

int32_t token(const Fields& fields, const char* name, int64_t otherwise) {
  return static_cast<int32_t>(
      fields.integer(name, otherwise, -1, std::numeric_limits<int32_t>::max()));
}

void read_eos(const Fields& fields, std::vector<int32_t>& eos) {
  const json* value = fields.find("eos_token_id");
  if (!value) return;
  eos.clear();
  if (!value->is_array()) {
    eos.push_back(token(fields, "eos_token_id", -1));
    return;
  }
  const auto ids = fields.integers("eos_token_id", 0, std::numeric_limits<int32_t>::max());
  for (const int64_t id : *ids) eos.push_back(static_cast<int32_t>(id));
}

void read_generation(const Fields& fields, ModelSpec& spec) {
  spec.bos_token = token(fields, "bos_token_id", spec.bos_token);
  spec.pad_token = token(fields, "pad_token_id", spec.pad_token);
  read_eos(fields, spec.eos_tokens);
  if (fields.find("temperature")) {
    spec.generation.temperature = fields.number("temperature", 0, 100);
  }
  if (fields.find("top_p")) spec.generation.top_p = fields.number("top_p", 1e-9, 1);
  if (fields.find("top_k")) spec.generation.top_k = fields.integer("top_k", 0, 0, kMaxSize);
  if (!fields.flag("do_sample", true)) spec.generation.temperature = 0;
}

// Ids that the vocabulary does not have cannot occur; several exporters leave such defaults.
void drop_tokens_outside(ModelSpec& spec) {
  const auto outside = [&](int32_t id) { return id < 0 || id >= spec.vocab_size; };
  std::erase_if(spec.eos_tokens, outside);
  if (spec.vision && outside(spec.image_token)) {
    spec.warnings.push_back("image_token_index " + std::to_string(spec.image_token) +
                            " of config.json is not in the vocabulary of " +
                            std::to_string(spec.vocab_size) + ": no image can be placed");
  }
  for (int32_t* id : {&spec.bos_token, &spec.pad_token, &spec.image_token}) {
    if (outside(*id)) *id = -1;
  }
}

// Whether the weights of a group of compressed-tensors are float8 with scales by row or tensor.
bool is_scaled_float8(const Fields& group) {
  const std::optional<Fields> weights = group.object("weights");
  if (!weights) return false;
  const std::string strategy = weights->text("strategy", "tensor");
  return weights->text("type", "") == "float" && weights->integer("num_bits", 8, 1, 64) == 8 &&
         (strategy == "tensor" || strategy == "channel");
}

// Whether a quantization_config is of one of the schemes whose weights are float8 e4m3 with scales
// by row or tensor. Which tensors are quantised, the tensors themselves say.
bool is_readable(const Fields& quantisation) {
  const std::string method = quantisation.text("quant_method", "");
  if (quantisation.find("weight_block_size")) return false;
  if (method == "fbgemm_fp8") return true;
  if (method == "fp8") return quantisation.text("fmt", "e4m3") == "e4m3";
  if (method == "modelopt") return quantisation.text("quant_algo", "") == "FP8";
  if (method != "compressed-tensors") return false;
  const std::optional<Fields> groups = quantisation.object("config_groups");
  if (!groups) return false;
  for (const std::string& name : groups->names()) {
    const std::optional<Fields> group = groups->object(name.c_str());
    if (!group || !is_scaled_float8(*group)) return false;
  }
  return !groups->names().empty();
}

void refuse_quantisation(const Fields& fields) {
  for (const char* name : {"quantization_config", "compression_config"}) {
    const std::optional<Fields> quantisation = fields.object(name);
    if (!quantisation || is_readable(*quantisation)) continue;
    const std::string method = quantisation->text("quant_method", "?");
    const std::string format = quantisation->text("format", "");  // of compressed-tensors
    fields.refuse(ErrorCode::kUnsupported, "the checkpoint is quantised (quant_method \"",
                  printable(method, 60), format.empty() ? "\"" : "\", format \"",
                  printable(format, 60), format.empty() ? "" : "\"",
                  quantisation->find("weight_block_size") ? ", with scales by block" : "",
                  "), which this version does not read: of quantised checkpoints it reads float8 "
                  "e4m3 with scales by row or tensor; use such a one or the bf16 one");
  }
}

// Parameters in all and by part; `Number` is double where int64 could overflow.
template <class Number>
struct Parameters {
  Number always = 0, routed = 0, routed_active = 0, vision = 0;

  explicit Parameters(const ModelSpec& spec) {
    const Number hidden = spec.hidden, q = Number(spec.heads) * spec.head_dim,
                 kv = Number(spec.kv_heads) * spec.head_dim;
    always = hidden * spec.vocab_size * (spec.tied_embeddings ? 1 : 2) + hidden;
    for (const LayerSpec& layer : spec.layers) {
      const Number mlp = 3 * hidden * layer.intermediate;  // dense, shared, or one expert
      always += hidden * (2 * q + 2 * kv) + 2 * hidden + mlp;
      if (!layer.moe) continue;
      always += hidden * layer.experts;
      routed += mlp * layer.experts;
      routed_active += mlp * layer.top_k;
    }
    if (spec.vision) count_vision(*spec.vision, hidden);
  }

  void count_vision(const VisionSpec& spec, Number text_hidden) {
    const Number hidden = spec.hidden, intermediate = spec.intermediate;
    const Number norm = 2 * hidden, patches = Number(spec.grid()) * spec.grid();
    const Number layer = 2 * norm + 4 * (hidden * hidden + hidden) +  // q, k, v, o
                         2 * hidden * intermediate + intermediate + hidden;
    const Number patch_embedding = hidden * 3 * spec.patch_size * spec.patch_size;
    const Number joined = hidden * spec.shuffle_factor * spec.shuffle_factor;
    vision = layer * spec.layers + patch_embedding + hidden /* class */ + (patches + 1) * hidden +
             2 * norm + joined * spec.adapter_width +
             Number(spec.adapter_width) * spec.output_width + text_hidden * spec.output_width;
  }

  Number total() const { return always + routed + vision; }
};

// `config_name` and `generation_name` are what messages call the texts.
ModelSpec parse(const std::string& config, const std::string& config_name,
                const std::string& generation_config, const std::string& generation_name) {
  const json document = parse_json(config, config_name);
  const Fields root(document, config_name);
  const std::string type = root.text("model_type", "");
  if (type != "llama4" && type != "llama4_text") {
    root.bad("model_type", type, "\"llama4\" or \"llama4_text\": puna runs Llama 4",
             ErrorCode::kUnsupported);
  }
  ModelSpec spec;
  spec.multimodal = type == "llama4";
  const std::optional<Fields> nested = root.object("text_config");
  if (spec.multimodal && !nested) root.refuse(ErrorCode::kModelFormat, "text_config is missing");
  const Fields& text = spec.multimodal ? *nested : root;
  refuse_quantisation(root);
  refuse_quantisation(text);

  spec.vocab_size = text.integer("vocab_size", 202048, 1, kMaxSize);
  spec.hidden = text.integer("hidden_size", 5120, 1, kMaxSize);
  spec.heads = text.integer("num_attention_heads", 40, 1, kMaxHeads);
  // In these two a null has a meaning of its own.
  spec.kv_heads = text.integer("num_key_value_heads",
                               text.has("num_key_value_heads") ? spec.heads : 8, 1, kMaxHeads);
  spec.head_dim =
      text.integer("head_dim", text.has("head_dim") ? spec.hidden / spec.heads : 128, 1, kMaxHeads);
  if (spec.heads % spec.kv_heads != 0) {
    text.refuse(ErrorCode::kModelFormat, text.path(), "num_attention_heads is ", spec.heads,
                "; it must be a multiple of num_key_value_heads = ", spec.kv_heads);
  }
  if (spec.head_dim < 2 || spec.head_dim % 2 != 0) {
    text.refuse(ErrorCode::kModelFormat, text.path(), "head_dim is ", spec.head_dim,
                "; RoPE needs an even one");
  }
  spec.rms_eps = text.number("rms_norm_eps", 1e-5, 0, 1);
  spec.tied_embeddings = text.flag("tie_word_embeddings", root.flag("tie_word_embeddings", false));
  spec.max_position = text.integer("max_position_embeddings", 131072, 1, kMaxPosition);
  const double floor_scale = text.number("floor_scale", 8192, 1, static_cast<double>(kMaxPosition));
  if (floor_scale != std::floor(floor_scale)) {
    text.bad("floor_scale", *text.find("floor_scale"), "a whole number of tokens");
  }
  spec.temperature_floor = static_cast<int64_t>(floor_scale);
  spec.temperature_scale = text.number("attn_scale", 0.1, 0, 1e6);
  spec.rope = read_rope(text, spec, spec.warnings);
  spec.layers = read_layers(text, spec.warnings);
  if (text.flag("attention_bias", false)) {
    text.bad("attention_bias", true, "false", ErrorCode::kUnsupported);
  }
  if (const std::string act = text.text("hidden_act", "silu"); act != "silu") {
    text.bad("hidden_act", act, "\"silu\"", ErrorCode::kUnsupported);
  }
  if (spec.multimodal) {
    if (const std::optional<Fields> vision = root.object("vision_config")) {
      spec.vision = read_vision(*vision, spec.warnings);
    }
    spec.image_token = token(root, "image_token_index", token(root, "image_token_id", 200092));
  }
  check_magnitude(spec, config_name, "max_position_embeddings");

  spec.bos_token = token(text, "bos_token_id", -1);
  spec.pad_token = token(text, "pad_token_id", -1);
  read_eos(text, spec.eos_tokens);
  if (!generation_config.empty()) {
    const json generation = parse_json(generation_config, generation_name);
    read_generation(Fields(generation, generation_name), spec);
  }
  drop_tokens_outside(spec);
  return spec;
}

}  // namespace

ModelSpec parse_model_spec(const std::string& config, const std::string& generation_config) {
  return parse(config, "config.json", generation_config, "generation_config.json");
}

ModelSpec read_model_spec(const std::string& directory) {
  require_checkpoint_directory(directory);
  const std::filesystem::path root(directory);
  const std::string config = (root / "config.json").string();
  const std::string generation = (root / "generation_config.json").string();
  std::error_code ignored;
  return parse(read_text(config), config,
               std::filesystem::exists(generation, ignored) ? read_text(generation) : "",
               generation);
}

void warn_of_norm_eps(double said, const std::string& name, std::vector<std::string>& warnings) {
  // A float of it, as GGUF has, differs in the ninth digit.
  if (std::abs(said - VisionSpec::kNormEps) < 1e-6 * VisionSpec::kNormEps) return;
  std::ostringstream text;
  text << "the vision tower's " << name << " is " << said << "; as in transformers, "
       << VisionSpec::kNormEps << " is used";
  warnings.push_back(text.str());
}

void check_magnitude(const ModelSpec& spec, const std::string& file,
                     const std::string& context_name) {
  const double parameters = Parameters<double>(spec).total();
  if (parameters > kMaxParameters) {
    fail(ErrorCode::kModelFormat, "[config] ", file, ": its sizes make a model of ", parameters,
         " parameters; at most ", kMaxParameters, " are supported");
  }
  int64_t experts = 0;
  for (const LayerSpec& layer : spec.layers) experts += layer.experts;
  if (experts > kMaxAllExperts)
    fail(ErrorCode::kModelFormat, "[config] ", file, ": its ", spec.layers.size(), " layers have ",
         experts, " experts in all; at most ", kMaxAllExperts, " are supported");
  const double cache = 2.0 * static_cast<double>(spec.kv_heads * spec.head_dim) * sizeof(float) *
                       static_cast<double>(spec.layers.size()) *
                       static_cast<double>(spec.max_position);
  if (cache > kMaxCacheBytes) {
    fail(ErrorCode::kModelFormat, "[config] ", file, ": ", context_name, " ", spec.max_position,
         " would make a KV cache of ", cache, " bytes; at most ", kMaxCacheBytes, " are supported");
  }
}

std::vector<double> inverse_frequencies(const RopeSpec& rope, int64_t head_dim) {
  std::vector<double> frequencies;
  for (int64_t i = 0; i < head_dim; i += 2) {
    double f = std::pow(rope.theta, -static_cast<double>(i) / static_cast<double>(head_dim));
    if (rope.llama3) {
      const double wavelength = 2 * std::numbers::pi / f;
      const double low = rope.original_max_position / rope.low_freq_factor;
      const double high = rope.original_max_position / rope.high_freq_factor;
      if (wavelength > low) {
        f /= rope.factor;
      } else if (wavelength >= high && rope.high_freq_factor > rope.low_freq_factor) {
        const double smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) /
                              (rope.high_freq_factor - rope.low_freq_factor);
        f = (1 - smooth) * f / rope.factor + smooth * f;
      }
    }
    if (!rope.divisors.empty()) f /= rope.divisors[i / 2];
    frequencies.push_back(f);
  }
  return frequencies;
}

double attention_temperature(int64_t position, int64_t floor_scale, double scale) {
  return 1 + scale * std::log1p(static_cast<double>((position + 1) / floor_scale));
}

ParameterCount count_parameters(const ModelSpec& spec) {
  const Parameters<int64_t> count(spec);
  return {.total = count.total(),
          .active = count.always + count.routed_active,
          .routed_experts = count.routed,
          .vision = count.vision};
}

}  // namespace puna
