#include "model/weight_map.h"

#include <algorithm>
#include <map>
#include <numeric>

#include "base/error.h"

namespace puna {

namespace {

// Levenshtein distance, given up (as `limit`) once it cannot be below `limit`.
size_t edit_distance(const std::string& a, const std::string& b, size_t limit) {
  if (std::max(a.size(), b.size()) - std::min(a.size(), b.size()) >= limit) return limit;
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    size_t least = row[0];
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({replaced, row[j] + 1, row[j - 1] + 1});
      least = std::min(least, row[j]);
    }
    if (least >= limit) return limit;
  }
  return row.back();
}

// "; the nearest name is X", or nothing if none is near.
template <class Names>
std::string nearest(const std::string& name, const Names& names) {
  size_t best = name.size() / 2 + 1;
  std::string found;
  for (const std::string& candidate : names) {
    const size_t distance = edit_distance(name, candidate, best);
    if (distance < best) {
      best = distance;
      found = candidate;
    }
  }
  return found.empty() ? "" : "; the nearest name is " + found;
}

// Buffers that some exporters store although they are computed.
bool harmless(const std::string& name) {
  return name.ends_with("rotary_emb.inv_freq") || name.ends_with("rotary_embedding.freqs_ci") ||
         name.ends_with("rope.freqs");
}

// The scheme of a quantised checkpoint, by the names of its tensors.
const char* quantisation_of(const std::string& name) {
  if (name.ends_with("weight_packed")) return "compressed-tensors (weight_packed)";
  if (name.find(".quant_state.") != std::string::npos || name.ends_with(".absmax"))
    return "bitsandbytes";
  if (name.ends_with("weight_scale_2")) return "ModelOpt NVFP4 (weight_scale_2)";
  if (name.ends_with("_scale") || name.ends_with("_scale_inv"))
    return "scaled FP8 or INT8 (weight_scale)";
  if (name.ends_with(".qweight")) return "GPTQ or AWQ (qweight)";
  return nullptr;
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

class Expectation {
 public:
  explicit Expectation(std::vector<ExpectedTensor>& all) : all_(all) {}
  void operator()(const std::string& name, std::vector<int64_t> shape, TensorRef& place) {
    all_.push_back({name, std::move(shape), &place});
  }

 private:
  std::vector<ExpectedTensor>& all_;
};

void expect_text(const ModelSpec& spec, TextWeights& text, Expectation& expect) {
  const std::string prefix = spec.multimodal ? "language_model." : "";
  const int64_t hidden = spec.hidden, q = spec.heads * spec.head_dim,
                kv = spec.kv_heads * spec.head_dim;
  expect(prefix + "model.embed_tokens.weight", {spec.vocab_size, hidden}, text.embed);
  if (!spec.tied_embeddings)
    expect(prefix + "lm_head.weight", {spec.vocab_size, hidden}, text.lm_head);
  expect(prefix + "model.norm.weight", {hidden}, text.norm);
  text.layers.resize(spec.layers.size());
  for (size_t l = 0; l < spec.layers.size(); ++l) {
    const LayerSpec& shape = spec.layers[l];
    LayerWeights& layer = text.layers[l];
    const std::string name = prefix + "model.layers." + std::to_string(l) + ".";
    expect(name + "input_layernorm.weight", {hidden}, layer.input_norm);
    expect(name + "post_attention_layernorm.weight", {hidden}, layer.post_norm);
    expect(name + "self_attn.q_proj.weight", {q, hidden}, layer.q);
    expect(name + "self_attn.k_proj.weight", {kv, hidden}, layer.k);
    expect(name + "self_attn.v_proj.weight", {kv, hidden}, layer.v);
    expect(name + "self_attn.o_proj.weight", {hidden, q}, layer.o);
    const std::string ffn = name + "feed_forward.";
    const std::string dense = shape.moe ? ffn + "shared_expert." : ffn;
    const int64_t width = shape.intermediate;
    expect(dense + "gate_proj.weight", {width, hidden}, layer.gate);
    expect(dense + "up_proj.weight", {width, hidden}, layer.up);
    expect(dense + "down_proj.weight", {hidden, width}, layer.down);
    if (!shape.moe) continue;
    expect(ffn + "router.weight", {shape.experts, hidden}, layer.router);
    expect(ffn + "experts.gate_up_proj", {shape.experts, hidden, 2 * width}, layer.experts_gate_up);
    expect(ffn + "experts.down_proj", {shape.experts, width, hidden}, layer.experts_down);
  }
}

void expect_vision(const ModelSpec& spec, VisionWeights& vision, Expectation& expect) {
  const VisionSpec& shape = *spec.vision;
  const int64_t hidden = shape.hidden;
  expect("vision_model.class_embedding", {hidden}, vision.class_embedding);
  expect("vision_model.positional_embedding_vlm", {shape.grid() * shape.grid() + 1, hidden},
         vision.positions);
  expect("vision_model.patch_embedding.linear.weight",
         {hidden, 3 * shape.patch_size * shape.patch_size}, vision.patch_embedding);
  const auto norm = [&](const std::string& name, TensorRef& weight, TensorRef& bias) {
    expect(name + ".weight", {hidden}, weight);
    expect(name + ".bias", {hidden}, bias);
  };
  norm("vision_model.layernorm_pre", vision.pre_norm, vision.pre_norm_bias);
  norm("vision_model.layernorm_post", vision.post_norm, vision.post_norm_bias);
  vision.layers.resize(static_cast<size_t>(shape.layers));
  for (size_t l = 0; l < vision.layers.size(); ++l) {
    VisionLayerWeights& layer = vision.layers[l];
    const std::string name = "vision_model.model.layers." + std::to_string(l) + ".";
    const auto linear = [&](const std::string& part, int64_t out, int64_t in, TensorRef& weight,
                            TensorRef& bias) {
      expect(name + part + ".weight", {out, in}, weight);
      expect(name + part + ".bias", {out}, bias);
    };
    norm(name + "input_layernorm", layer.input_norm, layer.input_norm_bias);
    norm(name + "post_attention_layernorm", layer.post_norm, layer.post_norm_bias);
    linear("self_attn.q_proj", hidden, hidden, layer.q, layer.q_bias);
    linear("self_attn.k_proj", hidden, hidden, layer.k, layer.k_bias);
    linear("self_attn.v_proj", hidden, hidden, layer.v, layer.v_bias);
    linear("self_attn.o_proj", hidden, hidden, layer.o, layer.o_bias);
    linear("mlp.fc1", shape.intermediate, hidden, layer.fc1, layer.fc1_bias);
    linear("mlp.fc2", hidden, shape.intermediate, layer.fc2, layer.fc2_bias);
  }
  const int64_t joined = hidden * shape.shuffle_factor * shape.shuffle_factor;
  expect("vision_model.vision_adapter.mlp.fc1.weight", {shape.adapter_width, joined},
         vision.adapter_fc1);
  expect("vision_model.vision_adapter.mlp.fc2.weight", {shape.output_width, shape.adapter_width},
         vision.adapter_fc2);
  expect("multi_modal_projector.linear_1.weight", {spec.hidden, shape.output_width},
         vision.projector);
}

bool is_float(DType dtype) {
  return dtype == DType::kBF16 || dtype == DType::kF32 || dtype == DType::kF16;
}

int64_t packed(const TensorRef& tensor) {
  return tensor.elements() * (tensor.dtype == DType::kBF16 ? 2 : 4);
}

}  // namespace

std::vector<ExpectedTensor> expected_tensors(const ModelSpec& spec, ModelWeights& weights) {
  std::vector<ExpectedTensor> all;
  Expectation expect(all);
  expect_text(spec, weights.text, expect);
  if (spec.vision) expect_vision(spec, weights.vision.emplace(), expect);
  return all;
}

ModelWeights resolve_weights(const ModelSpec& spec, const Checkpoint& checkpoint) {
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    if (const char* scheme = quantisation_of(name)) {
      fail(ErrorCode::kUnsupported, "[weights] ", checkpoint.file_of(name), " holds ", name,
           ": the checkpoint is quantised as ", scheme,
           ", which this version does not read; use the bf16 one");
    }
  }
  ModelWeights weights;
  const std::vector<ExpectedTensor> wanted = expected_tensors(spec, weights);
  std::map<std::string, const ExpectedTensor*> by_name;
  for (const ExpectedTensor& tensor : wanted) by_name[tensor.name] = &tensor;
  std::vector<std::string> present, missing, unexpected;
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    present.push_back(name);
    // A tied head may be stored all the same; the embedding is used.
    const bool tied_head = spec.tied_embeddings && name.ends_with("lm_head.weight");
    if (!by_name.contains(name) && !harmless(name) && !tied_head) unexpected.push_back(name);
  }
  for (const ExpectedTensor& tensor : wanted) {
    if (!checkpoint.tensors().contains(tensor.name)) missing.push_back(tensor.name);
  }
  if (!missing.empty()) {
    fail(ErrorCode::kModelFormat, "[weights] ", checkpoint.directory(), " lacks ", missing.size(),
         " of ", wanted.size(), " tensors, the first is ", missing.front(), " ",
         shape_text(by_name.at(missing.front())->shape),
         nearest(missing.front(), unexpected.empty() ? present : unexpected));
  }
  if (!unexpected.empty()) {
    std::vector<std::string> names;
    for (const ExpectedTensor& tensor : wanted) names.push_back(tensor.name);
    fail(ErrorCode::kModelFormat, "[weights] ", checkpoint.file_of(unexpected.front()), " holds ",
         unexpected.front(), ", one of ", unexpected.size(),
         " tensors that config.json does not account for", nearest(unexpected.front(), names));
  }
  for (const ExpectedTensor& expected : wanted) {
    const TensorRef& found = checkpoint.tensors().at(expected.name);
    const std::vector<int64_t> shape(found.shape.begin(), found.shape.begin() + found.rank);
    if (shape != expected.shape) {
      fail(ErrorCode::kModelFormat, "[weights] ", checkpoint.file_of(expected.name), ": ",
           expected.name, " has the shape ", found.shape_string(), ", config.json wants ",
           shape_text(expected.shape));
    }
    if (!is_float(found.dtype)) {
      fail(found.dtype == DType::kF8E4M3 || found.dtype == DType::kF8E5M2 ||
                   found.dtype == DType::kI8
               ? ErrorCode::kUnsupported
               : ErrorCode::kModelFormat,
           "[weights] ", checkpoint.file_of(expected.name), ": ", expected.name, " is ",
           name_of(found.dtype), "; this version reads bfloat16, float16 and float32");
    }
    *expected.place = found;
  }
  if (spec.tied_embeddings) weights.text.lm_head = weights.text.embed;
  // Tensors that are packed together must agree.
  for (const LayerWeights& layer : weights.text.layers) {
    if (layer.q.dtype != layer.k.dtype || layer.q.dtype != layer.v.dtype ||
        layer.gate.dtype != layer.up.dtype) {
      fail(ErrorCode::kModelFormat,
           "[weights] q, k and v, or gate and up, of one layer have different dtypes (",
           name_of(layer.q.dtype), ", ", name_of(layer.k.dtype), ", ", name_of(layer.v.dtype), "; ",
           name_of(layer.gate.dtype), ", ", name_of(layer.up.dtype), ")");
    }
  }
  return weights;
}

WeightBytes weight_bytes(const ModelWeights& weights) {
  WeightBytes bytes;
  const auto text = [&](const TensorRef& tensor) {
    if (!tensor.data) return;
    bytes.text_source += static_cast<int64_t>(tensor.bytes());
    bytes.text_packed += packed(tensor);
  };
  const auto vision = [&](const TensorRef& tensor) {
    bytes.vision_source += static_cast<int64_t>(tensor.bytes());
    bytes.vision_packed += packed(tensor);
  };
  text(weights.text.lm_head);
  for (const LayerWeights& layer : weights.text.layers) {
    for (const TensorRef* tensor :
         {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down,
          &layer.router, &layer.experts_gate_up, &layer.experts_down}) {
      text(*tensor);
    }
  }
  if (!weights.vision) return bytes;
  for (const VisionLayerWeights& layer : weights.vision->layers) {
    for (const TensorRef* tensor :
         {&layer.q, &layer.k, &layer.v, &layer.o, &layer.fc1, &layer.fc2}) {
      vision(*tensor);
    }
  }
  for (const TensorRef* tensor : {&weights.vision->patch_embedding, &weights.vision->adapter_fc1,
                                  &weights.vision->adapter_fc2, &weights.vision->projector}) {
    vision(*tensor);
  }
  return bytes;
}

}  // namespace puna
