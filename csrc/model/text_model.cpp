#include "model/text_model.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace puna {

namespace {

// W [rows][cols] as torch.nn.Linear stores it.
MatrixSource linear(const TensorRef& tensor) {
  return {tensor.dtype, tensor.data, tensor.shape[0], tensor.shape[1], tensor.shape[1], 1};
}

// Columns [first, first + rows) of expert e of a fused [experts][in][out] tensor, as the [out][in]
// matrix that computes them.
MatrixSource expert_columns(const TensorRef& tensor, int64_t e, int64_t first, int64_t rows) {
  const int64_t in = tensor.shape[1], out = tensor.shape[2];
  const auto* data = static_cast<const std::byte*>(tensor.data) +
                     static_cast<size_t>(e * in * out + first) * size_of(tensor.dtype);
  return {tensor.dtype, data, rows, in, 1, out};
}

}  // namespace

TextModel::TextModel(const ModelSpec& spec, const TextWeights& weights, Backend& backend,
                     const PackProgress& progress)
    : spec_(spec), backend_(backend), embedding_(weights.embed) {
  for (size_t l = 0; l < spec.layers.size(); ++l) {
    const LayerSpec& shape = spec.layers[l];
    const LayerWeights& source = weights.layers[l];
    Layer layer;
    layer.input_norm = vector(source.input_norm);
    layer.post_norm = vector(source.post_norm);
    layer.qkv = pack({linear(source.q), linear(source.k), linear(source.v)}, progress);
    layer.output = pack({linear(source.o)}, progress);
    if (shape.moe) {
      const int64_t width = shape.intermediate;
      layer.moe.top_k = shape.top_k;
      layer.moe.router = pack({linear(source.router)}, progress, /*keep_f32=*/true);
      layer.moe.shared_gate_up = pack({linear(source.gate), linear(source.up)}, progress);
      layer.moe.shared_down = pack({linear(source.down)}, progress);
      for (int64_t e = 0; e < shape.experts; ++e) {
        layer.moe.gate_up.push_back(
            pack({expert_columns(source.experts_gate_up, e, 0, 2 * width)}, progress));
        layer.moe.down.push_back(
            pack({expert_columns(source.experts_down, e, 0, spec.hidden)}, progress));
      }
    } else {
      layer.gate_up = pack({linear(source.gate), linear(source.up)}, progress);
      layer.down = pack({linear(source.down)}, progress);
    }
    layers_.push_back(std::move(layer));
  }
  norm_ = vector(weights.norm);
  head_ = pack({linear(weights.lm_head)}, progress);
  inverse_frequencies_ = inverse_frequencies(spec.rope, spec.head_dim);
}

WeightRef TextModel::pack(std::initializer_list<MatrixSource> parts, const PackProgress& progress,
                          bool keep_f32) {
  WeightRef weight =
      backend_.load_matrix({parts.begin(), parts.size()},
                           keep_f32 ? MatrixOptions{WeightFormat::kF32} : MatrixOptions{});
  weight_bytes_ += static_cast<int64_t>(weight.bytes);
  for (const MatrixSource& part : parts) {
    packed_bytes_ += part.rows * part.cols * static_cast<int64_t>(size_of(part.dtype));
  }
  if (progress) progress(packed_bytes_);
  return weight;
}

VectorRef TextModel::vector(const TensorRef& tensor) { return backend_.load_vector({&tensor, 1}); }

void TextModel::reserve(int64_t rows) {
  if (rows <= capacity_) return;
  const auto floats = [&](int64_t cols) {
    return backend_.allocate(static_cast<size_t>(rows * cols) * sizeof(float));
  };
  hidden_ = floats(spec_.hidden);
  normed_ = floats(spec_.hidden);
  qkv_ = floats((spec_.heads + 2 * spec_.kv_heads) * spec_.head_dim);
  attended_ = floats(spec_.heads * spec_.head_dim);
  capacity_ = rows;
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
    const auto position = static_cast<double>(chunk > 0 ? positions_[r] % chunk : positions_[r]);
    for (size_t i = 0; i < pairs; ++i) {
      const double angle = position * inverse_frequencies_[i];
      cos_[r * pairs + i] = static_cast<float>(std::cos(angle));
      sin_[r * pairs + i] = static_cast<float>(std::sin(angle));
    }
  }
}

void TextModel::attend(const Layer& layer, int64_t index, const TextBatch& batch, const KvStore& kv,
                       ConstRows normed, Rows residual) {
  const LayerSpec& shape = spec_.layers[index];
  const int64_t rows = normed.rows;
  AttentionInput input;
  input.qkv = Rows(qkv_.floats(), rows, (spec_.heads + 2 * spec_.kv_heads) * spec_.head_dim);
  input.heads = spec_.heads;
  input.layout = kv.layout();
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
    segments_.push_back(
        {first_row, segment.rows, segment.position, view.first_position, view.pages});
    first_row += segment.rows;
  }
  input.segments = segments_;
  backend_.matmul(input.qkv, normed, layer.qkv);
  const Rows attended(attended_.floats(), rows, spec_.heads * spec_.head_dim);
  backend_.attention(attended, input);
  backend_.matmul(residual, attended, layer.output, {.accumulate = true});
}

void TextModel::forward(const TextBatch& batch, const KvStore& kv, Rows out,
                        const LayerPoll& poll) {
  const auto rows = static_cast<int64_t>(batch.ids.size());
  reserve(rows);
  positions_.clear();
  for (const TextBatch::Segment& segment : batch.segments) {
    for (int64_t r = 0; r < segment.rows; ++r) positions_.push_back(segment.position + r);
  }
  rotation_chunk_ = -1;
  const Rows hidden(hidden_.floats(), rows, spec_.hidden);
  const Rows normed(normed_.floats(), rows, spec_.hidden);
  const auto eps = static_cast<float>(spec_.rms_eps);

  backend_.embed(hidden, embedding_, batch.ids);
  for (const TextBatch::Features& part : batch.features) {
    backend_.scatter(hidden, part.features, part.rows);
  }
  for (size_t l = 0; l < layers_.size(); ++l) {
    if (poll) poll();
    const Layer& layer = layers_[l];
    backend_.rms_norm(normed, hidden, layer.input_norm, eps);
    attend(layer, static_cast<int64_t>(l), batch, kv, normed, hidden);
    backend_.rms_norm(normed, hidden, layer.post_norm, eps);
    if (spec_.layers[l].moe) {
      backend_.moe(hidden, normed, layer.moe);
    } else {
      backend_.mlp(hidden, normed, layer.gate_up, layer.down);
    }
  }
  const auto wanted = static_cast<int64_t>(batch.logit_rows.size());
  if (wanted == 0) return;
  const Rows last = normed.slice(0, wanted);
  backend_.gather(last, hidden, batch.logit_rows);
  backend_.rms_norm(last, last, norm_, eps);
  backend_.matmul(out, last, head_);
}

}  // namespace puna
