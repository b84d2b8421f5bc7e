#include "model/text_model.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/error.h"

namespace puna {

namespace {

// Chunks are no longer in any published model; 4 MB for heads of 128.
constexpr int64_t kTabledPositions = 8192;

}  // namespace

TextModel::TextModel(const ModelSpec& spec, const TensorRef& embedding, TextParameters parameters,
                     Backend& backend)
    : spec_(spec),
      backend_(backend),
      embedding_(embedding),
      parameters_(std::move(parameters)),
      inverse_frequencies_(inverse_frequencies(spec.rope, spec.head_dim)),
      layer_order_(spec.layers.size()) {
  std::iota(layer_order_.begin(), layer_order_.end(), 0);
}

void TextModel::reserve(int64_t rows, int64_t wanted) {
  const auto floats = [&](int64_t count, int64_t cols) {
    return backend_.allocate(static_cast<size_t>(count * cols) * sizeof(float));
  };
  if (rows > capacity_) {
    hidden_ = floats(rows, spec_.hidden);
    normed_ = floats(rows, spec_.hidden);
    qkv_ = floats(rows, (spec_.heads + 2 * spec_.kv_heads) * spec_.head_dim);
    attended_ = floats(rows, spec_.heads * spec_.head_dim);
    capacity_ = rows;
  }
  if (wanted > wanted_capacity_) {
    wanted_ = floats(wanted, spec_.hidden);
    wanted_capacity_ = wanted;
  }
}

void TextModel::turn(int64_t position, float* cos, float* sin) const {
  for (size_t i = 0; i < inverse_frequencies_.size(); ++i) {
    const double angle = static_cast<double>(position) * inverse_frequencies_[i];
    cos[i] = static_cast<float>(std::cos(angle));
    sin[i] = static_cast<float>(std::sin(angle));
  }
}

void TextModel::rotate_for(int64_t chunk) {
  if (rotation_chunk_ == chunk && !cos_.empty()) return;
  rotation_chunk_ = chunk;
  const size_t pairs = inverse_frequencies_.size();
  cos_.resize(positions_.size() * pairs);
  sin_.resize(positions_.size() * pairs);
  for (size_t r = 0; r < positions_.size(); ++r) {
    // Both ends of every attended pair lie in one chunk, so the angle may start at the chunk: the
    // products are the same, and float64 keeps it exact at any position.
    const int64_t position = chunk > 0 ? positions_[r] % chunk : positions_[r];
    float *cos = &cos_[r * pairs], *sin = &sin_[r * pairs];
    if (position >= kTabledPositions) {
      turn(position, cos, sin);
      continue;
    }
    const auto known = static_cast<int64_t>(cos_table_.size() / pairs);
    if (position >= known) {
      cos_table_.resize((position + 1) * pairs);
      sin_table_.resize((position + 1) * pairs);
      for (int64_t p = known; p <= position; ++p)
        turn(p, &cos_table_[p * pairs], &sin_table_[p * pairs]);
    }
    std::copy_n(&cos_table_[position * pairs], pairs, cos);
    std::copy_n(&sin_table_[position * pairs], pairs, sin);
  }
}

void TextModel::attend(const TextParameters::Layer& layer, int64_t index, const TextBatch& batch,
                       KvStore& kv, ConstRows normed, Rows residual,
                       std::optional<std::span<const int32_t>> queries) {
  const LayerSpec& shape = spec_.layers[index];
  const int64_t rows = normed.rows;
  AttentionInput input;
  input.qkv = Rows(qkv_.floats(), rows, (spec_.heads + 2 * spec_.kv_heads) * spec_.head_dim);
  input.heads = spec_.heads;
  input.layout = kv.geometry().layout;
  if (shape.chunk == 0) input.sealed = kv.geometry().sealed_layout();
  if (shape.rope) {
    rotate_for(shape.chunk);
    input.cos = cos_.data();
    input.sin = sin_.data();
    input.qk_norm = shape.qk_norm;
    input.qk_norm_eps = static_cast<float>(spec_.rms_eps);
  }
  if (shape.temperature) {
    temperature_.resize(rows);
    for (int64_t r = 0; r < rows; ++r) {
      temperature_[r] = static_cast<float>(
          attention_temperature(positions_[r], spec_.temperature_floor, spec_.temperature_scale));
    }
    input.temperature = temperature_.data();
  }
  segments_.clear();
  int64_t first_row = 0;
  for (const TextBatch::Segment& segment : batch.segments) {
    const KvView view = kv.view(segment.sequence, index);
    AttentionSegment& part = segments_.emplace_back();
    part.first_row = first_row;
    part.rows = segment.rows;
    part.position = segment.position;
    part.first_position = view.first_position;
    part.sealed = view.sealed;
    part.stream = view.stream;
    part.key_scales = view.key_scales;
    part.first_open = view.first_open;
    part.open = view.open;
    if (shape.chunk == 0) {
      part.mode = segment.mode;
      part.report = segment.report;
    }
    first_row += segment.rows;
  }
  input.segments = segments_;
  input.queries = queries;
  int64_t column = 0;
  for (const WeightRef& piece : layer.qkv) {
    backend_.matmul({input.qkv.data + column, rows, piece.rows, input.qkv.stride}, normed, piece);
    column += piece.rows;
  }
  const Rows attended(attended_.floats(), residual.rows, spec_.heads * spec_.head_dim);
  backend_.attention(attended, input);
  if (residual.rows == 0) return;
  backend_.matmul(residual, attended, layer.output, {.accumulate = true});
}

void TextModel::feed_forward(const TextParameters::Layer& layer, int64_t index, Rows normed,
                             Rows residual) {
  backend_.rms_norm(normed, residual, layer.post_norm, static_cast<float>(spec_.rms_eps));
  if (spec_.layers[index].moe) {
    backend_.moe(residual, normed, layer.moe);
  } else {
    backend_.mlp(residual, normed, layer.gate_up, layer.down);
  }
}

void TextModel::forward(const TextBatch& batch, KvStore& kv, Rows out, const LayerPoll& poll) {
  const auto rows = static_cast<int64_t>(batch.ids.size());
  const auto wanted_rows = static_cast<int64_t>(batch.logit_rows.size());
  reserve(rows, wanted_rows);
  positions_.clear();
  for (const TextBatch::Segment& segment : batch.segments) {
    for (int64_t r = 0; r < segment.rows; ++r) positions_.push_back(segment.position + r);
  }
  rotation_chunk_ = -1;
  const Rows hidden(hidden_.floats(), rows, spec_.hidden);
  const Rows normed(normed_.floats(), rows, spec_.hidden);
  const Rows wanted(wanted_.floats(), wanted_rows, spec_.hidden);
  const auto eps = static_cast<float>(spec_.rms_eps);

  backend_.embed(hidden, embedding_, batch.ids);
  for (const TextBatch::Features& part : batch.features) {
    backend_.scatter(hidden, part.features, part.rows);
  }
  const auto layers = static_cast<int64_t>(parameters_.layers.size());
  // Where no logits are wanted, the last layer only adds to its pages.
  const bool read_last = wanted_rows > 0 || batch.whole_last_layer;
  const bool partly = std::any_of(
      batch.segments.begin(), batch.segments.end(), [](const TextBatch::Segment& segment) {
        return segment.mode != nullptr && segment.mode->kind != AttentionMode::Kind::kExact;
      });
  kv.begin_pass(std::span(layer_order_).first(static_cast<size_t>(layers - !read_last)), partly);
  for (int64_t l = 0; l < layers; ++l) {
    if (poll) poll();
    const TextParameters::Layer& layer = parameters_.layers[l];
    backend_.rms_norm(normed, hidden, layer.input_norm, eps);
    if (l + 1 == layers && !batch.whole_last_layer) {
      // Later layers would need every row; the head needs the wanted ones.
      if (wanted_rows > 0) backend_.gather(wanted, hidden, batch.logit_rows);
      attend(layer, l, batch, kv, normed, wanted, batch.logit_rows);
      if (wanted_rows > 0) feed_forward(layer, l, normed.slice(0, wanted_rows), wanted);
    } else {
      attend(layer, l, batch, kv, normed, hidden, std::nullopt);
      feed_forward(layer, l, normed, hidden);
    }
  }
  if (wanted_rows == 0) return;
  if (batch.whole_last_layer) backend_.gather(wanted, hidden, batch.logit_rows);
  const Rows last = batch.hidden_states ? out : normed.slice(0, wanted_rows);
  backend_.rms_norm(last, wanted, parameters_.norm, eps);
  if (!batch.hidden_states) backend_.matmul(out, last, parameters_.head);
}

}  // namespace puna
