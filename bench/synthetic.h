// Models of the true layer shapes with random weights, for measuring without a checkpoint.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "model/spec.h"
#include "model/weight_loader.h"
#include "model/weight_map.h"
#include "platform/memory.h"

namespace puna::bench {

// What a synthetic text model may be asked to leave out, so that it fits; everything else of the
// shape is as published.
struct Reduction {
  int64_t layers = 0;
  int64_t experts = 0;  // 0: all
  int64_t vocab = 0;
};

// `shape` is scout, maverick or guard. Throws InvalidRequest for another.
ModelSpec published_spec(const std::string& shape, const Reduction& reduction);

// The tensors of a model as views of one block of random bfloat16: normally distributed with the
// standard deviation 0.02 that Llama 4 is initialised with; norms are 1. Each tensor starts at its
// own place. A tensor of experts reaches beyond the block: SyntheticLoader replaces each expert.
class SyntheticWeights {
 public:
  explicit SyntheticWeights(const ModelSpec& spec);

  const ModelWeights& weights() const { return weights_; }
  // The start of as many values as the largest matrix has; another one with each call.
  const uint16_t* next_window();

 private:
  ModelWeights weights_;
  Memory block_;
  int64_t windows_ = 0;  // handed out
};

// Packs windows of the block, so that a model needs no memory but its packed one.
class SyntheticLoader final : public PackingLoader {
 public:
  SyntheticLoader(Backend& backend, const QuantRecipe& recipe, SyntheticWeights& weights)
      : PackingLoader(backend, recipe, nullptr, {}), weights_(weights) {}

  std::vector<WeightRef> matrices(const std::string& name, std::span<const MatrixSource> parts,
                                  bool split) override;
  int64_t routed_bytes() const { return routed_bytes_; }  // of bytes(), those of routed experts

 private:
  SyntheticWeights& weights_;
  int64_t routed_bytes_ = 0;
};

}  // namespace puna::bench
