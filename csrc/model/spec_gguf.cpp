// The architecture of a GGUF file, from its metadata. What the format has no key for is as
// llama.cpp builds it in, unless a key of ours (docs/formats.md) says otherwise.
#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "io/checkpoint.h"
#include "io/message.h"
#include "model/spec.h"
#include "model/spec_limits.h"

namespace puna {

namespace {

// llama.cpp's constants for this architecture.
constexpr int64_t kBuiltInChunk = 8192, kBuiltInFloor = 8192, kBuiltInNoRopeInterval = 4;
constexpr double kBuiltInTemperatureScale = 0.1, kBuiltInVisionTheta = 10000;
constexpr int64_t kMaverickExperts = 128;  // which has no QK norm

constexpr int64_t kMaxToken = std::numeric_limits<int32_t>::max();

// Checked reading of keys with a common prefix.
class Keys {
 public:
  Keys(const GgufFile& file, std::string prefix) : file_(file), prefix_(std::move(prefix)) {}

  bool has(const std::string& key) const { return file_.has(prefix_ + key); }

  std::optional<int64_t> find(const std::string& key, int64_t least, int64_t most) const {
    const std::optional<int64_t> value = file_.integer(prefix_ + key);
    if (value && (*value < least || *value > most)) bad(key, *value, least, most);
    return value;
  }
  int64_t integer(const std::string& key, int64_t least, int64_t most) const {
    if (!has(key)) missing(key);
    return *find(key, least, most);
  }
  int64_t integer(const std::string& key, int64_t otherwise, int64_t least, int64_t most) const {
    return find(key, least, most).value_or(otherwise);
  }
  // One number, or one for each layer, all of them the same.
  std::optional<int64_t> uniform(const std::string& key, int64_t least, int64_t most) const {
    const auto values = file_.integers(prefix_ + key);
    if (!values) return std::nullopt;
    if (values->empty() || std::any_of(values->begin(), values->end(),
                                       [&](int64_t v) { return v != values->front(); })) {
      file_.refuse(ErrorCode::kUnsupported, prefix_, key,
                   " differs between layers (or is empty), which this version does not read");
    }
    if (values->front() < least || values->front() > most) bad(key, values->front(), least, most);
    return values->front();
  }
  int64_t required(const std::string& key, int64_t least, int64_t most) const {
    const auto value = uniform(key, least, most);
    if (!value) missing(key);
    return *value;
  }
  double number(const std::string& key, double otherwise, double least, double most) const {
    const std::optional<double> value = file_.number(prefix_ + key);
    if (value && !(*value >= least && *value <= most)) bad(key, *value, least, most);
    return value.value_or(otherwise);
  }
  double number(const std::string& key, double least, double most) const {
    if (!has(key)) missing(key);
    return number(key, 0, least, most);
  }
  bool flag(const std::string& key, bool otherwise) const {
    return file_.flag(prefix_ + key).value_or(otherwise);
  }

  [[noreturn]] void missing(const std::string& key) const {
    file_.refuse(ErrorCode::kModelFormat, prefix_, key, " is missing");
  }
  template <class Value>
  [[noreturn]] void bad(const std::string& key, Value value, Value least, Value most) const {
    file_.refuse(ErrorCode::kModelFormat, prefix_, key, " is ", value, "; it must be from ", least,
                 " to ", most);
  }

 private:
  const GgufFile& file_;
  std::string prefix_;
};

void read_rope(const GgufFile& file, const Checkpoint& checkpoint, const Keys& keys,
               ModelSpec& spec) {
  spec.rope.theta = keys.number("rope.freq_base", 500000, 1, 1e12);
  if (keys.integer("rope.dimension_count", spec.head_dim, 1, kMaxHeads) != spec.head_dim) {
    file.refuse(ErrorCode::kUnsupported, "llama4.rope.dimension_count is ",
                *file.integer("llama4.rope.dimension_count"), ", the heads have ", spec.head_dim,
                " dimensions: RoPE over a part is not supported");
  }
  const std::string_view type = file.text("llama4.rope.scaling.type").value_or("none");
  if (type != "none") {
    file.refuse(ErrorCode::kUnsupported, "llama4.rope.scaling.type is ", printable(type, 60),
                "; Llama 4 has none but the divisors in rope_freqs.weight");
  }
  const auto found = checkpoint.tensors().find("rope_freqs.weight");
  if (found == checkpoint.tensors().end()) return;
  const TensorRef& tensor = found->second;
  if (tensor.dtype != DType::kF32 || tensor.rank != 1 || tensor.shape[0] != spec.head_dim / 2) {
    file.refuse(ErrorCode::kModelFormat, "rope_freqs.weight is ", name_of(tensor.dtype), " ",
                tensor.shape_string(), "; it must be float32 (", spec.head_dim / 2, ")");
  }
  const auto* divisors = static_cast<const float*>(tensor.data);
  for (int64_t i = 0; i < tensor.shape[0]; ++i) {
    if (!(divisors[i] >= kMinRopeDivisor && divisors[i] <= kMaxRopeDivisor)) {
      file.refuse(ErrorCode::kModelFormat, "rope_freqs.weight[", i, "] is ", divisors[i],
                  "; a divisor of a frequency must be from ", kMinRopeDivisor, " to ",
                  kMaxRopeDivisor);
    }
    spec.rope.divisors.push_back(divisors[i]);
  }
}

// Which layers attend within chunks only; by default those with RoPE.
std::vector<bool> read_chunked(const GgufFile& file, std::vector<bool> ropes) {
  const char* const key = "llama4.attention.sliding_window_pattern";
  const auto pattern = file.integers(key);
  if (!pattern) return ropes;
  const auto count = static_cast<int64_t>(ropes.size());
  const auto given = static_cast<int64_t>(pattern->size());
  if (given != 1 && given < count) {
    file.refuse(ErrorCode::kModelFormat, key, " has ", given, " entries for ", count, " layers");
  }
  std::vector<bool> chunked;
  for (int64_t l = 0; l < count; ++l) {
    const int64_t interval = (*pattern)[0];
    chunked.push_back(given == 1 ? interval < 1 || l % interval < interval - 1
                                 : (*pattern)[l] != 0);
  }
  return chunked;
}

void read_layers(const GgufFile& file, const Keys& keys, ModelSpec& spec) {
  const Keys ours(file, "puna.attention.");
  const int64_t count = keys.integer("block_count", 1, kMaxLayers);
  const int64_t experts = keys.integer("expert_count", 0, 0, kMaxExperts);
  const int64_t top_k = experts > 0 ? keys.integer("expert_used_count", 1, experts) : 0;
  const int64_t step = experts > 0 ? keys.integer("interleave_moe_layer_step", 0, kMaxSize) : 0;

  // A window of 0 means RoPE in every layer and no chunks; any other is built in as 8192.
  const std::optional<int64_t> window = keys.find("attention.sliding_window", 0, kMaxPosition);
  const bool everything = window == 0;
  if (window && *window != 0 && *window != kBuiltInChunk && !ours.has("chunk_size")) {
    spec.warnings.push_back("llama4.attention.sliding_window is " + std::to_string(*window) +
                            "; as in llama.cpp, chunks of 8192 are used");
  }
  if (experts == 0 && !window && !ours.has("no_rope_interval")) {
    spec.warnings.push_back(
        "the file does not say which layers of this dense model use RoPE; as in llama.cpp, every "
        "4th has none, which is wrong for Llama Guard 4: load the original, or give the file "
        "puna.attention.no_rope_interval and puna.attention.chunk_size");
  }
  const int64_t chunk = ours.integer("chunk_size", everything ? 0 : kBuiltInChunk, 0,
                                     std::numeric_limits<int32_t>::max());
  const int64_t interval =
      ours.integer("no_rope_interval", everything ? 0 : kBuiltInNoRopeInterval, 0, kMaxSize);
  const bool qk_norm = ours.flag("qk_norm", experts != kMaverickExperts);
  const bool temperature = ours.flag("temperature", true);
  spec.temperature_floor = ours.integer("temperature_floor", kBuiltInFloor, 1, kMaxPosition);
  spec.temperature_scale = ours.number("temperature_scale", kBuiltInTemperatureScale, 0, 1e6);

  std::vector<bool> ropes;
  for (int64_t l = 0; l < count; ++l) ropes.push_back(interval == 0 || (l + 1) % interval != 0);
  const std::vector<bool> chunked = read_chunked(file, ropes);
  std::optional<int64_t> widths[2];  // of dense and MoE layers; read once, as they may be lists
  for (int64_t l = 0; l < count; ++l) {
    LayerSpec layer;
    layer.rope = ropes[l];
    layer.chunk = chunked[l] ? chunk : 0;
    layer.qk_norm = layer.rope && qk_norm;
    layer.temperature = !layer.rope && temperature;
    layer.moe = step > 0 && (l + 1) % step == 0;
    if (layer.moe) {
      layer.experts = experts;
      layer.top_k = top_k;
    }
    std::optional<int64_t>& width = widths[layer.moe ? 1 : 0];
    if (!width)
      width = keys.required(layer.moe ? "expert_feed_forward_length" : "feed_forward_length", 1,
                            kMaxSize);
    layer.intermediate = *width;
    spec.layers.push_back(layer);
  }
}

VisionSpec read_vision(const GgufFile& file, const Checkpoint& checkpoint, const ModelSpec& text,
                       std::vector<std::string>& warnings) {
  const auto require = [&](bool ok, ErrorCode code, const auto&... parts) {
    if (!ok) file.refuse(code, parts...);
  };
  constexpr ErrorCode kFormat = ErrorCode::kModelFormat, kOther = ErrorCode::kUnsupported;
  const std::string_view architecture = file.text("general.architecture").value_or("none");
  const std::string_view projector = file.text("clip.projector_type").value_or("none");
  require(architecture == "clip" && projector == "llama4", kOther, "it is of the architecture ",
          printable(architecture, 60), " with the projector ", printable(projector, 60),
          "; the vision tower of Llama 4 is clip with the projector llama4");
  const Keys keys(file, "clip.vision.");
  VisionSpec vision;
  vision.image_size = keys.integer("image_size", 1, kMaxTile);
  vision.patch_size = keys.integer("patch_size", 1, kMaxTile);
  vision.hidden = keys.integer("embedding_length", 1, kMaxSize);
  vision.layers = keys.integer("block_count", 0, kMaxLayers);
  vision.heads = keys.integer("attention.head_count", 1, kMaxHeads);
  vision.intermediate = keys.integer("feed_forward_length", 1, kMaxSize);
  vision.shuffle_factor = keys.integer("projector.scale_factor", 2, 1, kMaxTile);
  warn_of_norm_eps(keys.number("attention.layer_norm_epsilon", VisionSpec::kNormEps, 0, 1),
                   "attention.layer_norm_epsilon", warnings);
  vision.rope_theta = kBuiltInVisionTheta;
  require(vision.image_size % vision.patch_size == 0, kFormat, "clip.vision.image_size is ",
          vision.image_size, "; it must be a multiple of patch_size = ", vision.patch_size);
  require(vision.hidden % vision.heads == 0 && vision.hidden / vision.heads % 4 == 0, kFormat,
          "clip.vision.embedding_length is ", vision.hidden, ", over ", vision.heads,
          " heads; that must give a head dimension that is a multiple of 4 (2-D RoPE)");
  require(vision.grid() % vision.shuffle_factor == 0, kFormat,
          "clip.vision.image_size gives a grid of ", vision.grid(),
          " patches; that must be a multiple of the projector's scale_factor ",
          vision.shuffle_factor);
  const int64_t width = keys.integer("projection_dim", text.hidden, 1, kMaxSize);
  require(width == text.hidden, kFormat, "clip.vision.projection_dim is ", width,
          ", the text model is ", text.hidden, " wide: this is the vision tower of another model");
  require(file.flag("clip.use_gelu").value_or(true) && !file.flag("clip.use_silu").value_or(false),
          kOther, "its activation is not GELU, which Llama 4's is");
  for (const char* key : {"clip.vision.image_mean", "clip.vision.image_std"}) {
    for (const double value : file.numbers(key).value_or(std::vector<double>{})) {
      require(value == 0.5, kOther, key, " has ", value, "; Llama 4's is 0.5 in every channel");
    }
  }
  // No key says how wide the adapter is; resolve_weights() checks what follows from these.
  const auto rows = [&](const char* name) {
    const auto found = checkpoint.tensors().find(name);
    require(found != checkpoint.tensors().end() && found->second.rank == 2, kFormat,
            "it has no matrix ", name);
    const int64_t size = found->second.shape[0];
    require(size >= 1 && size <= kMaxSize, kFormat, name, " has ", size, " rows");
    return size;
  };
  vision.adapter_width = rows("mm.model.mlp.1.weight");
  vision.output_width = rows("mm.model.mlp.2.weight");
  return vision;
}

void read_tokens(const GgufFile& file, ModelSpec& spec) {
  const Keys keys(file, "tokenizer.ggml.");
  const auto id = [&](const char* key) {
    // Writers that have no such token say 2^32 - 1.
    const int64_t value = keys.integer(key, -1, -1, std::numeric_limits<uint32_t>::max());
    return value < spec.vocab_size ? static_cast<int32_t>(value) : -1;
  };
  spec.bos_token = id("bos_token_id");
  spec.pad_token = id("padding_token_id");
  const auto stop = [&](int32_t token) {
    if (token < 0 || token >= spec.vocab_size) return;
    if (std::count(spec.eos_tokens.begin(), spec.eos_tokens.end(), token) == 0) {
      spec.eos_tokens.push_back(token);
    }
  };
  for (const char* key : {"eos_token_id", "eot_token_id", "eom_token_id"}) stop(id(key));
  // The metadata name one end of a turn; Llama 4 has three. No key names the place of an image row.
  const auto tokens = file.texts("tokenizer.ggml.tokens");
  if (!tokens) return;
  for (size_t i = 0; i < std::min(tokens->size(), static_cast<size_t>(kMaxToken)); ++i) {
    const std::string_view token = (*tokens)[i];
    const auto number = static_cast<int32_t>(i);
    if (token == "<|end_of_text|>" || token == "<|eom|>" || token == "<|eot|>") stop(number);
    if (spec.multimodal && token == "<|patch|>" && number < spec.vocab_size)
      spec.image_token = number;
    if (token == "<|begin_of_text|>" && spec.bos_token < 0) spec.bos_token = number;
  }
}

}  // namespace

ModelSpec gguf_model_spec(const Checkpoint& checkpoint) {
  const GgufFile& file = *checkpoint.gguf();
  const auto architecture = file.text("general.architecture");
  if (architecture == "clip") {
    file.refuse(
        ErrorCode::kModelFormat,
        "it is a vision tower, not a model; give the text model's file, and this one as mmproj=");
  }
  if (architecture != "llama4") {
    file.refuse(ErrorCode::kUnsupported, "general.architecture is ",
                printable(architecture.value_or("missing"), 60), "; puna runs llama4");
  }
  const Keys keys(file, "llama4.");
  ModelSpec spec;
  spec.multimodal = checkpoint.projector() != nullptr;
  spec.warnings = checkpoint.warnings();
  spec.hidden = keys.integer("embedding_length", 1, kMaxSize);
  spec.heads = keys.required("attention.head_count", 1, kMaxHeads);
  spec.kv_heads = keys.uniform("attention.head_count_kv", 1, kMaxHeads).value_or(spec.heads);
  if (spec.heads % spec.kv_heads != 0) {
    file.refuse(ErrorCode::kModelFormat, "llama4.attention.head_count is ", spec.heads,
                "; it must be a multiple of head_count_kv = ", spec.kv_heads);
  }
  spec.head_dim = keys.integer("attention.key_length", spec.hidden / spec.heads, 1, kMaxHeads);
  if (spec.head_dim < 2 || spec.head_dim % 2 != 0 ||
      keys.integer("attention.value_length", spec.head_dim, 1, kMaxHeads) != spec.head_dim) {
    file.refuse(ErrorCode::kModelFormat, "llama4.attention.key_length is ", spec.head_dim,
                "; it must be even, and value_length the same");
  }
  spec.rms_eps = keys.number("attention.layer_norm_rms_epsilon", 0, 1);
  spec.max_position = keys.integer("context_length", 1, kMaxPosition);
  const auto tokens = file.texts("tokenizer.ggml.tokens");
  spec.vocab_size =
      keys.integer("vocab_size", tokens ? static_cast<int64_t>(tokens->size()) : 0, 1, kMaxSize);
  if (spec.vocab_size < 1) keys.missing("vocab_size");
  spec.tied_embeddings = !checkpoint.tensors().contains("output.weight");
  read_rope(file, checkpoint, keys, spec);
  read_layers(file, keys, spec);
  if (checkpoint.projector())
    spec.vision = read_vision(*checkpoint.projector(), checkpoint, spec, spec.warnings);
  check_magnitude(spec, file.path(), "llama4.context_length");
  read_tokens(file, spec);
  if (spec.vision && spec.image_token < 0) {
    spec.warnings.push_back("the vocabulary has no <|patch|>: no image can be placed");
  }
  const Keys sampling(file, "general.sampling.");
  if (sampling.has("temp")) spec.generation.temperature = sampling.number("temp", 0, 100);
  if (sampling.has("top_p")) spec.generation.top_p = sampling.number("top_p", 1e-9, 1);
  if (sampling.has("top_k")) spec.generation.top_k = sampling.integer("top_k", 0, kMaxSize);
  return spec;
}

}  // namespace puna
