// A ModelSpec as config.json and generation_config.json, in the words of transformers'
// configuration_llama4 where it has them.
#include <algorithm>
#include <nlohmann/json.hpp>

#include "model/spec.h"
#include "model/spec_limits.h"

namespace puna {

namespace {

using nlohmann::json;

json rope_scaling(const RopeSpec& rope) {
  if (!rope.divisors.empty()) {
    return {{"rope_type", kDivisorsRopeType}, {"divisors", rope.divisors}};
  }
  if (!rope.llama3) return nullptr;
  return {{"rope_type", "llama3"},
          {"factor", rope.factor},
          {"low_freq_factor", rope.low_freq_factor},
          {"high_freq_factor", rope.high_freq_factor},
          {"original_max_position_embeddings", rope.original_max_position}};
}

void write_layers(const std::vector<LayerSpec>& layers, json& text) {
  json ropes = json::array(), types = json::array(), moe_layers = json::array();
  text["attention_chunk_size"] = nullptr;
  for (size_t l = 0; l < layers.size(); ++l) {
    const LayerSpec& layer = layers[l];
    ropes.push_back(layer.rope ? 1 : 0);
    types.push_back(layer.chunk > 0 ? "chunked_attention" : "full_attention");
    if (layer.chunk > 0) text["attention_chunk_size"] = layer.chunk;
    text[layer.rope ? "use_qk_norm" : "attn_temperature_tuning"] =
        layer.rope ? layer.qk_norm : layer.temperature;
    text[layer.moe ? "intermediate_size" : "intermediate_size_mlp"] = layer.intermediate;
    if (!layer.moe) continue;
    moe_layers.push_back(l);
    text["num_local_experts"] = layer.experts;
    text["num_experts_per_tok"] = layer.top_k;
  }
  text["num_hidden_layers"] = layers.size();
  text["no_rope_layers"] = ropes;
  text["layer_types"] = types;
  text["moe_layers"] = moe_layers;
}

json vision_config(const VisionSpec& vision) {
  return {{"image_size", vision.image_size},
          {"patch_size", vision.patch_size},
          {"hidden_size", vision.hidden},
          {"num_hidden_layers", vision.layers},
          {"num_attention_heads", vision.heads},
          {"intermediate_size", vision.intermediate},
          {"pixel_shuffle_ratio", 1 / static_cast<double>(vision.shuffle_factor)},
          {"projector_input_dim", vision.adapter_width},
          {"projector_output_dim", vision.adapter_width},
          {"vision_output_dim", vision.output_width},
          {"norm_eps", VisionSpec::kNormEps},
          {"rope_theta", vision.rope_theta}};
}

json text_config(const ModelSpec& spec) {
  json text = {{"model_type", "llama4_text"},
               {"vocab_size", spec.vocab_size},
               {"hidden_size", spec.hidden},
               {"num_attention_heads", spec.heads},
               {"num_key_value_heads", spec.kv_heads},
               {"head_dim", spec.head_dim},
               {"rms_norm_eps", spec.rms_eps},
               {"tie_word_embeddings", spec.tied_embeddings},
               {"max_position_embeddings", spec.max_position},
               {"floor_scale", spec.temperature_floor},
               {"attn_scale", spec.temperature_scale},
               {"rope_theta", spec.rope.theta},
               {"rope_scaling", rope_scaling(spec.rope)},
               {"eos_token_id", spec.eos_tokens}};
  write_layers(spec.layers, text);
  if (spec.bos_token >= 0) text["bos_token_id"] = spec.bos_token;
  if (spec.pad_token >= 0) text["pad_token_id"] = spec.pad_token;
  return text;
}

std::string generation_config(const GenerationSpec& generation) {
  json document = json::object();
  if (generation.temperature) document["temperature"] = *generation.temperature;
  if (generation.top_p) document["top_p"] = *generation.top_p;
  if (generation.top_k) document["top_k"] = *generation.top_k;
  return document.empty() ? "" : document.dump(2);
}

}  // namespace

ConfigTexts config_texts(const ModelSpec& spec) {
  json document = text_config(spec);
  if (spec.multimodal) {
    document = {{"model_type", "llama4"}, {"text_config", document}};
    document["image_token_index"] = spec.image_token;
    document["tie_word_embeddings"] = spec.tied_embeddings;
    if (spec.vision) document["vision_config"] = vision_config(*spec.vision);
  }
  return {document.dump(2), generation_config(spec.generation)};
}

}  // namespace puna
