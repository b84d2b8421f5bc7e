// The weights of a model as a backend holds them, and how they are put together from a checkpoint's
// tensors: the one place that knows which tensors make which matrix.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "model/recipe.h"
#include "model/spec.h"
#include "model/weight_loader.h"
#include "model/weight_map.h"

namespace puna {

struct TextParameters {
  struct Layer {
    VectorRef input_norm, post_norm;
    std::vector<WeightRef> qkv;  // in pieces where their formats differ, by rows
    WeightRef output;
    WeightRef gate_up, down;  // dense layers
    MoeWeights moe;           // MoE layers
  };
  std::vector<Layer> layers;
  VectorRef norm;
  WeightRef head;
};

struct VisionParameters {
  struct Layer {
    VectorRef input_norm, input_norm_bias, post_norm, post_norm_bias;
    WeightRef qkv, output, fc1, fc2;
    VectorRef qkv_bias, output_bias, fc1_bias, fc2_bias;
  };
  WeightRef patch_embedding, adapter1, adapter2, projector;
  VectorRef positions;        // [(grid^2 + 1) * hidden]
  VectorRef class_embedding;  // [hidden]
  VectorRef pre_norm, pre_norm_bias, post_norm, post_norm_bias;
  std::vector<Layer> layers;
};

// The routed experts of the first `host_layers` layers that have any go to the memory of the
// backend's host(); `send_experts`: the backend's own has room for what is sent of them.
TextParameters load_text(const ModelSpec& spec, const TextWeights& weights, WeightLoader& loader,
                         int64_t host_layers = 0, bool send_experts = false);
VisionParameters load_vision(const VisionWeights& weights, WeightLoader& loader);

// Bytes of the matrices in the checkpoint, and once packed as the recipe says. The token embedding
// stays in the file; norms and biases are too small to count. Reads no weight. Throws
// InvalidRequest for an override of the recipe that no matrix matches.
struct PackedBytes {
  int64_t text_source = 0, text_packed = 0;
  int64_t vision_source = 0, vision_packed = 0;
  ExpertBytes experts;  // of text_packed
};
PackedBytes packed_bytes_of(const ModelSpec& spec, const ModelWeights& weights,
                            const QuantRecipe& recipe);

}  // namespace puna
