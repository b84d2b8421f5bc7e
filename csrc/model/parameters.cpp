#include "model/parameters.h"

#include "base/error.h"

namespace puna {

namespace {

const void* element_of(const TensorRef& tensor, int64_t index) {
  return static_cast<const std::byte*>(tensor.data) + bytes_of(tensor.dtype, index);
}

// The scales of a matrix of `rows` rows, the e-th of `experts` in its tensor.
RowScales scales_of(const WeightTensor& tensor, int64_t rows, int64_t e, int64_t experts) {
  if (tensor.dtype != DType::kF8E4M3) return {};
  const int64_t count = tensor.scale.elements();
  if (count == 1) return {tensor.scale.dtype, tensor.scale.data, rows};
  const int64_t each = count / experts;
  return {tensor.scale.dtype, element_of(tensor.scale, e * each), rows / each};
}

MatrixSource linear(const WeightTensor& tensor) {
  MatrixSource source = linear(static_cast<const TensorRef&>(tensor));
  source.scales = scales_of(tensor, source.rows, 0, 1);
  return source;
}

// Expert e of a tensor [experts][out][in], or [experts][in][out] if `transposed`, as the [out][in]
// matrix that computes it.
MatrixSource expert_matrix(const WeightTensor& tensor, int64_t e, bool transposed) {
  const int64_t rows = tensor.shape[1], cols = tensor.shape[2];
  const void* data = element_of(tensor, e * rows * cols);
  MatrixSource source = transposed ? MatrixSource{tensor.dtype, data, cols, rows, 1, cols}
                                   : MatrixSource{tensor.dtype, data, rows, cols, cols, 1};
  source.scales = scales_of(tensor, source.rows, e, tensor.shape[0]);
  return source;
}

MatrixSource expert_down(const LayerWeights& weights, int64_t e) {
  if (!weights.experts.empty()) return linear(weights.experts[e].down);
  return expert_matrix(weights.experts_down, e, !weights.experts_apart);
}

std::vector<MatrixSource> expert_gate_up(const LayerWeights& weights, int64_t e) {
  if (!weights.experts.empty())
    return {linear(weights.experts[e].gate), linear(weights.experts[e].up)};
  if (!weights.experts_apart) return {expert_matrix(weights.experts_gate_up, e, true)};
  return {expert_matrix(weights.experts_gate, e, false),
          expert_matrix(weights.experts_up, e, false)};
}

// What products of a whole layer rely on.
void check_experts(const std::string& prefix, const MoeWeights& moe) {
  if (moe.router.format != WeightFormat::kF32) {
    fail(ErrorCode::kUnsupported, "[load] ", prefix, "router is ", name_of(moe.router.format),
         "; routers are fp32");
  }
  for (size_t e = 1; e < moe.gate_up.size(); ++e) {
    if (moe.gate_up[e].format == moe.gate_up[0].format && moe.down[e].format == moe.down[0].format)
      continue;
    fail(ErrorCode::kUnsupported, "[load] ", prefix, "experts.", e, " has the formats ",
         name_of(moe.gate_up[e].format), " and ", name_of(moe.down[e].format), ", experts.0 ",
         name_of(moe.gate_up[0].format), " and ", name_of(moe.down[0].format),
         "; the experts of a layer share their formats");
  }
}

}  // namespace

TextParameters load_text(const ModelSpec& spec, const TextWeights& weights, WeightLoader& loader,
                         int64_t host_layers, bool send_experts) {
  TextParameters parameters;
  int64_t moe_layers = 0;
  const auto matrix = [&](const std::string& name, std::vector<MatrixSource> parts) {
    return loader.matrix(name, parts);
  };
  const auto vector = [&](const std::string& name, const TensorRef& tensor) {
    return loader.vector(name, {&tensor, 1});
  };
  for (size_t l = 0; l < spec.layers.size(); ++l) {
    const LayerSpec& shape = spec.layers[l];
    const LayerWeights& source = weights.layers[l];
    const std::string prefix = "layers." + std::to_string(l) + ".";
    TextParameters::Layer layer;
    layer.input_norm = vector(prefix + "input_norm", source.input_norm);
    layer.post_norm = vector(prefix + "post_norm", source.post_norm);
    const MatrixSource qkv[] = {linear(source.q), linear(source.k), linear(source.v)};
    layer.qkv = loader.matrices(prefix + "attention.qkv", qkv, /*split=*/true);
    layer.output = matrix(prefix + "attention.output", {linear(source.o)});
    if (shape.moe) {
      layer.moe.top_k = shape.top_k;
      layer.moe.router = matrix(prefix + "router", {linear(source.router)});
      layer.moe.shared_gate_up =
          matrix(prefix + "shared_expert.gate_up", {linear(source.gate), linear(source.up)});
      layer.moe.shared_down = matrix(prefix + "shared_expert.down", {linear(source.down)});
      layer.moe.experts_on_host = moe_layers++ < host_layers;
      layer.moe.experts_are_sent = layer.moe.experts_on_host && send_experts;
      loader.place_on_host(layer.moe.experts_on_host);
      for (int64_t e = 0; e < shape.experts; ++e) {
        const std::string expert = prefix + "experts." + std::to_string(e) + ".";
        layer.moe.gate_up.push_back(matrix(expert + "gate_up", expert_gate_up(source, e)));
        layer.moe.down.push_back(matrix(expert + "down", {expert_down(source, e)}));
      }
      loader.place_on_host(false);
      check_experts(prefix, layer.moe);
    } else {
      layer.gate_up = matrix(prefix + "mlp.gate_up", {linear(source.gate), linear(source.up)});
      layer.down = matrix(prefix + "mlp.down", {linear(source.down)});
    }
    parameters.layers.push_back(std::move(layer));
  }
  parameters.norm = vector("norm", weights.norm);
  parameters.head = matrix("lm_head", {linear(weights.lm_head)});
  return parameters;
}

VisionParameters load_vision(const VisionWeights& weights, WeightLoader& loader) {
  VisionParameters parameters;
  const auto vector = [&](const std::string& name, std::initializer_list<TensorRef> parts) {
    return loader.vector("vision." + name, {parts.begin(), parts.size()});
  };
  const auto matrix = [&](const std::string& name, std::initializer_list<TensorRef> parts) {
    std::vector<MatrixSource> sources;
    for (const TensorRef& part : parts) sources.push_back(linear(part));
    return loader.matrix("vision." + name, sources);
  };
  parameters.patch_embedding = matrix("patch_embedding", {weights.patch_embedding});
  parameters.positions = vector("positions", {weights.positions});
  parameters.class_embedding = vector("class_embedding", {weights.class_embedding});
  parameters.pre_norm = vector("pre_norm", {weights.pre_norm});
  parameters.pre_norm_bias = vector("pre_norm_bias", {weights.pre_norm_bias});
  parameters.post_norm = vector("post_norm", {weights.post_norm});
  parameters.post_norm_bias = vector("post_norm_bias", {weights.post_norm_bias});
  for (const VisionLayerWeights& source : weights.layers) {
    const std::string prefix = "layers." + std::to_string(parameters.layers.size()) + ".";
    VisionParameters::Layer layer;
    layer.input_norm = vector(prefix + "input_norm", {source.input_norm});
    layer.input_norm_bias = vector(prefix + "input_norm_bias", {source.input_norm_bias});
    layer.post_norm = vector(prefix + "post_norm", {source.post_norm});
    layer.post_norm_bias = vector(prefix + "post_norm_bias", {source.post_norm_bias});
    layer.qkv = matrix(prefix + "attention.qkv", {source.q, source.k, source.v});
    layer.qkv_bias =
        vector(prefix + "attention.qkv_bias", {source.q_bias, source.k_bias, source.v_bias});
    layer.output = matrix(prefix + "attention.output", {source.o});
    layer.output_bias = vector(prefix + "attention.output_bias", {source.o_bias});
    layer.fc1 = matrix(prefix + "mlp.fc1", {source.fc1});
    layer.fc1_bias = vector(prefix + "mlp.fc1_bias", {source.fc1_bias});
    layer.fc2 = matrix(prefix + "mlp.fc2", {source.fc2});
    layer.fc2_bias = vector(prefix + "mlp.fc2_bias", {source.fc2_bias});
    parameters.layers.push_back(std::move(layer));
  }
  parameters.adapter1 = matrix("adapter.fc1", {weights.adapter_fc1});
  parameters.adapter2 = matrix("adapter.fc2", {weights.adapter_fc2});
  parameters.projector = matrix("projector", {weights.projector});
  return parameters;
}

PackedBytes packed_bytes_of(const ModelSpec& spec, const ModelWeights& weights,
                            const QuantRecipe& recipe) {
  MeasuringLoader text(recipe), vision(recipe);
  load_text(spec, weights.text, text);
  if (weights.vision) load_vision(*weights.vision, vision);
  std::vector<std::string> names = text.names();
  names.insert(names.end(), vision.names().begin(), vision.names().end());
  recipe.require_matches(names);
  return {text.source_bytes(), text.bytes(), vision.source_bytes(), vision.bytes(), text.experts()};
}

}  // namespace puna
