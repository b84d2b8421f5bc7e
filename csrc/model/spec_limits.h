// Bounds of what a configuration may say, far above any model, within which products of sizes stay
// far below 2^63. Shared by the readers of specifications.
#pragma once

#include <cstdint>
#include <string>

#include "model/spec.h"

namespace puna {

constexpr int64_t kMaxSize = int64_t{1} << 24;
constexpr int64_t kMaxLayers = 4096;
constexpr int64_t kMaxHeads = 65536;
constexpr int64_t kMaxExperts = 65536;
constexpr int64_t kMaxAllExperts = 1 << 17;  // of all layers; Maverick has 3072
constexpr int64_t kMaxTile = 4096;
constexpr int64_t kMaxPosition = int64_t{1} << 40;
constexpr double kMinRopeDivisor = 1e-6, kMaxRopeDivisor = 1e6;  // beyond, angles are no numbers
constexpr double kMaxParameters = 1e15;
constexpr double kMaxCacheBytes = 1e18;

// The rope_type of a config.json written from a GGUF file, which gives the divisor of each
// frequency ("divisors") where the original gave a rule.
constexpr const char* kDivisorsRopeType = "puna_divisors";

// Adds a warning if a file says another epsilon of the vision tower's layer norms than is used.
void warn_of_norm_eps(double said, const std::string& name, std::vector<std::string>& warnings);

// The sizes are bounded one by one; this bounds their products. Messages name the file, and what it
// calls the length of the context.
void check_magnitude(const ModelSpec& spec, const std::string& file,
                     const std::string& context_name);

}  // namespace puna
