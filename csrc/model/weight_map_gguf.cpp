// The names of a GGUF file's tensors, as llama.cpp's converter writes them.
#include "model/weight_map.h"

namespace puna {

namespace {

class GgufExpectation {
 public:
  explicit GgufExpectation(std::vector<ExpectedTensor>& all) : all_(all) {}
  void vector(const std::string& name, int64_t size, TensorRef& place) {
    all_.push_back({name, {size}, &place});
  }
  // What a backend packs or decodes row by row, and so may be quantised.
  void matrix(const std::string& name, std::vector<int64_t> shape, TensorRef& place) {
    all_.push_back({name, std::move(shape), &place, /*blocks=*/true});
  }
  void plain(const std::string& name, std::vector<int64_t> shape, TensorRef& place) {
    all_.push_back({name, std::move(shape), &place});
  }

 private:
  std::vector<ExpectedTensor>& all_;
};

void expect_text(const ModelSpec& spec, TextWeights& text, GgufExpectation& expect) {
  const int64_t hidden = spec.hidden, q = spec.heads * spec.head_dim,
                kv = spec.kv_heads * spec.head_dim;
  expect.matrix("token_embd.weight", {spec.vocab_size, hidden}, text.embed);
  if (!spec.tied_embeddings) {
    expect.matrix("output.weight", {spec.vocab_size, hidden}, text.lm_head);
  }
  expect.vector("output_norm.weight", hidden, text.norm);
  text.layers.resize(spec.layers.size());
  for (size_t l = 0; l < spec.layers.size(); ++l) {
    const LayerSpec& shape = spec.layers[l];
    LayerWeights& layer = text.layers[l];
    const std::string name = "blk." + std::to_string(l) + ".";
    expect.vector(name + "attn_norm.weight", hidden, layer.input_norm);
    expect.vector(name + "ffn_norm.weight", hidden, layer.post_norm);
    expect.matrix(name + "attn_q.weight", {q, hidden}, layer.q);
    expect.matrix(name + "attn_k.weight", {kv, hidden}, layer.k);
    expect.matrix(name + "attn_v.weight", {kv, hidden}, layer.v);
    expect.matrix(name + "attn_output.weight", {hidden, q}, layer.o);
    const int64_t width = shape.intermediate;
    const std::string suffix = shape.moe ? "_shexp.weight" : ".weight";
    expect.matrix(name + "ffn_gate" + suffix, {width, hidden}, layer.gate);
    expect.matrix(name + "ffn_up" + suffix, {width, hidden}, layer.up);
    expect.matrix(name + "ffn_down" + suffix, {hidden, width}, layer.down);
    if (!shape.moe) continue;
    layer.experts_apart = true;
    expect.plain(name + "ffn_gate_inp.weight", {shape.experts, hidden}, layer.router);
    expect.matrix(name + "ffn_gate_exps.weight", {shape.experts, width, hidden},
                  layer.experts_gate);
    expect.matrix(name + "ffn_up_exps.weight", {shape.experts, width, hidden}, layer.experts_up);
    expect.matrix(name + "ffn_down_exps.weight", {shape.experts, hidden, width},
                  layer.experts_down);
  }
}

void expect_vision(const ModelSpec& spec, const Checkpoint& checkpoint, VisionWeights& vision,
                   GgufExpectation& expect) {
  const VisionSpec& shape = *spec.vision;
  const int64_t hidden = shape.hidden;
  expect.vector("v.class_embd", hidden, vision.class_embedding);
  expect.plain("v.position_embd.weight", {shape.grid() * shape.grid() + 1, hidden},
               vision.positions);
  expect.matrix("v.patch_embd.weight", {hidden, 3 * shape.patch_size * shape.patch_size},
                vision.patch_embedding);
  const auto norm = [&](const std::string& name, TensorRef& weight, TensorRef& bias) {
    expect.vector(name + ".weight", hidden, weight);
    expect.vector(name + ".bias", hidden, bias);
  };
  norm("v.pre_ln", vision.pre_norm, vision.pre_norm_bias);
  norm("v.post_ln", vision.post_norm, vision.post_norm_bias);
  vision.layers.resize(static_cast<size_t>(shape.layers));
  for (size_t l = 0; l < vision.layers.size(); ++l) {
    VisionLayerWeights& layer = vision.layers[l];
    const std::string name = "v.blk." + std::to_string(l) + ".";
    const auto linear = [&](const std::string& part, int64_t out, int64_t in, TensorRef& weight,
                            TensorRef& bias) {
      expect.matrix(name + part + ".weight", {out, in}, weight);
      expect.vector(name + part + ".bias", out, bias);
    };
    norm(name + "ln1", layer.input_norm, layer.input_norm_bias);
    // Newer converters have the second name.
    const bool newer = checkpoint.tensors().contains(name + "attn_post_norm.weight");
    norm(name + (newer ? "attn_post_norm" : "ln2"), layer.post_norm, layer.post_norm_bias);
    linear("attn_q", hidden, hidden, layer.q, layer.q_bias);
    linear("attn_k", hidden, hidden, layer.k, layer.k_bias);
    linear("attn_v", hidden, hidden, layer.v, layer.v_bias);
    linear("attn_out", hidden, hidden, layer.o, layer.o_bias);
    linear("ffn_up", shape.intermediate, hidden, layer.fc1, layer.fc1_bias);
    linear("ffn_down", hidden, shape.intermediate, layer.fc2, layer.fc2_bias);
  }
  const int64_t joined = hidden * shape.shuffle_factor * shape.shuffle_factor;
  expect.matrix("mm.model.mlp.1.weight", {shape.adapter_width, joined}, vision.adapter_fc1);
  expect.matrix("mm.model.mlp.2.weight", {shape.output_width, shape.adapter_width},
                vision.adapter_fc2);
  expect.matrix("mm.model.fc.weight", {spec.hidden, shape.output_width}, vision.projector);
}

}  // namespace

std::vector<ExpectedTensor> expected_gguf_tensors(const ModelSpec& spec,
                                                  const Checkpoint& checkpoint,
                                                  ModelWeights& weights) {
  std::vector<ExpectedTensor> all;
  GgufExpectation expect(all);
  expect_text(spec, weights.text, expect);
  if (spec.vision) expect_vision(spec, checkpoint, weights.vision.emplace(), expect);
  return all;
}

}  // namespace puna
