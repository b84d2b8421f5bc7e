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

namespace puna {

namespace {

using nlohmann::json;

// No dimension of any model comes near this, and products of a few of them stay within int64.
constexpr int64_t kMaxSize = int64_t{1} << 24;
constexpr int64_t kMaxLayers = 4096;
constexpr int64_t kMaxTile = 4096;

// Typed, checked reading of one JSON object; `where` names it in messages.
class Fields {
 public:
  Fields(const json& object, std::string where) : object_(object), where_(std::move(where)) {
    if (!object.is_object())
      fail(ErrorCode::kModelFormat, "[config] ", where_, " is no JSON object");
  }

  // Absent and null are the same, as in transformers.
  const json* find(const char* name) const {
    const auto found = object_.find(name);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }

  // Whether the field is given at all, if only as null.
  bool has(const char* name) const { return object_.contains(name); }

  int64_t integer(const char* name, int64_t otherwise, int64_t least, int64_t most) const {
    const json* value = find(name);
    if (!value) return otherwise;
    if (!value->is_number_integer()) bad(name, *value, "a whole number");
    const bool too_large =
        value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(most);
    if (too_large || value->get<int64_t>() < least || value->get<int64_t>() > most) {
      bad(name, *value, "from " + std::to_string(least) + " to " + std::to_string(most));
    }
    return value->get<int64_t>();
  }

  double number(const char* name, double otherwise, double least, double most) const {
    const json* value = find(name);
    if (!value) return otherwise;
    if (!value->is_number()) bad(name, *value, "a number");
    const auto x = value->get<double>();
    if (!(x >= least && x <= most)) {
      std::ostringstream range;
      range << "from " << least << " to " << most;
      bad(name, *value, range.str());
    }
    return x;
  }

  // true, false, or a number (some checkpoints say 4 for true).
  bool flag(const char* name, bool otherwise) const {
    const json* value = find(name);
    if (!value) return otherwise;
    if (value->is_boolean()) return value->get<bool>();
    if (value->is_number_integer()) return value->get<int64_t>() != 0;
    bad(name, *value, "true or false");
  }

  std::string text(const char* name, const std::string& otherwise) const {
    const json* value = find(name);
    if (!value) return otherwise;
    if (!value->is_string()) bad(name, *value, "a string");
    return value->get<std::string>();
  }

  // A list of whole numbers in [least, most], or nothing if absent or (where `empty_is_absent`)
  // empty.
  std::optional<std::vector<int64_t>> integers(const char* name, int64_t least, int64_t most,
                                               bool empty_is_absent) const {
    const json* value = find(name);
    if (!value || (empty_is_absent && value->is_array() && value->empty())) return std::nullopt;
    if (!value->is_array()) bad(name, *value, "a list");
    std::vector<int64_t> numbers;
    for (const json& item : *value) {
      if (!item.is_number_integer() ||
          (item.is_number_unsigned() && item.get<uint64_t>() > INT64_MAX) ||
          item.get<int64_t>() < least || item.get<int64_t>() > most) {
        bad(name, item,
            "a list of whole numbers from " + std::to_string(least) + " to " +
                std::to_string(most));
      }
      numbers.push_back(item.get<int64_t>());
    }
    return numbers;
  }

  [[noreturn]] void bad(const char* name, const json& value, const std::string& expected) const {
    std::string shown = value.dump(-1, ' ', true, json::error_handler_t::replace);
    if (shown.size() > 60) shown = shown.substr(0, 57) + "...";
    fail(ErrorCode::kModelFormat, "[config] ", where_, ".", name, " is ", shown, "; it must be ",
         expected);
  }

  const std::string& where() const { return where_; }

 private:
  const json& object_;
  std::string where_;
};

RopeSpec read_rope(const Fields& text, std::vector<std::string>& warnings) {
  RopeSpec rope;
  rope.theta = text.number("rope_theta", 500000, 1, 1e12);
  // transformers 4 has rope_scaling beside rope_theta, 5 has both in rope_parameters.
  const json* object = text.find("rope_parameters");
  if (!object) object = text.find("rope_scaling");
  if (!object) return rope;
  const Fields fields(*object, text.where() + ".rope_parameters");
  rope.theta = fields.number("rope_theta", rope.theta, 1, 1e12);
  const std::string type = fields.text("rope_type", fields.text("type", "default"));
  if (type == "default") return rope;
  if (type != "llama3") {
    fail(ErrorCode::kUnsupported, "[config] ", fields.where(), ".rope_type is \"", type,
         "\"; Llama 4 has \"default\" and \"llama3\"");
  }
  rope.llama3 = true;
  rope.factor = fields.number("factor", 8, 1e-3, 1e6);
  rope.low_freq_factor = fields.number("low_freq_factor", 1, 1e-6, 1e6);
  rope.high_freq_factor = fields.number("high_freq_factor", 4, 1e-6, 1e6);
  rope.original_max_position = fields.number("original_max_position_embeddings", 8192, 1, 1e12);
  if (rope.high_freq_factor < rope.low_freq_factor) {
    fail(ErrorCode::kModelFormat, "[config] ", fields.where(), ".high_freq_factor is ",
         rope.high_freq_factor, ", below low_freq_factor ", rope.low_freq_factor);
  }
  if (rope.factor == 8 && rope.high_freq_factor == 4) {
    warnings.push_back(
        "config.json scales RoPE by factor 8 with high_freq_factor 4, as the first uploads of "
        "Scout did; Meta corrected this to 16 and 1. The file is obeyed: check for a newer one");
  }
  return rope;
}

std::vector<LayerSpec> read_layers(const Fields& text) {
  const int64_t count = text.integer("num_hidden_layers", 48, 1, kMaxLayers);
  const int64_t interval = text.integer("no_rope_layer_interval", 4, 1, kMaxSize);
  const auto ropes = text.integers("no_rope_layers", 0, 1, /*empty_is_absent=*/true);
  if (ropes && static_cast<int64_t>(ropes->size()) != count) {
    text.bad("no_rope_layers", *text.find("no_rope_layers"),
             "a list of " + std::to_string(count) + " entries, one per layer");
  }
  const int64_t step = text.integer("interleave_moe_layer_step", 1, 0, kMaxSize);
  const auto moe_layers = text.integers("moe_layers", 0, count - 1, /*empty_is_absent=*/false);
  const json* types = text.find("layer_types");
  if (types && (!types->is_array() || static_cast<int64_t>(types->size()) != count)) {
    text.bad("layer_types", *types, "a list of " + std::to_string(count) + " names");
  }
  const int64_t chunk =
      text.integer("attention_chunk_size", text.has("attention_chunk_size") ? 0 : 8192, 1,
                   std::numeric_limits<int32_t>::max());
  const bool qk_norm = text.flag("use_qk_norm", true);
  const bool temperature = text.flag("attn_temperature_tuning", true);
  const int64_t experts = text.integer("num_local_experts", 16, 0, 65536);
  const int64_t top_k = text.integer("num_experts_per_tok", 1, 0, 65536);
  const int64_t expert_width = text.integer("intermediate_size", 8192, 1, kMaxSize);
  const int64_t dense_width = text.integer("intermediate_size_mlp", 16384, 1, kMaxSize);

  std::vector<LayerSpec> layers(static_cast<size_t>(count));
  for (int64_t l = 0; l < count; ++l) {
    LayerSpec& layer = layers[l];
    layer.rope = ropes ? (*ropes)[l] != 0 : (l + 1) % interval != 0;
    bool chunked = layer.rope;
    if (types) {
      const json& type = (*types)[l];
      if (type != "chunked_attention" && type != "full_attention") {
        text.bad("layer_types", type, "\"chunked_attention\" or \"full_attention\"");
      }
      chunked = type == "chunked_attention";
    }
    layer.chunk = chunked ? chunk : 0;
    layer.qk_norm = layer.rope && qk_norm;
    layer.temperature = !layer.rope && temperature;
    layer.moe = moe_layers
                    ? std::find(moe_layers->begin(), moe_layers->end(), l) != moe_layers->end()
                    : step > 0 && (l + 1) % step == 0;
    layer.intermediate = layer.moe ? expert_width : dense_width;
    if (!layer.moe) continue;
    if (experts < 1) {
      fail(ErrorCode::kModelFormat, "[config] ", text.where(), " makes layer ", l,
           " a mixture of experts, but num_local_experts is ", experts);
    }
    if (top_k < 1 || top_k > experts) {
      fail(ErrorCode::kModelFormat, "[config] ", text.where(), ".num_experts_per_tok is ", top_k,
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
    const auto sides = fields.integers(name, 1, kMaxTile, false);
    if (sides->size() != 2 || (*sides)[0] != (*sides)[1])
      fields.bad(name, *value, "a number or two equal ones");
    return (*sides)[0];
  }
  return fields.integer(name, otherwise, 1, kMaxTile);
}

VisionSpec read_vision(const Fields& fields) {
  VisionSpec vision;
  vision.image_size = square(fields, "image_size", 448);
  vision.patch_size = square(fields, "patch_size", 14);
  vision.hidden = fields.integer("hidden_size", 768, 1, kMaxSize);
  vision.layers = fields.integer("num_hidden_layers", 34, 0, kMaxLayers);
  vision.heads = fields.integer("num_attention_heads", 16, 1, 65536);
  vision.intermediate = fields.integer("intermediate_size", 5632, 1, kMaxSize);
  vision.adapter_width = fields.integer("projector_input_dim", 4096, 1, kMaxSize);
  vision.output_width = fields.integer("vision_output_dim", 7680, 1, kMaxSize);
  vision.norm_eps = fields.number("norm_eps", 1e-5, 0, 1);
  vision.rope_theta = fields.number("rope_theta", 10000, 1, 1e12);
  if (const json* rope = fields.find("rope_parameters")) {
    vision.rope_theta = Fields(*rope, fields.where() + ".rope_parameters")
                            .number("rope_theta", vision.rope_theta, 1, 1e12);
  }
  const auto require = [&](bool ok, const auto&... parts) {
    if (!ok) fail(ErrorCode::kModelFormat, "[config] ", fields.where(), ": ", parts...);
  };
  if (fields.integer("num_channels", 3, 1, 65536) != 3)
    fields.bad("num_channels", *fields.find("num_channels"), "3");
  const std::string act = fields.text("hidden_act", "gelu");
  require(act == "gelu", "hidden_act is \"", act, "\"; Llama 4 has \"gelu\"");
  require(vision.image_size % vision.patch_size == 0, "image_size ", vision.image_size,
          " is no multiple of patch_size ", vision.patch_size);
  require(vision.hidden % vision.heads == 0 && vision.hidden / vision.heads % 4 == 0,
          "hidden_size ", vision.hidden, " over ", vision.heads,
          " heads must give a head dimension that is a multiple of 4 ", "(2-D RoPE)");
  const double ratio = fields.number("pixel_shuffle_ratio", 0.5, 1e-3, 1);
  vision.shuffle_factor = std::lround(1 / ratio);
  require(std::abs(ratio * static_cast<double>(vision.shuffle_factor) - 1) < 1e-6,
          "pixel_shuffle_ratio is ", ratio, "; it must be 1 / n");
  require(vision.grid() % vision.shuffle_factor == 0, "a grid of ", vision.grid(),
          " patches is no multiple of ", vision.shuffle_factor, " (1 / pixel_shuffle_ratio)");
  const int64_t joined = vision.hidden * vision.shuffle_factor * vision.shuffle_factor;
  require(vision.intermediate == joined, "intermediate_size is ", vision.intermediate,
          "; the adapter wants hidden_size / pixel_shuffle_ratio^2 = ", joined);
  const int64_t output = fields.integer("projector_output_dim", 4096, 1, kMaxSize);
  require(vision.adapter_width == output && vision.output_width == output, "projector_input_dim ",
          vision.adapter_width, ", projector_output_dim ", output, " and vision_output_dim ",
          vision.output_width, " must be equal");
  require(!fields.flag("multi_modal_projector_bias", false),
          "multi_modal_projector_bias is not supported");
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
  const auto ids = fields.integers("eos_token_id", 0, std::numeric_limits<int32_t>::max(), false);
  for (const int64_t id : *ids) eos.push_back(static_cast<int32_t>(id));
}

DType read_dtype(const Fields& root, const Fields& text) {
  std::string name = "bfloat16";
  for (const Fields* fields : {&root, &text}) {
    for (const char* key : {"torch_dtype", "dtype"}) {
      if (fields->find(key)) name = fields->text(key, name);
    }
  }
  if (name.starts_with("torch.")) name = name.substr(6);
  if (name == "float32") return DType::kF32;
  if (name == "float16") return DType::kF16;
  return DType::kBF16;
}

}  // namespace

ModelSpec parse_model_spec(const std::string& config, const std::string& generation_config) {
  const json document = parse_json(config, "config.json");
  const Fields root(document, "config.json");
  const std::string type = root.text("model_type", "");
  if (type != "llama4" && type != "llama4_text") {
    fail(ErrorCode::kUnsupported, "[config] model_type is \"", type,
         "\"; puna runs Llama 4 (\"llama4\" or \"llama4_text\")");
  }
  if (const json* quantisation = root.find("quantization_config")) {
    const Fields fields(*quantisation, "config.json.quantization_config");
    fail(ErrorCode::kUnsupported, "[config] the checkpoint is quantised (quant_method \"",
         fields.text("quant_method", "?"),
         "\"), which this version does not read; use the bf16 one");
  }
  ModelSpec spec;
  spec.multimodal = type == "llama4";
  const json* nested = root.find("text_config");
  if (spec.multimodal && !nested)
    fail(ErrorCode::kModelFormat, "[config] config.json has no text_config");
  const Fields text(spec.multimodal ? *nested : document,
                    spec.multimodal ? "text_config" : "config.json");

  spec.vocab_size = text.integer("vocab_size", 202048, 1, kMaxSize);
  spec.hidden = text.integer("hidden_size", 5120, 1, kMaxSize);
  spec.heads = text.integer("num_attention_heads", 40, 1, 65536);
  spec.kv_heads = text.integer("num_key_value_heads",
                               text.has("num_key_value_heads") ? spec.heads : 8, 1, 65536);
  spec.head_dim =
      text.integer("head_dim", text.has("head_dim") ? spec.hidden / spec.heads : 128, 1, 65536);
  spec.rms_eps = text.number("rms_norm_eps", 1e-5, 0, 1);
  spec.tied_embeddings = text.flag("tie_word_embeddings", root.flag("tie_word_embeddings", false));
  spec.max_position = text.integer("max_position_embeddings", 131072, 1, int64_t{1} << 40);
  spec.temperature_floor = static_cast<int64_t>(text.number("floor_scale", 8192, 1, 1e15));
  spec.temperature_scale = text.number("attn_scale", 0.1, 0, 1e6);
  spec.rope = read_rope(text, spec.warnings);
  spec.layers = read_layers(text);
  if (spec.heads % spec.kv_heads != 0) {
    fail(ErrorCode::kModelFormat, "[config] num_attention_heads ", spec.heads,
         " is no multiple of num_key_value_heads ", spec.kv_heads);
  }
  if (spec.head_dim % 2 != 0) {
    fail(ErrorCode::kModelFormat, "[config] head_dim is ", spec.head_dim,
         "; RoPE needs an even one");
  }
  if (text.flag("attention_bias", false)) {
    fail(ErrorCode::kUnsupported, "[config] attention_bias is true; Llama 4 has none");
  }
  const std::string act = text.text("hidden_act", "silu");
  if (act != "silu")
    fail(ErrorCode::kUnsupported, "[config] hidden_act is \"", act, "\"; Llama 4 has \"silu\"");

  if (const json* vision = root.find("vision_config"); vision && spec.multimodal) {
    spec.vision = read_vision(Fields(*vision, "vision_config"));
  }
  spec.dtype = read_dtype(root, text);
  spec.bos_token = token(text, "bos_token_id", -1);
  spec.pad_token = token(text, "pad_token_id", -1);
  read_eos(text, spec.eos_tokens);
  if (spec.multimodal) {
    spec.image_token = token(root, "image_token_index", token(root, "image_token_id", 200092));
  }

  if (!generation_config.empty()) {
    const json generation = parse_json(generation_config, "generation_config.json");
    const Fields fields(generation, "generation_config.json");
    spec.bos_token = token(fields, "bos_token_id", spec.bos_token);
    spec.pad_token = token(fields, "pad_token_id", spec.pad_token);
    read_eos(fields, spec.eos_tokens);
    if (fields.find("temperature"))
      spec.generation.temperature = fields.number("temperature", 0, 0, 100);
    if (fields.find("top_p")) spec.generation.top_p = fields.number("top_p", 1, 1e-9, 1);
    if (fields.find("top_k")) spec.generation.top_k = fields.integer("top_k", 0, 0, kMaxSize);
    if (!fields.flag("do_sample", true)) spec.generation.temperature = 0;
  }
  // Ids that the vocabulary does not have cannot be produced; several exporters leave such
  // defaults.
  const auto outside = [&](int32_t id) { return id < 0 || id >= spec.vocab_size; };
  std::erase_if(spec.eos_tokens, outside);
  for (int32_t* id : {&spec.bos_token, &spec.pad_token, &spec.image_token}) {
    if (outside(*id)) *id = -1;
  }
  return spec;
}

ModelSpec read_model_spec(const std::string& directory) {
  require_checkpoint_directory(directory);
  const std::filesystem::path root(directory);
  const std::filesystem::path generation = root / "generation_config.json";
  std::error_code ignored;
  return parse_model_spec(
      read_text((root / "config.json").string()),
      std::filesystem::exists(generation, ignored) ? read_text(generation.string()) : "");
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
    frequencies.push_back(f);
  }
  return frequencies;
}

double attention_temperature(int64_t position, int64_t floor_scale, double scale) {
  return 1 + scale * std::log1p(static_cast<double>((position + 1) / floor_scale));
}

ParameterCount count_parameters(const ModelSpec& spec) {
  ParameterCount count;
  const int64_t q = spec.heads * spec.head_dim, kv = spec.kv_heads * spec.head_dim;
  int64_t always = spec.vocab_size * spec.hidden * (spec.tied_embeddings ? 1 : 2) + spec.hidden;
  int64_t routed_active = 0;
  for (const LayerSpec& layer : spec.layers) {
    const int64_t mlp = 3 * spec.hidden * layer.intermediate;  // dense, shared, or one expert
    always += spec.hidden * (2 * q + 2 * kv) + 2 * spec.hidden + mlp;
    if (!layer.moe) continue;
    always += layer.experts * spec.hidden;
    count.routed_experts += layer.experts * mlp;
    routed_active += layer.top_k * mlp;
  }
  if (spec.vision) {
    const VisionSpec& v = *spec.vision;
    const int64_t layer = 4 * (v.hidden * v.hidden + v.hidden) + 2 * v.hidden * v.intermediate +
                          v.intermediate + v.hidden + 4 * v.hidden;
    count.vision = v.layers * layer + 3 * v.patch_size * v.patch_size * v.hidden + v.hidden +
                   (v.grid() * v.grid() + 1) * v.hidden + 4 * v.hidden +
                   v.hidden * v.shuffle_factor * v.shuffle_factor * v.adapter_width +
                   v.adapter_width * v.output_width + v.output_width * spec.hidden;
  }
  count.active = always + routed_active;
  count.total = always + count.routed_experts + count.vision;
  return count;
}

}  // namespace puna
