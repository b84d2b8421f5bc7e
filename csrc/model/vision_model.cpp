#include "model/vision_model.h"

#include <algorithm>
#include <cmath>
#include <optional>

namespace puna {

VisionModel::VisionModel(const ModelSpec& spec, VisionParameters parameters, Backend& backend)
    : spec_(*spec.vision),
      backend_(backend),
      grid_(spec_.image_size / spec_.patch_size),
      parameters_(std::move(parameters)) {
  const int64_t shuffled = grid_ / spec_.shuffle_factor;
  tokens_per_tile_ = shuffled * shuffled;
  start_ = start_rows();
  // 2-D RoPE: of the head's pairs, the first half turn by the patch's column + 1, the others by its
  // row + 1; the class token, last, does not turn.
  const int64_t pairs = spec_.hidden / spec_.heads / 2, half = pairs / 2;
  const int64_t tokens = grid_ * grid_ + 1;
  cos_.assign(static_cast<size_t>(tokens * pairs), 1.0f);
  sin_.assign(static_cast<size_t>(tokens * pairs), 0.0f);
  for (int64_t t = 0; t + 1 < tokens; ++t) {
    for (int64_t j = 0; j < pairs; ++j) {
      const int64_t place = (j < half ? t % grid_ : t / grid_) + 1;
      const double frequency = std::pow(
          spec_.rope_theta, -2.0 * static_cast<double>(j % half) / static_cast<double>(pairs));
      cos_[t * pairs + j] = static_cast<float>(std::cos(static_cast<double>(place) * frequency));
      sin_[t * pairs + j] = static_cast<float>(std::sin(static_cast<double>(place) * frequency));
    }
  }
}

VectorRef VisionModel::start_rows() {
  const int64_t tokens = grid_ * grid_ + 1, dim = spec_.hidden;
  std::vector<float> rows(static_cast<size_t>(tokens * dim)), last(static_cast<size_t>(dim));
  backend_.to_host(rows.data(), {parameters_.positions.get(), tokens, dim});
  backend_.to_host(last.data(), {parameters_.class_embedding.get(), 1, dim});
  for (int64_t i = 0; i < dim; ++i) rows[(tokens - 1) * dim + i] += last[i];
  const TensorRef sum{DType::kF32, 2, {tokens, dim}, rows.data()};
  return backend_.load_vector({&sum, 1});
}

void VisionModel::encode(Rows out, std::span<const float> pixels, int64_t tiles,
                         const LayerPoll& poll) {
  if (tiles == 0) return;
  // Every group as large as the others, or one larger.
  const int64_t groups = (tiles + tiles_together(tiles) - 1) / tiles_together(tiles);
  const int64_t most = (tiles + groups - 1) / groups;
  const int64_t factor = spec_.shuffle_factor, dim = spec_.hidden;
  const int64_t patches = most * grid_ * grid_, tokens = patches + most;
  const int64_t joined = most * tokens_per_tile_;
  std::vector<Buffer> buffers;
  const auto scratch = [&](int64_t rows, int64_t cols) {
    buffers.push_back(backend_.allocate(static_cast<size_t>(rows * cols) * sizeof(float)));
    return Rows(buffers.back().floats(), rows, cols);
  };
  const Activations memory = {
      .unfolded = scratch(patches, 3 * spec_.patch_size * spec_.patch_size),
      .hidden = scratch(tokens, dim),
      .normed = scratch(tokens, dim),
      .qkv = scratch(tokens, 3 * dim),
      .attended = scratch(tokens, dim),
      .inner = scratch(tokens, spec_.intermediate),
      .joined = scratch(joined, factor * factor * dim),
      .adapted1 = scratch(joined, parameters_.adapter1.rows),
      .adapted2 = scratch(joined, parameters_.adapter2.rows),
  };
  const int64_t tile_pixels = 3 * spec_.image_size * spec_.image_size;
  for (int64_t first = 0; first < tiles; first += most) {
    const int64_t count = std::min(most, tiles - first);
    encode_tiles(out.slice(first * tokens_per_tile_, count * tokens_per_tile_),
                 pixels.data() + first * tile_pixels, count, memory, poll);
  }
}

int64_t VisionModel::tiles_together(int64_t tiles) const {
  // For the host one tile is enough rows (577): four at once were measured to be no faster, and
  // take four times the memory. A GPU has its full rate from thousands on.
  const std::optional<int64_t> free = backend_.device_memory();
  if (!free) return 1;
  const int64_t tokens = grid_ * grid_ + 1;
  const int64_t floats =
      tokens * (6 * spec_.hidden + spec_.intermediate) +
      tokens_per_tile_ * (spec_.shuffle_factor * spec_.shuffle_factor * spec_.hidden +
                          parameters_.adapter1.rows + parameters_.adapter2.rows);
  // What the backend keeps of them, rounded, is not more than half as much.
  const int64_t bytes = floats * static_cast<int64_t>(sizeof(float)) * 3 / 2;
  constexpr int64_t kShareOfMemory = 4, kMostTiles = 17;  // 16 of an image, and all of it
  return std::clamp<int64_t>(*free / kShareOfMemory / bytes, 1, std::min(tiles, kMostTiles));
}

void VisionModel::encode_tiles(Rows out, const float* pixels, int64_t tiles,
                               const Activations& memory, const LayerPoll& poll) {
  const int64_t patches = grid_ * grid_, tokens = patches + 1, dim = spec_.hidden;
  const auto rows_of = [&](const Rows& rows, int64_t each) { return rows.slice(0, tiles * each); };
  const Rows unfolded = rows_of(memory.unfolded, patches), hidden = rows_of(memory.hidden, tokens);
  const Rows normed = rows_of(memory.normed, tokens), qkv = rows_of(memory.qkv, tokens);
  const Rows attended = rows_of(memory.attended, tokens), inner = rows_of(memory.inner, tokens);
  const Rows joined = rows_of(memory.joined, tokens_per_tile_);
  const Rows adapted1 = rows_of(memory.adapted1, tokens_per_tile_);
  const Rows adapted2 = rows_of(memory.adapted2, tokens_per_tile_);
  const auto eps = static_cast<float>(VisionSpec::kNormEps);
  std::vector<int32_t> every(static_cast<size_t>(tiles * tokens));
  for (int64_t i = 0; i < tiles * tokens; ++i) every[i] = static_cast<int32_t>(i % tokens);

  // Each row starts as its position (the class token, last, with its embedding), and the patches'
  // products are added.
  backend_.unfold(unfolded, pixels, tiles, spec_.image_size, spec_.patch_size);
  backend_.gather(hidden, {start_.get(), tokens, dim}, every);
  for (int64_t t = 0; t < tiles; ++t)
    backend_.matmul(hidden.slice(t * tokens, patches), unfolded.slice(t * patches, patches),
                    parameters_.patch_embedding, {.accumulate = true, .many_rows = true});
  backend_.layer_norm(hidden, hidden, parameters_.pre_norm, parameters_.pre_norm_bias, eps);

  for (const VisionParameters::Layer& layer : parameters_.layers) {
    if (poll) poll();
    backend_.layer_norm(normed, hidden, layer.input_norm, layer.input_norm_bias, eps);
    backend_.matmul(qkv, normed, layer.qkv, {.bias = &layer.qkv_bias, .many_rows = true});
    // As precise as the products around it.
    const bool exact = layer.qkv.format == WeightFormat::kF32;
    backend_.vision_attention(attended, qkv, tiles, tokens, spec_.heads, cos_.data(), sin_.data(),
                              exact ? DType::kF32 : DType::kBF16);
    backend_.matmul(hidden, attended, layer.output,
                    {.bias = &layer.output_bias, .accumulate = true, .many_rows = true});
    backend_.layer_norm(normed, hidden, layer.post_norm, layer.post_norm_bias, eps);
    backend_.matmul(inner, normed, layer.fc1,
                    {.bias = &layer.fc1_bias, .gelu = true, .many_rows = true, .passing = true});
    backend_.matmul(hidden, inner, layer.fc2,
                    {.bias = &layer.fc2_bias, .accumulate = true, .many_rows = true});
  }
  backend_.layer_norm(hidden, hidden, parameters_.post_norm, parameters_.post_norm_bias, eps);

  // The class token, last, is dropped, neighbouring patches are joined, and the adapter applies
  // GELU after both of its products.
  for (int64_t t = 0; t < tiles; ++t)
    backend_.pixel_shuffle(joined.slice(t * tokens_per_tile_, tokens_per_tile_),
                           hidden.slice(t * tokens, patches), 1, grid_, spec_.shuffle_factor);
  backend_.matmul(adapted1, joined, parameters_.adapter1,
                  {.gelu = true, .many_rows = true, .passing = true});
  backend_.matmul(adapted2, adapted1, parameters_.adapter2,
                  {.gelu = true, .many_rows = true, .passing = true});
  backend_.matmul(out, adapted2, parameters_.projector, {.many_rows = true});
}

}  // namespace puna
