#include "engine/inspect.h"

#include <algorithm>
#include <filesystem>
#include <optional>

#include "backend/kv_layout.h"
#include "base/error.h"
#include "io/checkpoint.h"
#include "io/message.h"
#include "model/open_model.h"
#include "model/packed.h"
#include "model/parameters.h"
#include "model/weight_map.h"
#include "quant/blocks.h"

namespace puna {

namespace {

constexpr int64_t kFirstContext = 8192;  // then 16 times as much, up to the model's limit

}  // namespace

Inspection inspect(const std::string& path, const std::string& mmproj) {
  Inspection report;
  OpenedModel model = open_model(path, mmproj);
  report.spec = std::move(model.spec);
  const Checkpoint& checkpoint = *model.checkpoint;
  const PackedBytes bytes = model.packed
                                ? model.packed->sizes()
                                : packed_bytes_of(report.spec, model.weights, QuantRecipe());
  report.dtype = stored_type(model.weights.text);
  report.parameters = count_parameters(report.spec);
  report.weight_bytes = bytes.text_packed + bytes.vision_packed;
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    report.tensors.emplace_back(name, tensor);
    report.tensors.back().second.data = nullptr;
  }
  if (checkpoint.gguf() && checkpoint.gguf()->has("tokenizer.ggml.tokens")) {
    report.tokenizer = "in the file";
  }
  for (const char* name : {"tokenizer.json", "tokenizer.model"}) {
    std::error_code ignored;
    if (report.tokenizer.empty() && !checkpoint.gguf() &&
        std::filesystem::exists(std::filesystem::path(path) / name, ignored)) {
      report.tokenizer = name;
    }
  }
  const KvPageLayout layout{DType::kBF16, report.spec.kv_heads, report.spec.head_dim};
  const auto page = static_cast<int64_t>(layout.page_bytes());
  for (const LayerSpec& layer : report.spec.layers) {
    if (layer.chunk == 0) {
      report.kv_bytes_per_token += page / kPageTokens;
    } else {
      report.kv_fixed_bytes += pages_for(std::min(layer.chunk, report.spec.max_position)) * page;
    }
  }
  std::vector<int64_t> contexts;
  for (int64_t c = kFirstContext; c < report.spec.max_position; c *= 16) contexts.push_back(c);
  contexts.push_back(report.spec.max_position);
  for (const int64_t context : contexts) {
    report.memory.emplace_back(context,
                               report.weight_bytes + report.kv_fixed_bytes +
                                   report.kv_bytes_per_token * pages_for(context) * kPageTokens);
  }
  return report;
}

std::vector<float> read_tensor(const std::string& path, const std::string& name) {
  const Checkpoint checkpoint(path);
  const auto found = checkpoint.tensors().find(name);
  if (found == checkpoint.tensors().end()) {
    fail(ErrorCode::kInvalidRequest, "[inspect] ", path, " has no tensor ", printable(name));
  }
  const TensorRef& tensor = found->second;
  if (!exact_format(tensor.dtype) && tensor.dtype != DType::kF16) {
    fail(ErrorCode::kUnsupported, "[inspect] ", printable(name), " is ", name_of(tensor.dtype),
         ", which is no type of weights");
  }
  std::vector<float> values(static_cast<size_t>(tensor.elements()));
  decode_elements(tensor.dtype, tensor.data, 0, tensor.elements(), values.data());
  return values;
}

}  // namespace puna
