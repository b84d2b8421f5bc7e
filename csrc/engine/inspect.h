// Facts about a checkpoint, read from its configuration and headers: no weight is
// touched.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "base/tensor.h"
#include "model/spec.h"

namespace puna {

struct Inspection {
  ModelSpec spec;
  DType dtype = DType::kBF16;  // of the text model's weights, as stored
  ParameterCount parameters;
  int64_t weight_bytes = 0;        // packed in memory, vision included
  int64_t kv_bytes_per_token = 0;  // layers that keep everything, bf16
  int64_t kv_fixed_bytes = 0;      // layers that keep one chunk, when it is full, bf16
  std::string tokenizer;           // file name, or empty
  std::vector<std::pair<std::string, TensorRef>> tensors;  // names and shapes; data is not valid
  std::vector<std::pair<int64_t, int64_t>> memory;         // context -> weights and KV in bytes
};

// Validates the checkpoint as load() does, and throws the same errors.
Inspection inspect(const std::string& path, const std::string& mmproj = "");

// A tensor's values in fp32, by its name in the file. Throws InvalidRequest if there is no such
// tensor, Unsupported for a type that is no float or block type.
std::vector<float> read_tensor(const std::string& path, const std::string& name);

}  // namespace puna
