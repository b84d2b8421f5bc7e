// puna's packed form: a checkpoint directory whose model.safetensors holds the matrices as the CPU
// backend reads them, so that loading it is mapping it. docs/formats.md describes the file.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>

#include "io/checkpoint.h"
#include "model/parameters.h"

namespace puna {

// Whether a checkpoint is in the packed form.
bool is_packed(const Checkpoint& checkpoint);

// Validates the packed form and hands out its weights where they lie. `checkpoint` and `backend`
// must outlive it and everything it handed out.
class AdoptingLoader : public WeightLoader {
 public:
  // Throws ModelFormat if a matrix does not have the size that its metadata claim, Unsupported for
  // a newer version of the form or an unknown weight format.
  explicit AdoptingLoader(const Checkpoint& checkpoint);

  void use(Backend& backend) { backend_ = &backend; }
  // The shapes that the checkpoint's configuration asks for, and the token embedding. Throws
  // ModelFormat unless they are those of the matrices and vectors that the file holds.
  ModelWeights weights(const ModelSpec& spec) const;
  // Nothing is packed: source and packed bytes are the same.
  PackedBytes sizes() const {
    return {text_bytes_, text_bytes_, vision_bytes_, vision_bytes_, experts_};
  }

  // The parts give the shape that is expected; their data are not read.
  std::vector<WeightRef> matrices(const std::string& name, std::span<const MatrixSource> parts,
                                  bool split) override;
  VectorRef vector(const std::string& name, std::span<const TensorRef> parts) override;

 private:
  struct Matrix {
    WeightFormat format = WeightFormat::kF32;
    int64_t rows = 0, cols = 0;
    const void* data = nullptr;
  };
  struct Vector {
    int64_t size = 0;
    const void* data = nullptr;
  };
  class Comparison;
  TensorRef embedding(const ModelSpec& spec) const;
  // The pieces of a matrix, and a vector, as the configuration asks for them.
  std::vector<const Matrix*> pieces_of(const std::string& name, std::span<const MatrixSource> parts,
                                       bool split) const;
  const Vector& vector_of(const std::string& name, std::span<const TensorRef> parts) const;
  template <class Entry>
  const Entry& find(const std::map<std::string, Entry>& entries, const std::string& name) const;

  const Checkpoint& checkpoint_;
  Backend* backend_ = nullptr;
  std::map<std::string, Matrix> matrices_;
  std::map<std::string, Vector> vectors_;
  std::optional<DType> embedding_type_;  // one of the blocked types
  int64_t text_bytes_ = 0, vision_bytes_ = 0;
  ExpertBytes experts_;
};

// Quantises a checkpoint, whose weights are given, to `path` (a model.safetensors that does not
// exist yet), one matrix after the other. `calibrate` is called once the file is known to have
// room. progress(done, total) in bytes of the checkpoint; what it throws ends the work.
void write_packed(const ModelSpec& spec, const Checkpoint& source, const ModelWeights& weights,
                  const QuantRecipe& recipe, Backend& backend, const std::string& path,
                  const std::function<Importance()>& calibrate,
                  const std::function<void(int64_t, int64_t)>& progress);

}  // namespace puna
