#include "synthetic.h"

#include <algorithm>
#include <array>
#include <sstream>
#include <vector>

#include "base/error.h"
#include "base/half.h"

namespace puna::bench {

namespace {

// What distinguishes the published text models; see their config.json.
struct Shape {
  const char* name;
  int64_t dense_width;  // intermediate_size_mlp
  int64_t experts;      // 0: every layer is dense
  int64_t moe_step;     // each n-th layer is a mixture of experts
  bool chunked, qk_norm;
};
constexpr std::array<Shape, 3> kShapes = {{
    {"scout", 16384, 16, 1, true, true},
    {"maverick", 16384, 128, 2, true, false},
    {"guard", 8192, 0, 0, false, true},
}};

// Windows start at multiples of a prime number of cache lines, within the first kWindowSpan
// elements.
constexpr int64_t kWindowSpan = int64_t{4} << 20, kWindowStep = 32 * 1009;

int64_t elements_of(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (int64_t size : shape) count *= size;
  return count;
}

// The largest matrix, in elements: of a tensor of experts, the matrix of one.
int64_t largest_matrix(const std::vector<ExpectedTensor>& tensors) {
  int64_t largest = 0;
  for (const ExpectedTensor& tensor : tensors) {
    const int64_t matrices = tensor.shape.size() == 3 ? tensor.shape[0] : 1;
    largest = std::max(largest, elements_of(tensor.shape) / matrices);
  }
  return largest;
}

}  // namespace

ModelSpec published_spec(const std::string& shape, const Reduction& reduction) {
  const auto found = std::find_if(kShapes.begin(), kShapes.end(),
                                  [&](const Shape& known) { return shape == known.name; });
  if (found == kShapes.end()) {
    fail(ErrorCode::kInvalidRequest, "[model] --shape is '", shape,
         "', and must be scout, maverick or guard");
  }
  std::ostringstream config;
  config << R"({"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4",
    "image_token_index": 0, "text_config": {"model_type": "llama4_text", "hidden_size": 5120,
    "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "attn_temperature_tuning": true, "floor_scale": 8192, "attn_scale": 0.1,
    "max_position_embeddings": 1048576, "num_experts_per_tok": 1, "no_rope_layer_interval": 4,
    "tie_word_embeddings": false, "intermediate_size_mlp": )"
         << found->dense_width << R"(, "num_hidden_layers": )" << reduction.layers
         << R"(, "vocab_size": )" << reduction.vocab << R"(, "num_local_experts": )"
         << (reduction.experts > 0 ? reduction.experts : found->experts)
         << R"(, "interleave_moe_layer_step": )" << found->moe_step
         << (found->experts == 0 ? R"(, "moe_layers": [])" : "") << R"(, "attention_chunk_size": )"
         << (found->chunked ? "8192" : "null") << R"(, "use_qk_norm": )"
         << (found->qk_norm ? "true" : "false") << R"(},
    "vision_config": {"model_type": "llama4_vision_model", "hidden_size": 1408,
    "num_hidden_layers": 34, "num_attention_heads": 16, "intermediate_size": 5632,
    "image_size": 336, "patch_size": 14, "num_channels": 3, "hidden_act": "gelu",
    "norm_eps": 1e-5, "pixel_shuffle_ratio": 0.5, "projector_input_dim": 4096,
    "projector_output_dim": 4096, "vision_output_dim": 4096, "rope_theta": 10000.0}})";
  return parse_model_spec(config.str());
}

SyntheticWeights::SyntheticWeights(const ModelSpec& spec) {
  const std::vector<ExpectedTensor> tensors =
      expected_tensors(spec, usual_prefixes(spec), weights_);
  const int64_t count = largest_matrix(tensors) + kWindowSpan;
  block_ = Memory(static_cast<size_t>(count) * sizeof(uint16_t));
  auto* values = static_cast<uint16_t*>(block_.data());
  // The sum of four bytes of a multiplicative generator is nearly normal: mean 510, standard
  // deviation 147.8.
  uint64_t state = 1;
  for (int64_t i = 0; i < count; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const auto draw = static_cast<uint32_t>(state >> 32);
    const auto sum =
        static_cast<float>((draw & 255) + (draw >> 8 & 255) + (draw >> 16 & 255) + (draw >> 24));
    values[i] = bf16_of_float((sum - 510.0f) / 147.8f * 0.02f);
  }

  static constexpr auto kOnes = [] {
    std::array<float, 5120> ones{};
    ones.fill(1.0f);
    return ones;
  }();
  for (const ExpectedTensor& tensor : tensors) {
    TensorRef& place = *tensor.place;
    place.rank = static_cast<int>(tensor.shape.size());
    std::copy(tensor.shape.begin(), tensor.shape.end(), place.shape.begin());
    const bool norm = place.rank == 1 && tensor.name.ends_with("weight");
    place.dtype = norm ? DType::kF32 : DType::kBF16;
    place.data = norm ? static_cast<const void*>(kOnes.data()) : next_window();
    if (norm && tensor.shape[0] > static_cast<int64_t>(kOnes.size())) {
      fail(ErrorCode::kInternal, "[model] a norm of ", tensor.shape[0], " weights");
    }
  }
}

const uint16_t* SyntheticWeights::next_window() {
  const int64_t start = windows_++ * kWindowStep % kWindowSpan;
  return static_cast<const uint16_t*>(block_.data()) + start;
}

std::vector<WeightRef> SyntheticLoader::matrices(const std::string& name,
                                                 std::span<const MatrixSource> parts, bool split) {
  std::vector<MatrixSource> windows(parts.begin(), parts.end());
  for (MatrixSource& part : windows) part.data = weights_.next_window();
  const int64_t before = bytes();
  std::vector<WeightRef> packed = PackingLoader::matrices(name, windows, split);
  if (name.find(".experts.") != std::string::npos) routed_bytes_ += bytes() - before;
  return packed;
}

}  // namespace puna::bench
