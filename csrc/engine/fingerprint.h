// Tells models apart whose keys and values must not be mixed.
#pragma once

#include "base/sha256.h"
#include "io/checkpoint.h"
#include "model/spec.h"
#include "puna/types.h"

namespace puna {

// A hash of what keys and values of the text model are computed from: the architecture, every
// tensor's name, type, shape and some of its bytes (all of a checkpoint's would take minutes to
// read), and what the weights are quantised to.
Digest model_fingerprint(const ModelSpec& spec, const Checkpoint& checkpoint,
                         const LoadOptions& options);

}  // namespace puna
