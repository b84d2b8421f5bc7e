// Public data types of the engine: options that go in, results that come out. No behaviour.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/attention_mode.h"

namespace puna {

// LoadOptions::device_experts: as many as fit, or all.
constexpr int64_t kExpertsThatFit = -1, kAllExperts = -2;

struct LoadOptions {
  std::string path;    // a Hugging Face directory or a GGUF file
  std::string mmproj;  // GGUF file of the vision tower; "" = one beside a GGUF file that fits it
  std::string device = "auto";  // "auto" | "cpu" | "cuda" | "cuda:N" | "ref"
  // Layers whose routed experts lie in the memory of a GPU, the last ones. The host has those of
  // the others, and the CPU computes them; "auto" takes a GPU for that only if a number is given.
  int64_t device_experts = kExpertsThatFit;
  // A cudaStream_t of a GPU, on which all that it computes is asked for instead of on a stream of
  // the engine's own; not a default one. Its owner is released when the engine is closed.
  std::shared_ptr<void> stream;
  std::string isa;    // "" = the best this processor supports
  int threads = 0;    // 0 = the physical cores allowed to this process
  std::string quant;  // "" = weights as stored; else a recipe or format (model/recipe.h)
  std::vector<std::pair<std::string, std::string>> quant_overrides;  // (pattern, format)
  std::string kv = "auto";  // "auto" (as the weights) | "bf16" | "fp32" | "int8" | "int4"
  // Whether pages that do not fit a GPU's memory may go to the host's; where they may go to a disk,
  // they may.
  bool kv_host = false;
  std::string kv_disk;        // directory for pages that do not fit into memory; "" = none may go
  int64_t kv_disk_bytes = 0;  // most that its files may take; 0 = what the disk has free
  int64_t context = 0;        // tokens; 0 = the largest that fits
  // Bytes for weights and KV together, of the device that computes; 0 = what it has free.
  int64_t memory = 0;
  // Bytes for the experts and the pages that a GPU leaves to the host; 0 = what is free.
  int64_t host_memory = 0;
  bool vision = true;  // false = leave the vision tower on disk
  // Called as weights are packed (bytes done, bytes in all); what it throws ends the load.
  std::function<void(int64_t, int64_t)> progress;
};

struct SamplingOptions {
  double temperature = 0.6;  // 0 = the most likely token
  double top_p = 0.9;        // 1 = off
  int64_t top_k = 0;         // 0 = off
  double min_p = 0.0;        // 0 = off
  double repetition_penalty = 1.0;
  double presence_penalty = 0.0;
  double frequency_penalty = 0.0;
  std::vector<std::pair<int32_t, double>> logit_bias;
  uint64_t seed = 0;
  int64_t max_tokens = 0;  // 0 = as many as the context holds
  int64_t min_tokens = 0;
  std::vector<int32_t> stop_ids;  // in addition to the model's own
  std::vector<std::string> stop;
  bool ignore_eos = false;
  int logprobs = 0;            // alternatives to report per token; 0 = none
  bool want_logprobs = false;  // report the chosen token's own even if logprobs == 0
  AttentionMode attention;     // of the rows that step() computes, in layers that see everything
};

// Log-probabilities are of the model's own distribution: before temperature, penalties and cuts.
struct TokenLogprob {
  int32_t token = 0;
  double logprob = 0;
};

// What a forward pass gives for a token: a score of each id to come next, or what the head
// multiplies to that end, the last layer's rows after the last norm.
enum class ModelOutput { kLogits, kHiddenStates };

enum class FinishReason { kNone, kStop, kLength, kCancelled };

struct StepResult {
  int32_t token = -1;  // -1: no token was produced (the session had ended)
  std::string text;  // what may be shown now; stop strings and incomplete characters are held back
  std::optional<double> logprob;
  std::vector<TokenLogprob> top;  // alternatives, most likely first
  FinishReason finish = FinishReason::kNone;
  std::string stop;  // the stop string that ended it, if one did
};

struct Timings {
  double load_seconds = 0;
  double first_token_seconds = 0;  // from the first step of the turn to its first token
  double prefill_seconds = 0, decode_seconds = 0;
  int64_t prefill_tokens = 0, decode_tokens = 0;
  int64_t cached_tokens = 0;  // of the prompt, found computed
  int64_t image_tokens = 0;
  int64_t kv_bytes = 0;    // of all sequences held
  int64_t peak_bytes = 0;  // peak resident set of the process
};

// What was found in a saved session: what was looked at, the tokens up to the first fault, and the
// fault ("": none).
struct SessionReport {
  int64_t chunks = 0, pages = 0, good_tokens = 0;
  std::string fault;
};

// Pixels of one image, cut into tiles and normalised: [tiles][3][size][size].
struct PreparedPixels {
  std::vector<float> data;
  int64_t tiles = 0, size = 0;
};

struct ModelInfo {
  std::string path, device, dtype, kv_dtype;
  int64_t parameters = 0, active_parameters = 0;
  int64_t weight_bytes = 0;
  int64_t context = 0, max_context = 0;
  int64_t vocab_size = 0, hidden_size = 0, layers = 0;
  int64_t image_size = 0,
          tokens_per_tile = 0;  // 0: the checkpoint has no vision tower, or it was not loaded
  int32_t bos_token = -1, image_token = -1, image_start = -1, image_end = -1;
  std::vector<int32_t> eos_tokens;
  double load_seconds = 0;
  std::vector<std::string> warnings;
  // From generation_config.json, where given.
  std::optional<double> temperature, top_p;
  std::optional<int64_t> top_k;
};

}  // namespace puna
