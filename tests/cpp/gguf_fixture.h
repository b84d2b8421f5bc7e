// A tiny model as GGUF, written field by field, so that a test can change any of them.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

namespace gguf_fixture {

enum Type : uint32_t { kU32 = 4, kF32 = 6, kBool = 7, kText = 8, kArray = 9 };
enum TensorType : uint32_t { kFloat = 0, kHalf = 1, kQ4_0 = 2, kQ8_0 = 8 };

// Where a number stands in the file, and how many bytes it has.
struct Field {
  size_t at, bytes;
};

class Writer {
 public:
  void u32(uint32_t value) { number(&value, sizeof(value)); }
  void u64(uint64_t value) { number(&value, sizeof(value)); }
  void text(const std::string& text) {
    u64(text.size());
    bytes += text;
  }
  std::string bytes;
  std::vector<Field> fields;

 private:
  void number(const void* value, size_t size) {
    fields.push_back({bytes.size(), size});
    bytes.append(static_cast<const char*>(value), size);
  }
};

struct File {
  std::string bytes;
  std::vector<Field> fields;
  size_t header_bytes = 0;
};

class Builder {
 public:
  void u32(const std::string& key, uint32_t value) {
    begin(key, kU32);
    keys_.u32(value);
  }
  void f32(const std::string& key, float value) {
    begin(key, kF32);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    keys_.u32(bits);
  }
  void flag(const std::string& key, bool value) {
    begin(key, kBool);
    keys_.bytes += static_cast<char>(value);
  }
  void text(const std::string& key, const std::string& value) {
    begin(key, kText);
    keys_.text(value);
  }
  void texts(const std::string& key, const std::vector<std::string>& values) {
    begin(key, kArray);
    keys_.u32(kText);
    keys_.u64(values.size());
    for (const std::string& value : values) keys_.text(value);
  }
  void numbers(const std::string& key, const std::vector<uint32_t>& values) {
    begin(key, kArray);
    keys_.u32(kU32);
    keys_.u64(values.size());
    for (const uint32_t value : values) keys_.u32(value);
  }
  // `shape` row-major.
  void tensor(const std::string& name, std::vector<uint64_t> shape, TensorType type = kFloat) {
    ++tensors_count_;
    tensors_.text(name);
    tensors_.u32(static_cast<uint32_t>(shape.size()));
    uint64_t elements = 1;
    for (size_t i = shape.size(); i-- > 0;) {
      tensors_.u64(shape[i]);
      elements *= shape[i];
    }
    tensors_.u32(type);
    tensors_.u64(data_.size());
    const size_t bytes = type == kFloat  ? elements * 4
                         : type == kHalf ? elements * 2
                         : type == kQ8_0 ? elements / 32 * 34
                                         : elements / 32 * 18;
    // Any bits, but exponents of small numbers: of each float, or of each half, among which are the
    // scales of blocks. Vectors are positive, as divisors must be.
    std::string values(bytes, '\0');
    for (char& value : values) {
      state_ = state_ * 1664525 + 1013904223;
      value = static_cast<char>(state_ >> 24);
    }
    const size_t step = type == kFloat ? 4 : 2;
    const char exponent = type == kFloat ? 0x3d : 0x2c;
    for (size_t i = step - 1; i < bytes; i += step) {
      const char sign = shape.size() > 1 ? values[i] & '\x80' : '\0';
      values[i] = static_cast<char>(exponent | sign);
    }
    data_ += values;
    data_.resize((data_.size() + 31) / 32 * 32);
  }
  File file() const {
    Writer whole;
    whole.bytes = "GGUF";
    whole.u32(3);
    whole.u64(tensors_count_);
    whole.u64(keys_count_);
    for (const Writer* part : {&keys_, &tensors_}) {
      for (const Field field : part->fields) {
        whole.fields.push_back({field.at + whole.bytes.size(), field.bytes});
      }
      whole.bytes += part->bytes;
    }
    const size_t header = whole.bytes.size();
    whole.bytes.resize((header + 31) / 32 * 32);
    return {whole.bytes + data_, whole.fields, header};
  }

 private:
  void begin(const std::string& key, Type type) {
    ++keys_count_;
    keys_.text(key);
    keys_.u32(type);
  }
  Writer keys_, tensors_;
  uint64_t keys_count_ = 0, tensors_count_ = 0;
  uint32_t state_ = 1;
  std::string data_;
};

// Two layers, the second a mixture of two experts; plain and quantised tensors; a tokenizer.
inline Builder model() {
  constexpr uint64_t kHidden = 32, kVocabulary = 264, kExperts = 2, kWidth = 32;
  Builder builder;
  builder.text("general.architecture", "llama4");
  builder.u32("llama4.block_count", 2);
  builder.u32("llama4.context_length", 512);
  builder.u32("llama4.embedding_length", kHidden);
  builder.u32("llama4.feed_forward_length", 64);
  builder.u32("llama4.expert_feed_forward_length", kWidth);
  builder.u32("llama4.expert_count", kExperts);
  builder.u32("llama4.expert_used_count", 1);
  builder.u32("llama4.interleave_moe_layer_step", 2);
  builder.u32("llama4.attention.head_count", 2);
  builder.u32("llama4.attention.head_count_kv", 1);
  builder.u32("llama4.attention.key_length", 16);
  builder.f32("llama4.attention.layer_norm_rms_epsilon", 1e-5f);
  builder.f32("llama4.rope.freq_base", 5e5f);
  builder.u32("llama4.vocab_size", kVocabulary);
  builder.u32("puna.attention.chunk_size", 8);
  builder.u32("puna.attention.no_rope_interval", 2);
  builder.flag("puna.attention.qk_norm", true);
  builder.f32("puna.attention.temperature_scale", 0.1f);
  std::vector<std::string> tokens;
  int next = 256;
  const auto character = [](int code) {
    return code < 0x80 ? std::string(1, static_cast<char>(code))
                       : std::string{static_cast<char>(0xc0 | code >> 6),
                                     static_cast<char>(0x80 | (code & 0x3f))};
  };
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable =
        (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    tokens.push_back(character(printable ? byte : next++));
  }
  for (const char* token :
       {"th", "the", "<|begin_of_text|>", "<|eot|>", "<|patch|>", "[PAD0]", "[PAD1]", "[PAD2]"}) {
    tokens.emplace_back(token);
  }
  std::vector<uint32_t> types(tokens.size(), 1);
  std::fill_n(types.begin() + 258, 3, 3u);
  std::fill_n(types.begin() + 261, 3, 5u);
  builder.text("tokenizer.ggml.model", "gpt2");
  builder.text("tokenizer.ggml.pre", "llama4");
  builder.texts("tokenizer.ggml.tokens", tokens);
  builder.numbers("tokenizer.ggml.token_type", types);
  builder.texts("tokenizer.ggml.merges", {"t h", "th e"});
  builder.u32("tokenizer.ggml.bos_token_id", 258);
  builder.u32("tokenizer.ggml.eos_token_id", 259);
  builder.text("tokenizer.chat_template", "{{ bos_token }}");

  builder.tensor("token_embd.weight", {kVocabulary, kHidden}, kQ8_0);
  builder.tensor("output.weight", {kVocabulary, kHidden}, kQ4_0);
  builder.tensor("output_norm.weight", {kHidden});
  builder.tensor("rope_freqs.weight", {8});
  for (int layer = 0; layer < 2; ++layer) {
    const std::string name = "blk." + std::to_string(layer) + ".";
    builder.tensor(name + "attn_norm.weight", {kHidden});
    builder.tensor(name + "ffn_norm.weight", {kHidden});
    builder.tensor(name + "attn_q.weight", {32, kHidden}, kQ4_0);
    builder.tensor(name + "attn_k.weight", {16, kHidden}, kQ4_0);
    builder.tensor(name + "attn_v.weight", {16, kHidden}, kQ8_0);
    builder.tensor(name + "attn_output.weight", {kHidden, 32}, kHalf);
    const std::string suffix = layer == 1 ? "_shexp.weight" : ".weight";
    const uint64_t width = layer == 1 ? kWidth : 64;
    builder.tensor(name + "ffn_gate" + suffix, {width, kHidden}, kQ8_0);
    builder.tensor(name + "ffn_up" + suffix, {width, kHidden}, kQ8_0);
    builder.tensor(name + "ffn_down" + suffix, {kHidden, width}, kQ4_0);
    if (layer == 0) continue;
    builder.tensor(name + "ffn_gate_inp.weight", {kExperts, kHidden});
    builder.tensor(name + "ffn_gate_exps.weight", {kExperts, kWidth, kHidden}, kQ4_0);
    builder.tensor(name + "ffn_up_exps.weight", {kExperts, kWidth, kHidden}, kQ4_0);
    builder.tensor(name + "ffn_down_exps.weight", {kExperts, kHidden, kWidth}, kQ8_0);
  }
  return builder;
}

// A vision tower for it: one layer, tiles of 8 pixels in patches of 2.
inline Builder projector() {
  constexpr uint64_t kHidden = 16;
  Builder builder;
  builder.text("general.architecture", "clip");
  builder.text("clip.projector_type", "llama4");
  builder.u32("clip.vision.image_size", 8);
  builder.u32("clip.vision.patch_size", 2);
  builder.u32("clip.vision.embedding_length", kHidden);
  builder.u32("clip.vision.feed_forward_length", 64);
  builder.u32("clip.vision.block_count", 1);
  builder.u32("clip.vision.attention.head_count", 2);
  builder.f32("clip.vision.attention.layer_norm_epsilon", 1e-5f);
  builder.u32("clip.vision.projector.scale_factor", 2);
  builder.u32("clip.vision.projection_dim", 32);
  builder.flag("clip.use_gelu", true);
  builder.tensor("v.class_embd", {kHidden});
  builder.tensor("v.position_embd.weight", {17, kHidden});
  builder.tensor("v.patch_embd.weight", {kHidden, 12});
  const auto pair = [&](const std::string& name, std::vector<uint64_t> shape) {
    builder.tensor(name + ".weight", shape);
    builder.tensor(name + ".bias", {shape[0]});
  };
  pair("v.pre_ln", {kHidden});
  pair("v.post_ln", {kHidden});
  pair("v.blk.0.ln1", {kHidden});
  pair("v.blk.0.ln2", {kHidden});
  for (const char* part : {"attn_q", "attn_k", "attn_v", "attn_out"}) {
    pair(std::string("v.blk.0.") + part, {kHidden, kHidden});
  }
  pair("v.blk.0.ffn_up", {64, kHidden});
  pair("v.blk.0.ffn_down", {kHidden, 64});
  builder.tensor("mm.model.mlp.1.weight", {32, 64}, kQ8_0);
  builder.tensor("mm.model.mlp.2.weight", {32, 32}, kHalf);
  builder.tensor("mm.model.fc.weight", {32, 32});
  return builder;
}

class Folder {
 public:
  explicit Folder(const std::string& name)
      : path_(std::filesystem::temp_directory_path() / (name + std::to_string(getpid()))) {
    std::filesystem::create_directories(path_);
  }
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::string write(const std::string& name, const std::string& bytes) const {
    const std::string path = (path_ / name).string();
    std::ofstream(path, std::ios::binary) << bytes;
    return path;
  }

 private:
  std::filesystem::path path_;
};

}  // namespace gguf_fixture
