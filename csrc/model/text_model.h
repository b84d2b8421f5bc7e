// The text model of Llama 4: token ids and image rows in, logits out.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "kv/kv_store.h"
#include "model/spec.h"
#include "model/weight_map.h"

namespace puna {

// Called between layers; what it throws ends the forward pass.
using LayerPoll = std::function<void()>;
// Called as weights are packed, with the bytes of the checkpoint that were done.
using PackProgress = std::function<void(int64_t)>;

// One forward pass over rows of one or more sequences. Rows of a sequence are consecutive, and a
// segment does not cross a multiple of its attention chunk (KvStore::room()).
struct TextBatch {
  struct Segment {
    KvStore::Sequence sequence;
    int64_t position;  // of its first row
    int64_t rows;
  };
  // Image rows that replace the embeddings of the batch's `rows`.
  struct Features {
    ConstRows features;
    std::vector<int32_t> rows;
  };
  std::span<const int32_t> ids;       // [rows]
  std::span<const Segment> segments;  // in row order, covering all rows
  std::span<const Features> features;
  std::span<const int32_t> logit_rows;  // rows whose logits are wanted
};

class TextModel {
 public:
  // Packs the weights. `spec` and `backend` must outlive the model; so must what keeps the token
  // embedding mapped, which is read where it lies.
  TextModel(const ModelSpec& spec, const TextWeights& weights, Backend& backend,
            const PackProgress& progress);

  // out [logit_rows][vocab]. Reads and writes the pages of `kv`, for which apply() made room.
  void forward(const TextBatch& batch, const KvStore& kv, Rows out, const LayerPoll& poll);

  int64_t weight_bytes() const { return weight_bytes_; }

 private:
  struct Layer {
    VectorRef input_norm, post_norm;
    WeightRef qkv, output;
    WeightRef gate_up, down;  // dense layers
    MoeWeights moe;           // MoE layers
  };

  // residual += attention of the normed rows, which also appends their keys and values.
  void attend(const Layer& layer, int64_t index, const TextBatch& batch, const KvStore& kv,
              ConstRows normed, Rows residual);
  // Fills cos_ and sin_ for the batch's positions modulo `chunk` (0 = the positions themselves).
  void rotate_for(int64_t chunk);
  void reserve(int64_t rows);
  WeightRef pack(std::initializer_list<MatrixSource> parts, const PackProgress& progress,
                 bool keep_f32 = false);
  VectorRef vector(const TensorRef& tensor);

  const ModelSpec& spec_;
  Backend& backend_;
  TensorRef embedding_;
  std::vector<Layer> layers_;
  VectorRef norm_;
  WeightRef head_;
  int64_t weight_bytes_ = 0, packed_bytes_ = 0;

  // Work space for `capacity_` rows.
  int64_t capacity_ = 0;
  Buffer hidden_, normed_, qkv_, attended_;
  // Of the batch at hand: positions, and RoPE angles per distinct chunk length.
  std::vector<int64_t> positions_;
  int64_t rotation_chunk_ = -1;
  std::vector<float> cos_, sin_, temperature_;
  std::vector<double> inverse_frequencies_;
  std::vector<AttentionSegment> segments_;
};

}  // namespace puna
