// The arithmetic of what fits: one for planning and for load().
#pragma once

#include <map>
#include <optional>
#include <string>

#include "kv/kv_store.h"
#include "model/parameters.h"
#include "model/spec.h"
#include "puna/plan.h"

namespace puna {

// Rows of one forward pass: enough for every expert of Scout to see some 64 of them, so that
// reading its weights is paid for, and few enough that the activations stay within a few hundred
// MB; on a GPU, whose tiles of a product are larger and which computes the more in the same time,
// enough for 256 of them.
constexpr int64_t kBatchRows = 1024, kDeviceBatchRows = 4096;

// Where no context is asked for, so much of it takes a GPU's memory before routed experts do:
// what Llama 4's chunked layers see.
constexpr int64_t kContextBeforeExperts = 8192;

// Rows that the vision model made of pictures are kept: of so many, within so many bytes (5 of
// Scout's largest pictures), and of one whatever its size.
constexpr size_t kKeptPictures = 16, kKeptPictureBytes = size_t{256} << 20;

// Memory for pages on their way from files, for a context with so many bytes of sealed pages.
int64_t read_ahead_for(int64_t sealed_bytes);

std::string in_words(int64_t bytes);

struct KvFormat {
  std::string name;
  DType open = DType::kF32;  // of the pages that are written
  KvSeal seal = KvSeal::kNone;
};
// "bf16", "fp32", "int8", "int4", or "auto": as weights of this type. Throws InvalidRequest.
KvFormat kv_format(const std::string& wanted, DType weights);
KvGeometry kv_geometry(const ModelSpec& spec, const KvFormat& format);

class Planner {
 public:
  // `packed`: what a checkpoint in the packed form holds; without, the weights are packed as the
  // options say. `device_memory`: bytes free of a device that computes; none: the host does, with
  // its own. What is referred to must outlive it.
  Planner(const ModelSpec& spec, const ModelWeights& weights, std::optional<PackedBytes> packed,
          std::optional<int64_t> device_memory);

  // Throws ContextOverflow.
  Plan plan(const LoadOptions& options, int64_t disk) const;
  // The weights alone.
  const PackedBytes& weights(const LoadOptions& options) const;

 private:
  struct Choice {
    std::vector<std::string> changes;  // keywords of load()
    Plan plan;
  };
  Plan evaluate(const LoadOptions& options, int64_t disk) const;
  // With the routed experts of the first `host_layers` layers that have any left to the host.
  // Their matrices come through a window of a GPU's memory if the context fits beside it.
  Plan evaluate(const LoadOptions& options, int64_t disk, int64_t host_layers) const;
  Plan evaluate(const LoadOptions& options, int64_t disk, int64_t host_layers,
                bool with_window) const;
  void place_experts(Plan& plan, const LoadOptions& options, bool with_window) const;
  std::vector<Choice> choices(const LoadOptions& options, const Plan& plan) const;
  std::vector<Remedy> remedies(const LoadOptions& options, const Plan& plan) const;

  const ModelSpec& spec_;
  const ModelWeights& weights_;
  const std::optional<PackedBytes> packed_;
  const bool on_gpu_;
  const int64_t free_memory_;  // where there is no budget
  const int64_t batch_rows_;
  mutable std::map<std::string, PackedBytes> sizes_;  // by quant
};

// Throws OutOfMemory, with the numbers and what to do, if the plan does not fit.
void require_fit(const Plan& plan);

}  // namespace puna
