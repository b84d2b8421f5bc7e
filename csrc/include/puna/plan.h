// Public: what a model needs, worked out from its configuration and headers before a weight is
// read. load() refuses what does not fit by the same arithmetic.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "puna/types.h"

namespace puna {

// Something to change so that it fits.
struct Remedy {
  std::string change;            // keywords of load(), as Python writes them
  int64_t memory = 0, disk = 0;  // bytes needed then
};

struct Plan {
  std::string kv;           // format of the KV cache
  int64_t context = 0;      // tokens: as asked, or the largest that fits
  int64_t max_context = 0;  // of the model
  int64_t largest_context = 0;
  int64_t batch_rows = 0;  // tokens that a forward pass computes at most

  // Bytes.
  int64_t text_bytes = 0, vision_bytes = 0;  // weights
  int64_t scratch_bytes = 0;       // activations of a pass, rows of pictures that are kept
  int64_t kv_sealed_bytes = 0;     // full pages of the layers that keep everything
  int64_t kv_open_bytes = 0;       // their pages that a pass writes
  int64_t kv_local_bytes = 0;      // layers that keep one chunk
  int64_t kv_bytes_per_token = 0;  // by which the cache grows
  int64_t kv_memory_bytes = 0;     // of the cache, in memory
  int64_t kv_room = 0;             // memory that the cache may take
  bool kv_offloads = false;        // pages may go from a GPU's memory to its host's
  int64_t kv_host_bytes = 0;       // of the cache, in the memory of a GPU's host
  int64_t kv_host_room = 0;        // that it may take there
  int64_t kv_disk_bytes = 0;       // of its files
  // With what reads files of pages ahead, in a host's memory: a disk's, an opened session's.
  int64_t memory_needed = 0, memory_budget = 0;
  bool memory_given = false;                 // or what the system has free
  int64_t disk_needed = 0, disk_budget = 0;  // disk_budget 0: no disk

  // Of a GPU: the memory above is its own, and text_bytes include what it leaves to the host.
  bool on_gpu = false;
  int64_t expert_layers = 0;  // with routed experts
  int64_t host_layers = 0;    // of them, the first ones, whose experts lie in the host's memory
  int64_t host_expert_bytes = 0;
  // Of the GPU's memory, for what is sent of them where a pass has many rows; 0: the CPU computes
  // all
  int64_t expert_window_bytes = 0;
  // What they take with what is computed there, and keys and values; and what there is. Nothing if
  // nothing is left to the host.
  int64_t host_needed = 0, host_memory = 0;

  bool fits = false;
  std::vector<Remedy> remedies;  // three at most, if it does not

  // What a token after a full context reads: the weights it uses and all keys and values. Divided
  // by the bandwidths, the time that it takes at least.
  int64_t step_memory_bytes = 0, step_disk_bytes = 0;
  int64_t step_host_bytes = 0;  // experts in the host's memory; not among the former
  // Keys and values that go to a GPU over its link: those of the host's memory, and of files.
  int64_t step_link_bytes = 0;
};

// Throws what load() throws for a checkpoint that cannot be read, and ContextOverflow. `disk`:
// bytes for pages that do not fit into memory, 0 = none may go there. `gpu_memory`: bytes free of a
// GPU that computes; none: the host does.
Plan plan(const LoadOptions& options, int64_t disk = 0,
          std::optional<int64_t> gpu_memory = std::nullopt);

}  // namespace puna
