// `puna quantize`: a checkpoint directory to puna's packed form.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace puna {

struct QuantizeOptions {
  std::string path, out;  // the checkpoint, and a directory that is made if it is not there
  std::string quant;      // recipe or format, see model/recipe.h
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

// Throws what load() throws for the checkpoint, and InvalidRequest if `out` holds a model already
// or has no room. Nothing that looks like a model is left behind by a failure.
void quantize(const QuantizeOptions& options);

}  // namespace puna
