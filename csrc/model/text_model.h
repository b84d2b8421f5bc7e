// The text model of Llama 4: token ids and image rows in, logits out.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "kv/kv_store.h"
#include "model/parameters.h"
#include "model/spec.h"

namespace puna {

// Called between layers; what it throws ends the forward pass.
using LayerPoll = std::function<void()>;

// One forward pass over rows of one or more sequences. Rows of a sequence are consecutive, and a
// segment does not cross a multiple of its attention chunk (KvStore::room()).
struct TextBatch {
  struct Segment {
    KvStore::Sequence sequence;
    int64_t position;  // of its first row
    int64_t rows;
    // Of layers that see everything; as in AttentionSegment.
    const AttentionMode* mode = nullptr;
    AttentionReport* report = nullptr;
  };
  // Image rows that replace the embeddings of the batch's `rows`.
  struct Features {
    ConstRows features;
    std::vector<int32_t> rows;
  };
  std::span<const int32_t> ids;       // [rows]
  std::span<const Segment> segments;  // in row order, covering all rows
  std::span<const Features> features;
  std::span<const int32_t> logit_rows;  // rows whose logits are wanted, ascending
  // The last layer, past its keys and values, is computed for the rows of logit_rows alone; with
  // this, for all (calibration).
  bool whole_last_layer = false;
  bool hidden_states = false;  // instead of logits what the head multiplies
};

class TextModel {
 public:
  // `spec` and `backend` must outlive the model; so must what keeps the token embedding mapped,
  // which is read where it lies.
  TextModel(const ModelSpec& spec, const TensorRef& embedding, TextParameters parameters,
            Backend& backend);

  // out [logit_rows][vocab], or [logit_rows][hidden]. Reads and writes the pages of `kv`, for which
  // apply() made room.
  void forward(const TextBatch& batch, KvStore& kv, Rows out, const LayerPoll& poll);

 private:
  // residual += attention of the normed rows, which also appends their keys and values. With
  // `queries`, of those rows alone, to as many rows of `residual`.
  void attend(const TextParameters::Layer& layer, int64_t index, const TextBatch& batch,
              KvStore& kv, ConstRows normed, Rows residual,
              std::optional<std::span<const int32_t>> queries);
  void feed_forward(const TextParameters::Layer& layer, int64_t index, Rows normed, Rows residual);
  // Cosines and sines, [head_dim / 2], of the angles at a position.
  void turn(int64_t position, float* cos, float* sin) const;
  // Fills cos_ and sin_ for the batch's positions modulo `chunk` (0 = the positions themselves).
  void rotate_for(int64_t chunk);
  void reserve(int64_t rows, int64_t wanted);

  const ModelSpec& spec_;
  Backend& backend_;
  TensorRef embedding_;
  TextParameters parameters_;
  std::vector<double> inverse_frequencies_;
  std::vector<int64_t> layer_order_;          // in which forward() reads the pages
  std::vector<float> cos_table_, sin_table_;  // of the positions from 0 on that occurred

  // Work space for `capacity_` rows, of which `wanted_capacity_` have their logits computed.
  int64_t capacity_ = 0, wanted_capacity_ = 0;
  Buffer hidden_, normed_, qkv_, attended_, wanted_;
  // Of the batch at hand: positions, and RoPE angles per distinct chunk length.
  std::vector<int64_t> positions_;
  int64_t rotation_chunk_ = -1;
  std::vector<float> cos_, sin_, temperature_;
  std::vector<AttentionSegment> segments_;
};

}  // namespace puna
