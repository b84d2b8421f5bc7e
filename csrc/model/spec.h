// The architecture of a checkpoint as data, read from config.json and generation_config.json or
// from the metadata of a GGUF file.
//
// Everything that distinguishes Scout, Maverick, Guard 4 and their relatives is a field here; no
// code asks for a model's name. Sources: Meta's llama-models, transformers' configuration_llama4.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace puna {

class Checkpoint;

struct RopeSpec {
  double theta = 500000;
  bool llama3 = false;  // scale the low frequencies as Llama 3.1 does
  double factor = 1, low_freq_factor = 1, high_freq_factor = 1;
  double original_max_position = 8192;
  std::vector<double> divisors{};  // of each frequency, after that; empty: none

  bool operator==(const RopeSpec&) const = default;
};

struct LayerSpec {
  int64_t chunk = 0;  // length of the absolute attention chunks; 0: everything before it
  bool rope = true;
  bool qk_norm = false;      // weightless RMS norm of q and k heads, after RoPE
  bool temperature = false;  // q grows with the logarithm of the position
  bool moe = false;
  int64_t experts = 0, top_k = 0;
  int64_t intermediate = 0;  // width of each expert and of the shared expert, or of the dense MLP

  bool operator==(const LayerSpec&) const = default;
};

struct VisionSpec {
  int64_t image_size = 336, patch_size = 14;
  int64_t hidden = 0, layers = 0, heads = 0, intermediate = 0;
  int64_t shuffle_factor = 2;  // 1 / pixel_shuffle_ratio
  int64_t adapter_width = 0;   // out of the adapter's first product (projector_input_dim)
  int64_t output_width = 0;    // out of the adapter (vision_output_dim)
  double rope_theta = 10000;

  // Of layer norms, whatever a file says: transformers and Meta's model take PyTorch's default.
  static constexpr double kNormEps = 1e-5;

  int64_t grid() const { return image_size / patch_size; }
  int64_t tokens_per_tile() const { return grid() / shuffle_factor * (grid() / shuffle_factor); }

  bool operator==(const VisionSpec&) const = default;
};

struct GenerationSpec {  // what generation_config.json recommends
  std::optional<double> temperature, top_p;
  std::optional<int64_t> top_k;

  bool operator==(const GenerationSpec&) const = default;
};

struct ModelSpec {
  int64_t vocab_size = 0, hidden = 0;
  int64_t heads = 0, kv_heads = 0, head_dim = 0;
  double rms_eps = 1e-5;
  bool tied_embeddings = false;
  int64_t max_position = 0;
  RopeSpec rope;
  int64_t temperature_floor = 8192;
  double temperature_scale = 0.1;
  std::vector<LayerSpec> layers;
  std::optional<VisionSpec> vision;

  bool multimodal = false;  // of the form Llama4ForConditionalGeneration
  int32_t bos_token = -1, pad_token = -1, image_token = -1;  // -1: none
  std::vector<int32_t> eos_tokens;
  GenerationSpec generation;
  std::vector<std::string> warnings;

  bool operator==(const ModelSpec&) const = default;
};

// Reads DIRECTORY/config.json and, where there is one, generation_config.json.
// Throws ModelNotFound, ModelFormat (naming the field, its value and what is expected) or
// Unsupported.
ModelSpec read_model_spec(const std::string& directory);
// From the metadata of a GGUF file and of its vision tower. Throws ModelFormat naming the key, or
// Unsupported.
ModelSpec gguf_model_spec(const Checkpoint& checkpoint);
// As read_model_spec(), from texts; an empty generation_config is none.
ModelSpec parse_model_spec(const std::string& config, const std::string& generation_config = "");

// The other way: texts from which parse_model_spec() makes an equal ModelSpec, but for its
// warnings. All layers of a kind must be alike, as every reader here leaves them.
struct ConfigTexts {
  std::string config, generation_config;  // the second is empty where nothing is recommended
};
ConfigTexts config_texts(const ModelSpec& spec);

// Inverse frequencies of the pairs of a head, [head_dim / 2], with the llama3 scaling applied.
std::vector<double> inverse_frequencies(const RopeSpec& rope, int64_t head_dim);

// The factor of q at an absolute position: 1 + scale * ln(1 + floor((position + 1) / floor_scale)).
double attention_temperature(int64_t position, int64_t floor_scale, double scale);

struct ParameterCount {
  int64_t total = 0;
  int64_t active = 0;  // used per text token, embedding and head included
  int64_t routed_experts = 0, vision = 0;
};
ParameterCount count_parameters(const ModelSpec& spec);

}  // namespace puna
