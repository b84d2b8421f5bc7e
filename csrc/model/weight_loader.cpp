#include "model/weight_loader.h"

#include <algorithm>
#include <charconv>

#include "backend/checks.h"

namespace puna {
namespace {

// A part is one run of memory of so many bytes, whichever way its rows lie.
size_t stored_bytes(const MatrixSource& part) {
  return bytes_of(part.dtype, part.rows * part.cols);
}

// Some consecutive parts, and how they are packed.
struct Piece {
  std::span<const MatrixSource> parts;
  MatrixOptions options;

  int64_t source_bytes() const {
    int64_t bytes = 0;
    for (const MatrixSource& part : parts) bytes += static_cast<int64_t>(stored_bytes(part));
    return bytes;
  }
};

std::vector<Piece> pieces_of(const QuantRecipe& recipe, const std::string& name,
                             std::span<const MatrixSource> parts, bool split) {
  const std::optional<WeightFormat> format = recipe.format_of(name);
  if (format) return {{parts, {format}}};
  std::vector<Piece> pieces;
  for (size_t begin = 0; begin < parts.size();) {
    size_t end = begin + 1;
    while (end < parts.size() && parts[end].dtype == parts[begin].dtype) ++end;
    pieces.push_back({parts.subspan(begin, end - begin), {}});
    begin = end;
  }
  if (pieces.size() == 1 || split) return pieces;
  // Types that no format holds together go to the one that loses least.
  return {{parts, {WeightFormat::kInt8G32}}};
}

}  // namespace

void add_expert(ExpertBytes& experts, std::string_view name, WeightFormat format, int64_t bytes) {
  constexpr std::string_view kLayers = "layers.", kExperts = ".experts.";
  if (!name.starts_with(kLayers)) return;
  name.remove_prefix(kLayers.size());
  int64_t layer = 0;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), layer);
  name.remove_prefix(static_cast<size_t>(end - name.data()));
  if (error != std::errc() || !name.starts_with(kExperts)) return;
  LayerExpertBytes& of = experts[layer];
  of.bytes += bytes;
  of.largest = std::max(of.largest, bytes);
  of.quantized &= is_quantized(format);
}

std::vector<WeightRef> MeasuringLoader::matrices(const std::string& name,
                                                 std::span<const MatrixSource> parts, bool split) {
  names_.push_back(name);
  std::vector<WeightRef> weights;
  for (const Piece& piece : pieces_of(recipe_, name, parts, split)) {
    const MatrixShape shape = check_matrix_parts(piece.parts, piece.options);
    const WeightFormat format = target_format(shape, piece.options);
    weights.push_back(
        {format, shape.rows, shape.cols, packed_bytes(format, shape.rows, shape.cols), nullptr});
    const auto bytes = static_cast<int64_t>(weights.back().bytes);
    bytes_ += bytes;
    add_expert(experts_, name, format, bytes);
    source_bytes_ += piece.source_bytes();
  }
  return weights;
}

std::vector<WeightRef> PackingLoader::matrices(const std::string& name,
                                               std::span<const MatrixSource> parts, bool split) {
  std::vector<WeightRef> weights;
  const std::vector<float>* importance = nullptr;
  if (importance_ && importance_->contains(name)) importance = &importance_->at(name);
  for (Piece& piece : pieces_of(recipe_, name, parts, split)) {
    // Packing touches pages in an order that the system does not foresee.
    will_read(piece.parts);
    if (importance) piece.options.importance = importance->data();
    weights.push_back(place_of(backend_).load_matrix(piece.parts, piece.options));
    bytes_ += static_cast<int64_t>(weights.back().bytes);
    release(piece.parts);
    done_ += piece.source_bytes();
    if (progress_) progress_(done_);
  }
  return weights;
}

void PackingLoader::will_read(std::span<const MatrixSource> parts) const {
  if (source_ == nullptr) return;
  // As much again, since what follows in the file is mostly the next expert's or the next matrix: a
  // disk reads it while this one is packed.
  for (const MatrixSource& part : parts) source_->will_read(part.data, 2 * stored_bytes(part));
}
void PackingLoader::release(std::span<const MatrixSource> parts) const {
  if (source_ == nullptr) return;
  for (const MatrixSource& part : parts) source_->release(part.data, stored_bytes(part));
}

VectorRef PackingLoader::vector(const std::string&, std::span<const TensorRef> parts) {
  return backend_.load_vector(parts);
}

MatrixSource linear(const TensorRef& tensor) {
  return {tensor.dtype, tensor.data, tensor.shape[0], tensor.shape[1], tensor.shape[1], 1};
}

}  // namespace puna
