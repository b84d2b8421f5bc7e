// The vision tower of Llama 4: normalised tiles in, rows of the text model's width out.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "model/spec.h"
#include "model/text_model.h"
#include "model/weight_map.h"

namespace puna {

class VisionModel {
 public:
  // Packs the weights; `spec` and `backend` must outlive the model.
  VisionModel(const ModelSpec& spec, const VisionWeights& weights, Backend& backend,
              const PackProgress& progress);

  // pixels [tiles][3][image_size][image_size] -> out [tiles * tokens_per_tile()][text hidden size].
  // Tiles are independent of each other.
  void encode(Rows out, std::span<const float> pixels, int64_t tiles, const LayerPoll& poll);

  int64_t tokens_per_tile() const { return tokens_per_tile_; }
  int64_t weight_bytes() const { return weight_bytes_; }

 private:
  struct Layer {
    VectorRef input_norm, input_norm_bias, post_norm, post_norm_bias;
    WeightRef qkv, output, fc1, fc2;
    VectorRef qkv_bias, output_bias, fc1_bias, fc2_bias;
  };

  void encode_group(Rows out, const float* pixels, int64_t tiles, const LayerPoll& poll);
  VectorRef start_rows(const VisionWeights& weights);
  VectorRef vector(std::initializer_list<TensorRef> parts);
  WeightRef matrix(std::initializer_list<TensorRef> parts, const PackProgress& progress);

  const VisionSpec& spec_;
  Backend& backend_;
  int64_t grid_ = 0, tokens_per_tile_ = 0, weight_bytes_ = 0, packed_bytes_ = 0;
  WeightRef patch_embedding_, adapter1_, adapter2_, projector_;
  VectorRef start_;  // [grid^2 + 1][hidden]: positions, and the class embedding in the last row
  VectorRef pre_norm_, pre_norm_bias_, post_norm_, post_norm_bias_;
  std::vector<Layer> layers_;
  std::vector<float> cos_, sin_;  // [grid^2 + 1][head_dim / 2]
};

}  // namespace puna
