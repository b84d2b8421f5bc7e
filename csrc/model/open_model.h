// A model's files, opened and checked, and what they say it is.
#pragma once

#include <memory>
#include <string>

#include "io/checkpoint.h"
#include "model/spec.h"

namespace puna {

struct OpenedModel {
  ModelSpec spec;
  std::unique_ptr<Checkpoint> checkpoint;
};

// A Hugging Face directory, whose configuration is checked first, or a GGUF file. `projector`: see
// Checkpoint. Throws what read_model_spec(), gguf_model_spec() and Checkpoint throw.
OpenedModel open_model(const std::string& path, const std::string& projector = "");

}  // namespace puna
