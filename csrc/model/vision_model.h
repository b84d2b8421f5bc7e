// The vision tower of Llama 4: normalised tiles in, rows of the text model's width out.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "model/parameters.h"
#include "model/spec.h"
#include "model/text_model.h"

namespace puna {

class VisionModel {
 public:
  // `spec` and `backend` must outlive the model.
  VisionModel(const ModelSpec& spec, VisionParameters parameters, Backend& backend);

  // pixels [tiles][3][image_size][image_size] -> out [tiles * tokens_per_tile()][text hidden size].
  // Tiles are independent of each other.
  void encode(Rows out, std::span<const float> pixels, int64_t tiles, const LayerPoll& poll);

  int64_t tokens_per_tile() const { return tokens_per_tile_; }

 private:
  // What is computed of tiles on the way: rows are patches, these and the class token, or joined
  // patches, tile by tile.
  struct Activations {
    Rows unfolded, hidden, normed, qkv, attended, inner, joined, adapted1, adapted2;
  };
  // How many of so many tiles are encoded together. No bit depends on it.
  int64_t tiles_together(int64_t tiles) const;
  void encode_tiles(Rows out, const float* pixels, int64_t tiles, const Activations& memory,
                    const LayerPoll& poll);
  VectorRef start_rows();

  const VisionSpec& spec_;
  Backend& backend_;
  int64_t grid_ = 0, tokens_per_tile_ = 0;
  VisionParameters parameters_;
  VectorRef start_;  // [grid^2 + 1][hidden]: positions, and the class embedding in the last row
  std::vector<float> cos_, sin_;  // [grid^2 + 1][head_dim / 2]
};

}  // namespace puna
