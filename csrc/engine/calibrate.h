// Which input channels of each matrix matter: what quantising is told by a text.
#pragma once

#include <cstdint>
#include <functional>
#include <span>

#include "backend/backend.h"
#include "io/checkpoint.h"
#include "model/parameters.h"
#include "model/spec.h"

namespace puna {

// Runs a text through the model as it is stored, in windows of 512 tokens, each of which starts
// with the begin-of-text token if the model has one. The importance of an input channel is the mean
// of its squares over the rows that its matrix multiplied; of an expert's, over those sent to it.
// The backend's memory must be the host's. progress(done, total) in tokens; what it throws ends the
// work. Throws InvalidRequest for ids that the vocabulary lacks, and OutOfMemory, before a weight
// is read, if the model does not fit.
Importance calibrate(const ModelSpec& spec, const Checkpoint& source, const ModelWeights& weights,
                     Backend& backend, std::span<const int32_t> tokens,
                     const std::function<void(int64_t, int64_t)>& progress);

}  // namespace puna
