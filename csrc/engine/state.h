// What Engine and Session are made of; shared by the files of engine/ and nobody else.
#pragma once

#include <atomic>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "backend/backend.h"
#include "engine/fair_mutex.h"
#include "engine/plan.h"
#include "engine/sampler.h"
#include "io/checkpoint.h"
#include "kv/kv_store.h"
#include "model/spec.h"
#include "model/text_model.h"
#include "model/vision_model.h"
#include "puna/engine.h"
#include "text/stream_decoder.h"
#include "text/tokenizer.h"

namespace puna {

// Rows that the vision model made of one image, shared by every session that shows it.
struct ImageFeatures {
  Buffer buffer;
  ConstRows rows;
};

// Image features by content, least recently used first out: a chat that shows the same picture
// again does not encode it again.
class FeatureCache {
 public:
  std::shared_ptr<const ImageFeatures> find(uint64_t key);
  void put(uint64_t key, std::shared_ptr<const ImageFeatures> features);

 private:
  static constexpr size_t kEntries = 16;
  std::list<std::pair<uint64_t, std::shared_ptr<const ImageFeatures>>> entries_;
};

// One image of a sequence: its rows fill the image tokens first_row, first_row + 1, ... (counted
// over the whole sequence).
struct PlacedImage {
  std::shared_ptr<const PreparedPixels> pixels;
  uint64_t key = 0;
  int64_t first_row = 0, rows = 0;
};

// A sequence of tokens, of which the store holds the first length(sequence).
struct TokenSequence {
  KvStore::Sequence sequence = 0;
  std::vector<int32_t> tokens;
  std::vector<PlacedImage> images;
};

struct Session::State {
  TokenSequence text;
  SamplingOptions options;
  Sampler sampler;
  std::optional<StreamDecoder> decoder;
  std::vector<int32_t> stop_ids;  // the model's own and the request's
  int64_t emitted = 0;            // tokens of this turn
  FinishReason finish = FinishReason::kNone;
  std::string stop;
  bool begun = false;
  bool prefilled = false;  // the turn's prompt has been computed
  Timings timings;
  std::atomic<bool> cancelled{false};
};

struct Engine::Impl {
  LoadOptions options;
  ModelSpec spec;
  std::unique_ptr<Checkpoint> checkpoint;
  std::unique_ptr<Backend> backend;
  std::unique_ptr<TextModel> text;
  std::unique_ptr<VisionModel> vision;
  std::unique_ptr<KvStore> kv;
  std::optional<Tokenizer> tokenizer;
  ModelInfo info;
  Plan plan;

  FairMutex turn;  // held around every use of backend, models and kv
  std::atomic<bool> closed{false};
  FeatureCache features;
  Buffer logits;  // of the last forward pass

  // Sessions may be dropped while another thread computes; their sequences are released at the next
  // turn, so that dropping never waits.
  std::mutex dropped_mutex;
  std::vector<KvStore::Sequence> dropped;

  // --- scheduler.cpp: the caller holds `turn` ---
  void require_open() const;
  void release_dropped();
  // Checks a prompt against the model and gives its parts their places.
  TokenSequence place(const Prompt& prompt) const;
  // One forward pass over the next rows[i] tokens of sequences[i]. logit_rows: batch rows wanted.
  ConstRows forward(std::span<TokenSequence* const> sequences, std::span<const int64_t> rows,
                    std::span<const int32_t> logit_rows, const Poll& poll);
  std::shared_ptr<const ImageFeatures> features_of(const PlacedImage& image, const Poll& poll);
  std::vector<StepResult> step(std::span<Session::State* const> sessions, const Poll& poll);
  StepResult emit(Session::State& session, std::span<float> logits);
};

// When every row's logits are wanted: 256 rows of 202,048 logits are 207 MB.
constexpr int64_t kEvaluationRows = 256;

}  // namespace puna
