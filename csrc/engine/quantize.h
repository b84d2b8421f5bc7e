// `puna quantize`: a checkpoint directory or GGUF file to puna's packed form.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace puna {

struct QuantizeOptions {
  std::string path, out;  // the checkpoint, and a directory that is made if it is not there
  std::string mmproj;     // as in LoadOptions
  // Recipe or format, see model/recipe.h; "", for a GGUF file only: its weights as they are, which
  // then load by mapping the file.
  std::string quant;
  std::vector<std::pair<std::string, std::string>> quant_overrides;
  int threads = 0;
  // Ids of a text that tells which input channels matter (calibrate.h); empty: all the same.
  std::vector<int32_t> calibration;
  std::function<void(int64_t, int64_t)> progress;              // as in LoadOptions
  std::function<void(int64_t, int64_t)> calibration_progress;  // in tokens
};

struct FormatStatus {
  std::string name;
  double bits_per_weight;
  bool can_encode;  // whether quant= may name it; the others are read from files
};
std::vector<FormatStatus> weight_formats();

// Returns what looked odd in the checkpoint, a sentence each.
// Throws what load() throws for the checkpoint, and InvalidRequest if `out` holds a model already
// or has no room. Nothing that looks like a model is left behind by a failure.
std::vector<std::string> quantize(const QuantizeOptions& options);

}  // namespace puna
