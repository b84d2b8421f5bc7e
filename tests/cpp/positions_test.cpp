// What the text model computes at positions of up to ten million and past 2^24, where fp32 holds no
// odd numbers: angles and temperatures as the backend gets them, and whole forward passes.
//
// Layers attend in chunks of 8192, so a sequence gets to any position by appending, without
// computing what lies before: its earlier chunks are gone.
#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>

#include "backend/forwarding_backend.h"
#include "backend_fixture.h"
#include "kv/tiers/ram.h"
#include "model/text_model.h"

namespace {

using namespace fixture;

constexpr int64_t kChunk = 8192;
constexpr int64_t kMostTokens = 10485760;       // Scout's context
constexpr int64_t kFp32End = int64_t{1} << 24;  // fp32 holds no odd numbers above
constexpr int64_t kHidden = 32, kVocab = 50;

// Passes everything on and keeps what attention is told of positions.
class Watcher : public ForwardingBackend {
 public:
  using ForwardingBackend::ForwardingBackend;
  void attention(Rows out, const AttentionInput& input) override {
    const int64_t rows = input.qkv.rows, pairs = input.layout.head_dim / 2;
    if (input.cos != nullptr) {
      cos.assign(input.cos, input.cos + rows * pairs);
      sin.assign(input.sin, input.sin + rows * pairs);
    }
    if (input.temperature != nullptr)
      temperature.assign(input.temperature, input.temperature + rows);
    ForwardingBackend::attention(out, input);
  }

  std::vector<float> cos, sin, temperature;  // of the last layer that has them
};

ModelSpec spec_of(const LayerSpec& layer, int64_t head_dim, size_t layers = 1) {
  ModelSpec spec;
  spec.vocab_size = kVocab;
  spec.hidden = kHidden;
  spec.heads = 2;
  spec.kv_heads = 1;
  spec.head_dim = head_dim;
  spec.max_position = 4 * kFp32End;
  spec.rope.llama3 = true;  // Scout's
  spec.rope.factor = 16;
  spec.layers.assign(layers, layer);
  for (LayerSpec& each : spec.layers) each.intermediate = 16;
  return spec;
}

// A model with random weights, and one sequence.
class Model {
 public:
  explicit Model(ModelSpec spec)
      : watcher(*subjects().back().back().backend),
        spec_(std::move(spec)),
        embedding_(random_matrix(random_, kVocab, kHidden, DType::kF32)),
        text_(spec_, table(), parameters(), watcher),
        kv_({{DType::kBF16, spec_.kv_heads, spec_.head_dim},
             std::vector<int64_t>(spec_.layers.size(), kChunk)},
            make_ram_tier(0)),
        sequence_(kv_.create()) {}

  // Goes on to a later position; what lies between is taken to be zeros.
  void advance(int64_t position) {
    while (kv_.length(sequence_) < position) {
      const int64_t tokens = std::min(kv_.room(sequence_), position - kv_.length(sequence_));
      const KvStore::Append append{sequence_, tokens};
      const KvStore::Plan plan = kv_.plan({&append, 1});
      kv_.apply(plan);
      kv_.commit(plan);
    }
    CHECK_EQ(kv_.length(sequence_), position);
  }

  // Logits [rows][vocab] of the next tokens.
  std::vector<float> forward(std::span<const int32_t> ids) {
    const auto rows = static_cast<int64_t>(ids.size());
    const KvStore::Append append{sequence_, rows};
    const TextBatch::Segment segment{sequence_, kv_.length(sequence_), rows};
    std::vector<int32_t> every(ids.size());
    std::iota(every.begin(), every.end(), 0);
    std::vector<float> out(ids.size() * kVocab);
    const KvStore::Plan plan = kv_.plan({&append, 1});
    kv_.apply(plan);
    text_.forward({ids, {&segment, 1}, {}, every}, kv_, {out.data(), rows, kVocab}, {});
    kv_.commit(plan);
    return out;
  }
  std::vector<float> forward(int64_t rows) {
    return forward(std::vector<int32_t>(static_cast<size_t>(rows), 1));
  }

  Watcher watcher;

 private:
  TensorRef table() const {
    TensorRef table;
    table.rank = 2;
    table.shape = {kVocab, kHidden};
    table.data = embedding_.values.data();
    return table;
  }

  TextParameters parameters() {
    const auto matrix = [&](int64_t rows, int64_t cols) {
      return random_matrix(random_, rows, cols, DType::kF32).load(watcher);
    };
    const VectorRef ones = load_vector(watcher, std::vector<float>(kHidden, 1.0f));
    TextParameters all;
    for (const LayerSpec& shape : spec_.layers) {
      TextParameters::Layer layer;
      layer.input_norm = layer.post_norm = ones;
      layer.qkv = {matrix((spec_.heads + 2 * spec_.kv_heads) * spec_.head_dim, kHidden)};
      layer.output = matrix(kHidden, spec_.heads * spec_.head_dim);
      layer.gate_up = matrix(2 * shape.intermediate, kHidden);
      layer.down = matrix(kHidden, shape.intermediate);
      all.layers.push_back(layer);
    }
    all.norm = ones;
    all.head = matrix(kVocab, kHidden);
    return all;
  }

  std::mt19937 random_{7};
  ModelSpec spec_;
  Matrix embedding_;
  TextModel text_;
  KvStore kv_;
  KvStore::Sequence sequence_;
};

// Inverse frequencies of Scout's heads of 128, from the definition: those whose wavelength is above
// the 8192 tokens of pre-training turn 16 times slower.
std::vector<double> scout_frequencies() {
  std::vector<double> found;
  for (int i = 0; i < 64; ++i) {
    const double frequency = std::pow(500000.0, -i / 64.0);
    const double turns = 8192 * frequency / (2 * std::numbers::pi);
    found.push_back(turns < 1 ? frequency / 16 : frequency);
  }
  return found;
}

// The first chunks, some at distances of powers of two, the last of Scout's, and past 2^24.
const std::vector<int64_t> kChunks{0,    1,    2,    15,   16,   255,  256, 511,
                                   1023, 1024, 1278, 1279, 2047, 2048, 2049};

}  // namespace

TEST(scores_of_chunked_layers_are_exact_at_any_position) {
  const std::vector<double> frequencies = scout_frequencies();
  const auto pairs = static_cast<int64_t>(frequencies.size());
  Model model(spec_of({.chunk = kChunk}, 2 * pairs));
  std::mt19937 random(3);
  double worst = 0;
  for (const int64_t chunk : kChunks) {
    // Both ends of the chunk, and places within.
    std::vector<int64_t> positions;
    std::vector<float> cos, sin;
    for (const int64_t offset : {int64_t{0}, int64_t{1000}, int64_t{4095}, kChunk - 24}) {
      model.advance(chunk * kChunk + offset);
      model.forward(24);
      for (int64_t r = 0; r < 24; ++r) positions.push_back(chunk * kChunk + offset + r);
      cos.insert(cos.end(), model.watcher.cos.begin(), model.watcher.cos.end());
      sin.insert(sin.end(), model.watcher.sin.begin(), model.watcher.sin.end());
    }
    // As after QK norm: a mean square of 1.
    std::vector<float> q = randoms(random, 2 * pairs), k = randoms(random, 2 * pairs);
    for (std::vector<float>* x : {&q, &k}) {
      const float square = std::inner_product(x->begin(), x->end(), x->begin(), 0.0f);
      for (float& value : *x) value /= std::sqrt(square / static_cast<float>(2 * pairs));
    }
    for (size_t a = 0; a < positions.size(); ++a) {
      for (size_t b = 0; b <= a; ++b) {
        double expected = 0, got = 0;
        for (int64_t i = 0; i < pairs; ++i) {
          const double real = q[2 * i] * static_cast<double>(k[2 * i]) +
                              q[2 * i + 1] * static_cast<double>(k[2 * i + 1]);
          const double imaginary = q[2 * i] * static_cast<double>(k[2 * i + 1]) -
                                   q[2 * i + 1] * static_cast<double>(k[2 * i]);
          const double angle = static_cast<double>(positions[a] - positions[b]) * frequencies[i];
          expected += real * std::cos(angle) + imaginary * std::sin(angle);
          // Of what the backend turns q and k with, their difference.
          const double ca = cos[a * pairs + i], sa = sin[a * pairs + i];
          const double cb = cos[b * pairs + i], sb = sin[b * pairs + i];
          got += real * (ca * cb + sa * sb) + imaginary * (sa * cb - ca * sb);
        }
        worst = std::max(worst, std::fabs(expected - got));
      }
    }
  }
  worst /= std::sqrt(2.0 * static_cast<double>(pairs));  // the softmax scale
  // Four roundings of fp32 in each of 128 terms of about 1; measured 1.3e-7.
  CHECK(worst <= 1e-6);
  CHECK(worst > 0);
}

TEST(a_forward_pass_has_the_same_bits_in_every_chunk) {
  Model model(spec_of({.chunk = kChunk, .qk_norm = true}, 128, 2));
  std::vector<int32_t> ids(300);
  std::mt19937 random(4);
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % kVocab);
  std::vector<float> first;
  for (const int64_t chunk : kChunks) {
    model.advance(chunk * kChunk);
    const std::vector<float> found = model.forward(ids);
    if (first.empty()) first = found;
    check_same_bits("chunk " + std::to_string(chunk), found.data(), first.data(), first.size());
  }
}

// The factor after so many steps, from long double.
float expected_temperature(int64_t steps) {
  return static_cast<float>(
      static_cast<double>(1 + 0.1L * std::log1p(static_cast<long double>(steps))));
}

TEST(all_temperatures_to_ten_million_and_past_2_to_the_24) {
  Model model(spec_of({.chunk = kChunk, .rope = false, .temperature = true}, 2));
  std::vector<int64_t> steps(kMostTokens / kChunk + 1);
  std::iota(steps.begin(), steps.end(), 0);
  for (int64_t step = kFp32End / kChunk - 3; step < kFp32End / kChunk + 40; ++step)
    steps.push_back(step);
  CHECK_EQ(steps[1280], 1280);
  for (const int64_t step : steps) {
    // The step is one position early: the last position of a chunk has that of the next.
    const int64_t boundary = std::max<int64_t>(step * kChunk, 3);
    model.advance(boundary - 3);
    model.forward(3);
    const std::vector<float> before = model.watcher.temperature;
    if (step > 0) {
      CHECK_EQ(before[0], expected_temperature(step - 1));
      CHECK_EQ(before[1], expected_temperature(step - 1));
      CHECK_EQ(before[2], expected_temperature(step));
    }
    model.forward(2);
    CHECK_EQ(model.watcher.temperature[0], expected_temperature(step));
    CHECK_EQ(model.watcher.temperature[1], expected_temperature(step));
  }
}
