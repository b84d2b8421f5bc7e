// A model's files, opened and checked, and what they say it is.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "io/checkpoint.h"
#include "model/packed.h"
#include "model/spec.h"
#include "model/weight_map.h"

namespace puna {

struct OpenedModel {
  ModelSpec spec;
  std::unique_ptr<Checkpoint> checkpoint;
  std::unique_ptr<AdoptingLoader> packed;  // of the packed form; null: it is another
  ModelWeights weights;                    // where they lie in the checkpoint

  std::optional<PackedBytes> packed_sizes() const {
    return packed ? std::optional(packed->sizes()) : std::nullopt;
  }
};

// A Hugging Face directory, whose configuration is checked first, or a GGUF file. `projector`: see
// Checkpoint. Throws what read_model_spec(), gguf_model_spec(), Checkpoint, AdoptingLoader and
// resolve_weights() throw.
OpenedModel open_model(const std::string& path, const std::string& projector = "");

}  // namespace puna
