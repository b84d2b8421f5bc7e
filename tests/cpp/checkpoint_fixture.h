// A checkpoint of a few hundred bytes per tensor, written to a directory of its own.
#pragma once

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "model/weight_map.h"

namespace checkpoint_fixture {

namespace fs = std::filesystem;

constexpr const char* kConfig = R"({
  "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4",
  "boi_token_index": 12, "eoi_token_index": 13, "image_token_index": 14,
  "tie_word_embeddings": false, "torch_dtype": "float32",
  "text_config": {
    "model_type": "llama4_text", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 4,
    "intermediate_size_mlp": 6, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
    "moe_layers": [1, 3], "use_qk_norm": true, "no_rope_layers": [1, 1, 1, 0],
    "attention_chunk_size": 4, "attn_temperature_tuning": 4, "floor_scale": 4, "attn_scale": 0.1,
    "rope_theta": 500000.0, "attention_bias": false, "hidden_act": "silu",
    "layer_types": ["chunked_attention", "chunked_attention", "chunked_attention",
                    "full_attention"],
    "rope_scaling": {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0,
                     "high_freq_factor": 1.0, "original_max_position_embeddings": 8},
    "bos_token_id": 10, "eos_token_id": [9, 11], "pad_token_id": 15
  },
  "vision_config": {
    "hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 4, "patch_size": 2, "num_channels": 3, "hidden_act": "gelu", "norm_eps": 1e-5,
    "pixel_shuffle_ratio": 0.5, "projector_input_dim": 6, "projector_output_dim": 6,
    "vision_output_dim": 6, "multi_modal_projector_bias": false, "rope_theta": 10000
  }
})";

constexpr const char* kGeneration = R"({
  "bos_token_id": 10, "eos_token_id": [9, 11], "pad_token_id": 15, "do_sample": true,
  "temperature": 0.6, "top_p": 0.9, "top_k": 50, "transformers_version": "5.23.0"
})";

// A directory that goes when this object does.
class Directory {
 public:
  explicit Directory(const std::string& name)
      : path_(fs::temp_directory_path() / (name + "-" + std::to_string(getpid()))) {
    fs::remove_all(path_);
    fs::create_directories(path_);
  }
  ~Directory() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  Directory(const Directory&) = delete;
  Directory& operator=(const Directory&) = delete;

  std::string path() const { return path_.string(); }
  std::string file(const std::string& name) const { return (path_ / name).string(); }
  void write(const std::string& name, std::string_view content) const {
    std::ofstream(path_ / name, std::ios::binary) << content;
  }

 private:
  fs::path path_;
};

struct Parts {  // of a safetensors file
  std::string header, data;
};

// One tensor more, all of one value, given as its bytes.
inline void add(Parts& file, const std::string& name, const char* dtype,
                const std::vector<int64_t>& extents, std::string_view value) {
  int64_t count = 1;
  std::string shape;
  for (const int64_t extent : extents) {
    count *= extent;
    if (!shape.empty()) shape += ", ";
    shape += std::to_string(extent);
  }
  const size_t begin = file.data.size();
  for (int64_t i = 0; i < count; ++i) file.data.append(value);
  file.header += ", \"" + name + R"(": {"dtype": ")" + dtype + R"(", "shape": [)" + shape +
                 R"(], "data_offsets": [)" + std::to_string(begin) + ", " +
                 std::to_string(file.data.size()) + "]}";
}

inline std::string_view bytes_of(const float& value) {
  return {reinterpret_cast<const char*>(&value), sizeof(value)};
}

enum class Stored { kFloat32, kFloat8 };

// The named tensors, each filled with a value of its own: as float32, or those that may have scales
// as float8, half of them with a scale for each row.
inline Parts parts(const std::vector<puna::ExpectedTensor>& tensors,
                   Stored stored = Stored::kFloat32) {
  Parts file;
  file.header = R"({"__metadata__": {"format": "pt"})";
  bool by_row = false;
  for (const puna::ExpectedTensor& tensor : tensors) {
    const float value = 0.125f * static_cast<float>(1 + file.data.size() % 7);
    if (stored == Stored::kFloat32 || tensor.scale == nullptr) {
      add(file, tensor.name, "F32", tensor.shape, bytes_of(value));
      continue;
    }
    const char one = 0x38;  // 1.0 in e4m3
    add(file, tensor.name, "F8_E4M3", tensor.shape, {&one, 1});
    while (file.data.size() % sizeof(float) != 0) file.data.append(1, '\0');
    by_row = !by_row;
    const std::vector<int64_t>& shape = tensor.shape;
    const std::vector<int64_t> rows =
        shape.size() == 3 ? std::vector{shape[0], int64_t{1}, shape[2]} : std::vector{shape[0]};
    add(file, tensor.name + "_scale", "F32", by_row ? rows : std::vector<int64_t>{},
        bytes_of(value));
  }
  file.header += "}";
  return file;
}

inline std::string length_bytes(uint64_t length) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>(length >> (8 * i) & 255);
  return bytes;
}

inline std::string joined(Parts file) {
  file.header.resize((file.header.size() + 7) / 8 * 8, ' ');
  return length_bytes(file.header.size()) + file.header + file.data;
}

inline std::vector<puna::ExpectedTensor> tensors() {
  const puna::ModelSpec spec = puna::parse_model_spec(kConfig);
  puna::ModelWeights places;
  std::vector<puna::ExpectedTensor> all =
      puna::expected_tensors(spec, puna::usual_prefixes(spec), places);
  for (puna::ExpectedTensor& tensor : all) tensor.place = nullptr;  // `places` ends here
  return all;
}

// Every second tensor in either shard; returns the index.
inline std::string write_shards(const Directory& directory) {
  const std::vector<puna::ExpectedTensor> all = tensors();
  std::string map;
  for (size_t shard = 0; shard < 2; ++shard) {
    const std::string name = "model-0000" + std::to_string(shard + 1) + "-of-00002.safetensors";
    std::vector<puna::ExpectedTensor> mine;
    for (size_t i = shard; i < all.size(); i += 2) {
      mine.push_back(all[i]);
      if (!map.empty()) map += ", ";
      map += "\"" + all[i].name + R"(": ")" + name + "\"";
    }
    directory.write(name, joined(parts(mine)));
  }
  return R"({"metadata": {"total_size": 4096}, "weight_map": {)" + map + "}}";
}

}  // namespace checkpoint_fixture
