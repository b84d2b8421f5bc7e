// How a model gets its weights: by name, in the order in which it is put together.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "backend/backend.h"
#include "base/tensor.h"
#include "io/checkpoint.h"
#include "model/recipe.h"

namespace puna {

class WeightLoader {
 public:
  virtual ~WeightLoader() = default;

  // The matrix of this name (recipe.h) made of `parts`, stacked by rows. One that is made of parts
  // in formats that cannot be joined comes in several pieces, in the order of rows, if `split`.
  virtual std::vector<WeightRef> matrices(const std::string& name,
                                          std::span<const MatrixSource> parts, bool split) = 0;
  // The vectors joined end to end.
  virtual VectorRef vector(const std::string& name, std::span<const TensorRef> parts) = 0;

  WeightRef matrix(const std::string& name, std::span<const MatrixSource> parts) {
    return std::move(matrices(name, parts, /*split=*/false).front());
  }
  int64_t bytes() const { return bytes_; }  // of the matrices so far, packed
  // Whether the matrices that follow go to the memory of the backend's host().
  void place_on_host(bool on_host) { on_host_ = on_host; }

 protected:
  Backend& place_of(Backend& backend) const { return on_host_ ? backend.host() : backend; }

  int64_t bytes_ = 0;

 private:
  bool on_host_ = false;
};

// Packed bytes of routed experts, by layer.
struct LayerExpertBytes {
  int64_t bytes = 0, largest = 0;  // of all matrices, and of one
  bool quantized = true;           // all of them
};
using ExpertBytes = std::map<int64_t, LayerExpertBytes>;
// Adds a matrix if, by its name (recipe.h), it is one of a routed expert's.
void add_expert(ExpertBytes& experts, std::string_view name, WeightFormat format, int64_t bytes);

// Packs nothing: adds up what PackingLoader would.
class MeasuringLoader : public WeightLoader {
 public:
  explicit MeasuringLoader(const QuantRecipe& recipe) : recipe_(recipe) {}
  std::vector<WeightRef> matrices(const std::string& name, std::span<const MatrixSource> parts,
                                  bool split) override;
  VectorRef vector(const std::string&, std::span<const TensorRef>) override { return {}; }
  int64_t source_bytes() const { return source_bytes_; }
  const ExpertBytes& experts() const { return experts_; }  // of bytes()
  const std::vector<std::string>& names() const { return names_; }

 private:
  const QuantRecipe& recipe_;
  int64_t source_bytes_ = 0;
  ExpertBytes experts_;
  std::vector<std::string> names_;
};

// Called as weights are packed, with the bytes of the checkpoint that were done; what it throws
// ends the load.
using PackProgress = std::function<void(int64_t)>;

// How much an error in each input channel of a matrix weighs when it is quantised, by the matrix's
// name (recipe.h). Those that are not there weigh all channels the same.
using Importance = std::map<std::string, std::vector<float>>;

// Packs the weights of a checkpoint as a recipe says, and lets go of the memory that each occupied
// in the mapped file, so that weights are held once. `source` null: they lie elsewhere. What is
// passed must outlive it.
class PackingLoader : public WeightLoader {
 public:
  PackingLoader(Backend& backend, const QuantRecipe& recipe, const Checkpoint* source,
                PackProgress progress, const Importance* importance = nullptr)
      : backend_(backend),
        recipe_(recipe),
        source_(source),
        progress_(std::move(progress)),
        importance_(importance) {}

  std::vector<WeightRef> matrices(const std::string& name, std::span<const MatrixSource> parts,
                                  bool split) override;
  VectorRef vector(const std::string& name, std::span<const TensorRef> parts) override;

 private:
  // Of the mapped file's pages that parts of a matrix lie on.
  void will_read(std::span<const MatrixSource> parts) const;
  void release(std::span<const MatrixSource> parts) const;

  Backend& backend_;
  const QuantRecipe& recipe_;
  const Checkpoint* source_;
  PackProgress progress_;
  const Importance* importance_;
  int64_t done_ = 0;
};

// W [rows][columns] as torch.nn.Linear stores it.
MatrixSource linear(const TensorRef& tensor);

}  // namespace puna
