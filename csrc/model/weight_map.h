// Which tensors a checkpoint must have, and where they are: the one place that knows their names.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "base/tensor.h"
#include "io/checkpoint.h"
#include "model/spec.h"

namespace puna {

// A matrix of a checkpoint, and the scales that its rows are multiplied with if it is float8 e4m3:
// one for all, one for each row, or for experts [experts] or [experts][2] (gate and up).
struct WeightTensor : TensorRef {
  WeightTensor() = default;
  WeightTensor(const TensorRef& tensor) : TensorRef(tensor) {}  // NOLINT: unscaled
  TensorRef scale;
};

// Shapes in the comments are [rows][columns] as stored; linear weights are [out][in].
struct LayerWeights {
  TensorRef input_norm, post_norm;  // [hidden]
  WeightTensor q, k, v, o;          // [heads * head_dim][hidden], ..., transposed for o
  WeightTensor gate, up, down;      // dense MLP or shared expert
  TensorRef router;                 // [experts][hidden]
  // Each expert's matrices, either [in][out] with gate and up side by side, or [out][in] and apart;
  // or in tensors of their own.
  WeightTensor experts_gate_up;           // [experts][hidden][2 * width]: gate, then up
  WeightTensor experts_gate, experts_up;  // [experts][width][hidden]
  WeightTensor experts_down;              // [experts][width][hidden], or [experts][hidden][width]
  bool experts_apart = false;
  struct Expert {
    WeightTensor gate, up, down;  // [width][hidden], [hidden][width]
  };
  std::vector<Expert> experts;
};

struct TextWeights {
  TensorRef embed;
  WeightTensor lm_head;  // both [vocab][hidden]; the same tensor if tied
  TensorRef norm;
  std::vector<LayerWeights> layers;
};

struct VisionLayerWeights {
  TensorRef input_norm, input_norm_bias, post_norm, post_norm_bias;
  TensorRef q, q_bias, k, k_bias, v, v_bias, o, o_bias;
  TensorRef fc1, fc1_bias, fc2, fc2_bias;
};

struct VisionWeights {
  TensorRef patch_embedding;  // [hidden][3 * patch^2]
  TensorRef class_embedding;  // [hidden]
  TensorRef positions;        // [grid^2 + 1][hidden]
  TensorRef pre_norm, pre_norm_bias, post_norm, post_norm_bias;
  std::vector<VisionLayerWeights> layers;
  TensorRef adapter_fc1, adapter_fc2, projector;
};

struct ModelWeights {
  TextWeights text;
  std::optional<VisionWeights> vision;
};

// What precedes the names of a checkpoint's tensors, by the program that wrote it.
struct TensorPrefixes {
  std::string text;     // of embed_tokens, layers and norm
  std::string lm_head;  // of lm_head.weight
  std::string vision;   // of vision_model and multi_modal_projector
};

// The prefixes that transformers 4.51 to 5.23 writes for a model of this form.
TensorPrefixes usual_prefixes(const ModelSpec& spec);

struct ExpectedTensor {
  std::string name;
  std::vector<int64_t> shape;
  TensorRef* place = nullptr;   // where resolve_weights() puts it
  bool blocks = false;          // may be of a quantised block type, besides the float types
  TensorRef* scale = nullptr;   // where the scales go; null: it may not be float8
  std::string scale_name = {};  // of the tensor with the scales, if it is float8
};

// Every tensor that `spec` wants; places point into `weights`. `experts_on_their_own`: each
// expert's matrices are tensors, as compressed-tensors stores them.
std::vector<ExpectedTensor> expected_tensors(const ModelSpec& spec, const TensorPrefixes& prefixes,
                                             ModelWeights& weights,
                                             bool experts_on_their_own = false);

// The same of a GGUF file and its vision tower.
std::vector<ExpectedTensor> expected_gguf_tensors(const ModelSpec& spec,
                                                  const Checkpoint& checkpoint,
                                                  ModelWeights& weights);

// Finds and checks every tensor: present, of the right shape and of a readable type, and no others.
// Views live as long as the checkpoint. Throws ModelFormat naming file, tensor, expected, found and
// the nearest name, or Unsupported naming a quantisation scheme that is recognised by its tensors.
ModelWeights resolve_weights(const ModelSpec& spec, const Checkpoint& checkpoint);

// The type that the layers' key and value projections are stored in: what config.json calls it does
// not matter. Of several, the first quantised one, or else float32.
DType stored_type(const TextWeights& text);

}  // namespace puna
