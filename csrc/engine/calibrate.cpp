#include "engine/calibrate.h"

#include <algorithm>
#include <functional>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "backend/recording_backend.h"
#include "base/error.h"
#include "engine/factory.h"
#include "engine/plan.h"
#include "kv/kv_store.h"
#include "model/text_model.h"
#include "platform/system.h"

namespace puna {
namespace {

// Tokens of a window. One row in eight goes into the head, whose inputs are alike.
constexpr int64_t kWindow = 512, kRowsPerHeadRow = 8;
// An expert that saw few rows leans on what its whole layer saw: as if it had seen so many more,
// each of them the average.
constexpr double kLeaning = 16;
// No channel weighs less than this share of the mean: a text of another kind may use it.
constexpr double kLeast = 1e-3;

// Remembers which matrix lies where.
class NamingLoader : public PackingLoader {
 public:
  using PackingLoader::PackingLoader;

  std::vector<WeightRef> matrices(const std::string& name, std::span<const MatrixSource> parts,
                                  bool split) override {
    std::vector<WeightRef> weights = PackingLoader::matrices(name, parts, split);
    for (const WeightRef& weight : weights) names_.emplace(weight.data.get(), name);
    return weights;
  }
  const std::map<const void*, std::string>& names() const { return names_; }

 private:
  std::map<const void*, std::string> names_;
};

// layers.3.experts.12.down -> layers.3.experts.*.down; the name itself for other matrices.
std::string layer_wide(const std::string& name) {
  constexpr std::string_view kExperts = ".experts.";
  const size_t at = name.find(kExperts);
  if (at == std::string::npos) return name;
  const size_t number = at + kExperts.size();
  return name.substr(0, number) + "*" + name.substr(name.find('.', number));
}

void add(InputRecord& sum, const InputRecord& record) {
  sum.squares.resize(record.squares.size());
  std::transform(record.squares.begin(), record.squares.end(), sum.squares.begin(),
                 sum.squares.begin(), std::plus<>());
  sum.rows += record.rows;
}

Importance importance_of(const std::map<const void*, std::string>& names,
                         const std::map<const void*, InputRecord>& records) {
  std::map<std::string, InputRecord> wide, own;
  for (const auto& [data, name] : names) {
    own.try_emplace(name);
    const auto found = records.find(data);
    if (found == records.end()) continue;
    add(own[name], found->second);
    add(wide[layer_wide(name)], found->second);
  }
  Importance all;
  for (const auto& [name, record] : own) {
    const InputRecord& layer = wide[layer_wide(name)];
    if (layer.rows == 0) continue;  // no row came this way
    const size_t cols = layer.squares.size();
    std::vector<double> mean(cols);
    for (size_t c = 0; c < cols; ++c) {
      const double seen = record.rows > 0 ? record.squares[c] : 0;
      mean[c] = (seen + kLeaning * layer.squares[c] / static_cast<double>(layer.rows)) /
                (static_cast<double>(record.rows) + kLeaning);
    }
    const double least =
        kLeast * std::accumulate(mean.begin(), mean.end(), 0.0) / static_cast<double>(cols);
    std::vector<float>& weights = all[name];
    for (const double value : mean) weights.push_back(static_cast<float>(std::max(value, least)));
  }
  return all;
}

}  // namespace

Importance calibrate(const ModelSpec& spec, const Checkpoint& source, const ModelWeights& weights,
                     Backend& backend, std::span<const int32_t> tokens,
                     const std::function<void(int64_t, int64_t)>& progress) {
  const int64_t start = spec.bos_token >= 0;
  const int64_t context = std::min(kWindow, spec.max_position);
  if (context <= start)
    fail(ErrorCode::kInvalidRequest, "[calibrate] the model has room for ", spec.max_position,
         " tokens; quantise without a calibration text");
  for (const int32_t token : tokens)
    if (token < 0 || token >= spec.vocab_size)
      fail(ErrorCode::kInvalidRequest, "[calibrate] token id ", token,
           " is outside the vocabulary of ", spec.vocab_size);
  const QuantRecipe as_stored;
  const int64_t needed = packed_bytes_of(spec, weights, as_stored).text_packed;
  if (const int64_t free = available_memory_bytes(); needed > free)
    fail(ErrorCode::kOutOfMemory, {.asked = needed, .limit = free},
         "[calibrate] the model as it is stored, through which the text is run, needs ", needed,
         " bytes of memory, and ", free, " are free; quantise without a calibration text");

  RecordingBackend recorder(backend);
  NamingLoader loader(backend, as_stored, &source, {});
  TextModel model(spec, weights.text.embed, load_text(spec, weights.text, loader), recorder);
  KvStore kv(kv_geometry(spec, kv_format("fp32", DType::kF32)), make_memory_tier(0));
  const Buffer logits = backend.allocate(
      static_cast<size_t>(kWindow / kRowsPerHeadRow * spec.vocab_size) * sizeof(float));

  const auto total = static_cast<int64_t>(tokens.size());
  for (int64_t done = 0; done < total;) {
    const int64_t taken = std::min(context - start, total - done);
    std::vector<int32_t> window(tokens.begin() + done, tokens.begin() + done + taken);
    if (start) window.insert(window.begin(), spec.bos_token);
    const KvStore::Sequence sequence = kv.create();
    const auto length = static_cast<int64_t>(window.size());
    for (int64_t first = 0; first < length;) {
      const int64_t rows = std::min(length - first, kv.room(sequence));
      std::vector<int32_t> head_rows;
      for (int64_t r = kRowsPerHeadRow - 1; r < rows; r += kRowsPerHeadRow)
        head_rows.push_back(static_cast<int32_t>(r));
      const KvStore::Append append{sequence, rows};
      const TextBatch::Segment segment{sequence, first, rows};
      const KvStore::Plan plan = kv.plan({&append, 1});
      kv.apply(plan);
      model.forward({.ids = {window.data() + first, static_cast<size_t>(rows)},
                     .segments = {&segment, 1},
                     .features = {},
                     .logit_rows = head_rows,
                     .whole_last_layer = true},
                    kv, {logits.floats(), static_cast<int64_t>(head_rows.size()), spec.vocab_size},
                    [&] {
                      if (progress) progress(done, total);
                    });
      kv.commit(plan);
      first += rows;
    }
    kv.release(sequence);
    done += taken;
  }
  if (progress) progress(total, total);
  return importance_of(loader.names(), recorder.records());
}

}  // namespace puna
