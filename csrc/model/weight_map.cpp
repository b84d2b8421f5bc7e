#include "model/weight_map.h"

#include <algorithm>
#include <set>

#include "base/error.h"
#include "io/message.h"

namespace puna {

namespace {

// "; the nearest name is X", or nothing if none is near.
std::string nearest(const std::string& name, const std::vector<std::string>& names) {
  const std::string found = nearest_name(name, names);
  return found.empty() ? "" : "; the nearest name is " + printable(found);
}

// Buffers that some exporters store although they are computed; GGUF's divisors of the frequencies,
// which are in the specification.
bool harmless(const std::string& name) {
  if (name == "rope_freqs.weight") return true;
  return name.ends_with("rotary_emb.inv_freq") || name.ends_with("rotary_embedding.freqs_ci") ||
         name.ends_with("rope.freqs");
}

// The scheme of a quantised checkpoint, by the names of its tensors.
const char* quantisation_of(const std::string& name) {
  if (name.ends_with("weight_packed")) return "compressed-tensors (weight_packed)";
  if (name.find(".quant_state.") != std::string::npos || name.ends_with(".absmax"))
    return "bitsandbytes";
  if (name.ends_with("weight_scale_2")) return "ModelOpt NVFP4 (weight_scale_2)";
  if (name.ends_with("_scale_inv")) return "FP8 with block scales (weight_scale_inv)";
  if (name.ends_with("_scale")) return "scaled INT8 or FP8 of another form (weight_scale)";
  if (name.ends_with(".qweight")) return "GPTQ or AWQ (qweight)";
  return nullptr;
}

// Factors for activations and for keys and values in 8 bits: puna's are not, so it needs none.
bool scales_activations(const std::string& name) {
  for (const char* end :
       {"input_scale", "input_scale_ub", "output_scale", ".q_scale", ".k_scale", ".v_scale"})
    if (name.ends_with(end)) return true;
  return false;
}

// How the scales of a float8 tensor may be called: weight_scale beside weight; gate_up_proj_scale
// or, by ModelOpt, gate_up_proj_weight_scale beside gate_up_proj.
std::vector<std::string> scale_names(const std::string& tensor) {
  return {tensor + "_scale", tensor + "_weight_scale"};
}

// Whether it holds the scales of a float8 tensor.
bool scales_float8(const std::string& name, const Checkpoint& checkpoint) {
  for (const char* end : {"_weight_scale", "_scale"}) {
    if (!name.ends_with(end)) continue;
    const auto scaled =
        checkpoint.tensors().find(name.substr(0, name.size() - std::string_view(end).size()));
    if (scaled != checkpoint.tensors().end() && scaled->second.dtype == DType::kF8E4M3) return true;
  }
  return false;
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

std::vector<int64_t> shape_of(const TensorRef& tensor) {
  return {tensor.shape.begin(), tensor.shape.begin() + tensor.rank};
}

class Expectation {
 public:
  explicit Expectation(std::vector<ExpectedTensor>& all) : all_(all) {}
  void operator()(const std::string& name, std::vector<int64_t> shape, TensorRef& place) {
    all_.push_back({name, std::move(shape), &place});
  }
  void operator()(const std::string& name, std::vector<int64_t> shape, WeightTensor& place) {
    all_.push_back({name, std::move(shape), &place, /*blocks=*/false, &place.scale});
  }

 private:
  std::vector<ExpectedTensor>& all_;
};

void expect_text(const ModelSpec& spec, const TensorPrefixes& prefixes, TextWeights& text,
                 bool experts_on_their_own, Expectation& expect) {
  const int64_t hidden = spec.hidden, q = spec.heads * spec.head_dim,
                kv = spec.kv_heads * spec.head_dim;
  expect(prefixes.text + "embed_tokens.weight", {spec.vocab_size, hidden}, text.embed);
  if (!spec.tied_embeddings)
    expect(prefixes.lm_head + "lm_head.weight", {spec.vocab_size, hidden}, text.lm_head);
  expect(prefixes.text + "norm.weight", {hidden}, text.norm);
  text.layers.resize(spec.layers.size());
  for (size_t l = 0; l < spec.layers.size(); ++l) {
    const LayerSpec& shape = spec.layers[l];
    LayerWeights& layer = text.layers[l];
    const std::string name = prefixes.text + "layers." + std::to_string(l) + ".";
    expect(name + "input_layernorm.weight", {hidden}, layer.input_norm);
    expect(name + "post_attention_layernorm.weight", {hidden}, layer.post_norm);
    expect(name + "self_attn.q_proj.weight", {q, hidden}, layer.q);
    expect(name + "self_attn.k_proj.weight", {kv, hidden}, layer.k);
    expect(name + "self_attn.v_proj.weight", {kv, hidden}, layer.v);
    expect(name + "self_attn.o_proj.weight", {hidden, q}, layer.o);
    const std::string ffn = name + "feed_forward.";
    const std::string dense = shape.moe ? ffn + "shared_expert." : ffn;
    const int64_t width = shape.intermediate;
    const auto feed_forward = [&](const std::string& prefix, auto& place) {
      expect(prefix + "gate_proj.weight", {width, hidden}, place.gate);
      expect(prefix + "up_proj.weight", {width, hidden}, place.up);
      expect(prefix + "down_proj.weight", {hidden, width}, place.down);
    };
    feed_forward(dense, layer);
    if (!shape.moe) continue;
    expect(ffn + "router.weight", {shape.experts, hidden}, layer.router);
    if (experts_on_their_own) {
      layer.experts.resize(static_cast<size_t>(shape.experts));
      for (size_t e = 0; e < layer.experts.size(); ++e)
        feed_forward(ffn + "experts." + std::to_string(e) + ".", layer.experts[e]);
      continue;
    }
    expect(ffn + "experts.gate_up_proj", {shape.experts, hidden, 2 * width}, layer.experts_gate_up);
    expect(ffn + "experts.down_proj", {shape.experts, width, hidden}, layer.experts_down);
  }
}

void expect_vision(const ModelSpec& spec, const std::string& prefix, VisionWeights& vision,
                   Expectation& expect) {
  const VisionSpec& shape = *spec.vision;
  const int64_t hidden = shape.hidden;
  const std::string tower = prefix + "vision_model.";
  expect(tower + "class_embedding", {hidden}, vision.class_embedding);
  expect(tower + "positional_embedding_vlm", {shape.grid() * shape.grid() + 1, hidden},
         vision.positions);
  expect(tower + "patch_embedding.linear.weight", {hidden, 3 * shape.patch_size * shape.patch_size},
         vision.patch_embedding);
  const auto norm = [&](const std::string& name, TensorRef& weight, TensorRef& bias) {
    expect(name + ".weight", {hidden}, weight);
    expect(name + ".bias", {hidden}, bias);
  };
  norm(tower + "layernorm_pre", vision.pre_norm, vision.pre_norm_bias);
  norm(tower + "layernorm_post", vision.post_norm, vision.post_norm_bias);
  vision.layers.resize(static_cast<size_t>(shape.layers));
  for (size_t l = 0; l < vision.layers.size(); ++l) {
    VisionLayerWeights& layer = vision.layers[l];
    const std::string name = tower + "model.layers." + std::to_string(l) + ".";
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
  expect(tower + "vision_adapter.mlp.fc1.weight", {shape.adapter_width, joined},
         vision.adapter_fc1);
  expect(tower + "vision_adapter.mlp.fc2.weight", {shape.output_width, shape.adapter_width},
         vision.adapter_fc2);
  expect(prefix + "multi_modal_projector.linear_1.weight", {spec.hidden, shape.output_width},
         vision.projector);
}

bool is_float(DType dtype) {
  return dtype == DType::kBF16 || dtype == DType::kF32 || dtype == DType::kF16;
}

// The prefixes under which the checkpoint has its embedding: the usual ones of this or the other
// form of model, or those of exporters that name a multimodal model as transformers names others.
TensorPrefixes prefixes_of(const ModelSpec& spec, const Checkpoint& checkpoint) {
  const TensorPrefixes usual = usual_prefixes(spec);
  for (const TensorPrefixes& prefixes :
       {usual, TensorPrefixes{"language_model.model.", "language_model.", ""},
        TensorPrefixes{"model.", "", ""}, TensorPrefixes{"model.language_model.", "", "model."}}) {
    if (checkpoint.tensors().contains(prefixes.text + "embed_tokens.weight")) return prefixes;
  }
  return usual;
}

// Whether the checkpoint has each expert's matrices as tensors of their own.
bool has_experts_on_their_own(const ModelSpec& spec, const TensorPrefixes& prefixes,
                              const Checkpoint& checkpoint) {
  for (size_t l = 0; l < spec.layers.size(); ++l)
    if (spec.layers[l].moe)
      return checkpoint.tensors().contains(prefixes.text + "layers." + std::to_string(l) +
                                           ".feed_forward.experts.0.gate_proj.weight");
  return false;
}

// What says which tensors there must be.
const char* description(const Checkpoint& checkpoint) {
  return checkpoint.gguf() ? "its metadata" : "config.json";
}

void refuse_quantised(const Checkpoint& checkpoint) {
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    if (scales_activations(name) || scales_float8(name, checkpoint)) continue;
    if (const char* scheme = quantisation_of(name)) {
      fail(ErrorCode::kUnsupported, "[weights] ", checkpoint.file_of(name), " holds ",
           printable(name), ": the checkpoint is quantised as ", scheme,
           ", which this version does not read; use the bf16 one");
    }
  }
}

// Notes where the scales of the float8 tensors are.
void find_scales(std::vector<ExpectedTensor>& wanted, const Checkpoint& checkpoint) {
  for (ExpectedTensor& tensor : wanted) {
    const auto found = checkpoint.tensors().find(tensor.name);
    if (found == checkpoint.tensors().end() || found->second.dtype != DType::kF8E4M3) continue;
    for (const std::string& name : scale_names(tensor.name))
      if (checkpoint.tensors().contains(name)) tensor.scale_name = name;
    if (tensor.scale && tensor.scale_name.empty())
      fail(ErrorCode::kModelFormat, "[weights] ", checkpoint.file_of(tensor.name), ": ",
           tensor.name, " is float8_e4m3, and there is no ", scale_names(tensor.name).front(),
           " with its scales; use a checkpoint with scales by row or tensor, or the bf16 one");
  }
}

// The scales of a float8 matrix are of a float type, and one for all, one for each expert (or half
// of gate_up), or one for each row.
void check_scales(const ExpectedTensor& expected, const Checkpoint& checkpoint) {
  const TensorRef& scale = checkpoint.tensors().at(expected.scale_name);
  const auto without_ones = [](std::vector<int64_t> shape) {
    std::erase(shape, 1);
    return shape;
  };
  std::vector<std::vector<int64_t>> allowed = {{}};
  if (expected.shape.size() == 3) {
    const int64_t experts = expected.shape[0];
    allowed.push_back({experts});
    if (expected.name.ends_with("gate_up_proj")) allowed.push_back({experts, 2});
    allowed.push_back({experts, expected.shape[2]});
  } else {
    allowed.push_back({expected.shape[0]});
  }
  const std::vector<int64_t> shape = without_ones(shape_of(scale));
  const bool fits = std::any_of(allowed.begin(), allowed.end(), [&](const auto& candidate) {
    return without_ones(candidate) == shape;
  });
  if (fits && is_float(scale.dtype)) return;
  fail(fits ? ErrorCode::kModelFormat : ErrorCode::kUnsupported, "[weights] ",
       checkpoint.file_of(expected.scale_name), ": ", expected.scale_name, " is ",
       name_of(scale.dtype), " ", scale.shape_string(), ", the scales of ", expected.name, " ",
       shape_text(expected.shape), " must be floats, one for the tensor or for each row (",
       shape_text(allowed.back()), "); scales by block are not read: use another checkpoint");
}

// Every wanted tensor is there, and no other.
void check_names(const ModelSpec& spec, const std::vector<ExpectedTensor>& wanted,
                 const Checkpoint& checkpoint) {
  std::vector<std::string> wanted_names, present, missing, unexpected;
  for (const ExpectedTensor& tensor : wanted) {
    wanted_names.push_back(tensor.name);
    if (!checkpoint.tensors().contains(tensor.name)) missing.push_back(tensor.name);
  }
  std::set<std::string> accounted(wanted_names.begin(), wanted_names.end());
  for (const ExpectedTensor& tensor : wanted) accounted.insert(tensor.scale_name);
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    present.push_back(name);
    // A tied head may be stored all the same; the embedding is used.
    const bool tied_head = spec.tied_embeddings && name.ends_with("lm_head.weight");
    if (!accounted.contains(name) && !harmless(name) && !tied_head && !scales_activations(name))
      unexpected.push_back(name);
  }
  if (!missing.empty()) {
    fail(ErrorCode::kModelFormat, "[weights] ", checkpoint.path(), " lacks ", missing.size(),
         " of ", wanted.size(), " tensors: ", listing(missing, 3),
         nearest(missing.front(), unexpected.empty() ? present : unexpected));
  }
  if (!unexpected.empty()) {
    fail(ErrorCode::kModelFormat, "[weights] ", checkpoint.file_of(unexpected.front()), " holds ",
         printable(unexpected.front()), ", one of ", unexpected.size(), " tensors that ",
         description(checkpoint), " does not account for",
         nearest(unexpected.front(), wanted_names));
  }
}

void check_shapes_and_types(const std::vector<ExpectedTensor>& wanted,
                            const Checkpoint& checkpoint) {
  const ExpectedTensor* first = nullptr;  // of those with a wrong shape
  size_t wrong = 0;
  for (const ExpectedTensor& expected : wanted) {
    const TensorRef& found = checkpoint.tensors().at(expected.name);
    if (expected.scale && !expected.scale_name.empty()) {
      check_scales(expected, checkpoint);
    } else if (!is_float(found.dtype) && !(expected.blocks && is_blocked(found.dtype))) {
      const bool quantised = size_of(found.dtype) == 1 || is_blocked(found.dtype);
      fail(quantised ? ErrorCode::kUnsupported : ErrorCode::kModelFormat, "[weights] ",
           checkpoint.file_of(expected.name), ": ", expected.name, " is ", name_of(found.dtype),
           "; this version reads ", expected.blocks ? "blocks of GGUF, " : "",
           expected.scale ? "float8_e4m3 with scales, " : "",
           "bfloat16, float16 and float32 there");
    }
    if (shape_of(found) == expected.shape) continue;
    if (++wrong == 1) first = &expected;
  }
  if (!first) return;
  const TensorRef& found = checkpoint.tensors().at(first->name);
  std::vector<int64_t> sorted = shape_of(found), wanted_sorted = first->shape;
  std::sort(sorted.begin(), sorted.end());
  std::sort(wanted_sorted.begin(), wanted_sorted.end());
  fail(ErrorCode::kModelFormat, "[weights] ", checkpoint.file_of(first->name), ": ", first->name,
       " has the shape ", found.shape_string(), ", ", description(checkpoint), " wants ",
       shape_text(first->shape),
       sorted == wanted_sorted ? ": its dimensions are in another order" : "", "; ", wrong, " of ",
       wanted.size(), " tensors have a wrong shape");
}

// Gate and up are one matrix. Quantised ones of different types are packed in a third; plain ones
// would lose by that, and no exporter mixes them.
void check_joint_types(const TextWeights& text, const Checkpoint& checkpoint) {
  for (size_t l = 0; l < text.layers.size(); ++l) {
    const LayerWeights& layer = text.layers[l];
    std::vector<std::pair<const TensorRef*, const TensorRef*>> pairs = {
        {&layer.gate, &layer.up}, {&layer.experts_gate, &layer.experts_up}};
    for (const LayerWeights::Expert& expert : layer.experts)
      pairs.emplace_back(&expert.gate, &expert.up);
    for (const auto& [gate, up] : pairs) {
      if (gate->dtype == up->dtype || (is_blocked(gate->dtype) && is_blocked(up->dtype))) continue;
      fail(ErrorCode::kModelFormat, "[weights] ", checkpoint.path(), ": layer ", l, " has gate of ",
           name_of(gate->dtype), " and up of ", name_of(up->dtype), "; they must be of one type");
    }
  }
}

}  // namespace

TensorPrefixes usual_prefixes(const ModelSpec& spec) {
  if (spec.multimodal) return {"language_model.model.", "language_model.", ""};
  return {"model.", "", ""};
}

std::vector<ExpectedTensor> expected_tensors(const ModelSpec& spec, const TensorPrefixes& prefixes,
                                             ModelWeights& weights, bool experts_on_their_own) {
  std::vector<ExpectedTensor> all;
  Expectation expect(all);
  expect_text(spec, prefixes, weights.text, experts_on_their_own, expect);
  if (spec.vision) expect_vision(spec, prefixes.vision, weights.vision.emplace(), expect);
  return all;
}

ModelWeights resolve_weights(const ModelSpec& spec, const Checkpoint& checkpoint) {
  refuse_quantised(checkpoint);
  ModelWeights weights;
  const TensorPrefixes prefixes = prefixes_of(spec, checkpoint);
  std::vector<ExpectedTensor> wanted =
      checkpoint.gguf() ? expected_gguf_tensors(spec, checkpoint, weights)
                        : expected_tensors(spec, prefixes, weights,
                                           has_experts_on_their_own(spec, prefixes, checkpoint));
  find_scales(wanted, checkpoint);
  check_names(spec, wanted, checkpoint);
  check_shapes_and_types(wanted, checkpoint);
  for (const ExpectedTensor& tensor : wanted) {
    *tensor.place = checkpoint.tensors().at(tensor.name);
    if (!tensor.scale_name.empty()) *tensor.scale = checkpoint.tensors().at(tensor.scale_name);
  }
  if (spec.tied_embeddings) weights.text.lm_head = weights.text.embed;
  check_joint_types(weights.text, checkpoint);
  return weights;
}

DType stored_type(const TextWeights& text) {
  const DType first = text.layers.front().k.dtype;
  bool same = true;
  for (const LayerWeights& layer : text.layers) {
    for (const DType dtype : {layer.k.dtype, layer.v.dtype}) {
      if (is_blocked(dtype) || dtype == DType::kF8E4M3) return dtype;
      same &= dtype == first;
    }
  }
  return same ? first : DType::kF32;
}

}  // namespace puna
