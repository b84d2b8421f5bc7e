#include "engine/fingerprint.h"

#include <algorithm>
#include <bit>

namespace puna {
namespace {

// Bytes of a tensor that are hashed: kSample bytes at kSamples places, spread evenly.
constexpr size_t kSample = 64;
constexpr size_t kSamples = 8;

class Fingerprint {
 public:
  Fingerprint& add(int64_t value) {
    hash_.number(static_cast<uint64_t>(value));
    return *this;
  }
  Fingerprint& add(double value) {
    hash_.number(std::bit_cast<uint64_t>(value));
    return *this;
  }
  Fingerprint& add(const std::string& text) {
    hash_.number(text.size());
    hash_.update(text.data(), text.size());
    return *this;
  }
  void add(const TensorRef& tensor) {
    add(std::string(name_of(tensor.dtype)));
    add(static_cast<int64_t>(tensor.rank));
    for (int i = 0; i < tensor.rank; ++i) add(tensor.shape[i]);
    const size_t bytes = tensor.bytes();
    const auto* data = static_cast<const char*>(tensor.data);
    if (bytes <= kSample * kSamples) {
      hash_.update(data, bytes);
      return;
    }
    for (size_t i = 0; i < kSamples; ++i)
      hash_.update(data + (bytes - kSample) / (kSamples - 1) * i, kSample);
  }
  Digest digest() { return hash_.digest(); }

 private:
  Sha256 hash_;
};

}  // namespace

Digest model_fingerprint(const ModelSpec& spec, const Checkpoint& checkpoint,
                         const LoadOptions& options) {
  Fingerprint print;
  print.add(spec.vocab_size).add(spec.hidden).add(spec.heads).add(spec.kv_heads);
  print.add(spec.head_dim).add(spec.rms_eps).add(spec.temperature_floor);
  print.add(spec.temperature_scale);
  const RopeSpec& rope = spec.rope;
  print.add(rope.theta).add(int64_t{rope.llama3}).add(rope.factor).add(rope.low_freq_factor);
  print.add(rope.high_freq_factor).add(rope.original_max_position);
  for (const double divisor : rope.divisors) print.add(divisor);
  for (const LayerSpec& layer : spec.layers) {
    print.add(layer.chunk).add(int64_t{layer.rope}).add(int64_t{layer.qk_norm});
    print.add(int64_t{layer.temperature}).add(int64_t{layer.moe}).add(layer.experts);
    print.add(layer.top_k).add(layer.intermediate);
  }
  print.add(options.quant);
  for (const auto& [pattern, format] : options.quant_overrides) print.add(pattern).add(format);
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    print.add(name);
    print.add(tensor);
  }
  return print.digest();
}

}  // namespace puna
