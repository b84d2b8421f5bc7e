// What Engine and Session are made of; shared by the files of engine/ and nobody else.
#pragma once

#include <atomic>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "backend/backend.h"
#include "base/error.h"
#include "base/token_list.h"
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

// What Python calls it, for messages.
inline const char* name_of(ModelOutput output) {
  return output == ModelOutput::kLogits ? "logits" : "hidden_states";
}

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
  // Lets go of what the next one of so many bytes has no room beside.
  void make_room(size_t bytes);
  void put(uint64_t key, std::shared_ptr<const ImageFeatures> features);

 private:
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
  TokenList tokens;
  std::vector<PlacedImage> images;
  std::vector<KvImageRun> runs;  // where their rows stand; made when it is needed
  // Of keys and values that attention which is not exact took part in (KvText::salt).
  uint64_t salt = 0;
};

// Length of the common start of two sequences, images included.
int64_t common_length(const TokenSequence& a, const TokenSequence& b, int32_t image_token);

// Sequences that no session holds any more, kept for what a later prompt may share with them; used
// least recently first out.
class PrefixCache {
 public:
  // How much of `text` can be taken over from the best sequence held, at most `most` tokens; 0:
  // nothing. The sequence counts as used.
  struct Match {
    KvStore::Sequence sequence = 0;
    int64_t length = 0;
  };
  Match find(const TokenSequence& text, int64_t most, int32_t image_token, const KvStore& kv);
  void put(TokenSequence text, KvStore& kv);
  // Gives up the sequence used least recently; false if there is none.
  bool drop(KvStore& kv);
  void clear() { entries_.clear(); }

 private:
  static constexpr size_t kEntries = 32;
  std::list<TokenSequence> entries_;  // used most recently first
};

struct Session::State {
  TokenSequence text;
  bool reuse = false;     // shares with other sessions what it computes
  bool on_disk = false;   // was opened from a directory
  bool attached = false;  // its chunks go there
  SamplingOptions options;
  Sampler sampler;
  std::optional<StreamDecoder> decoder;
  std::vector<int32_t> stop_ids;  // the model's own and the request's
  int64_t emitted = 0;            // tokens of this turn
  FinishReason finish = FinishReason::kNone;
  std::string stop;
  bool begun = false;
  bool prefilled = false;  // the turn's prompt has been computed
  // Of a step that gave the session its token and then failed for another: the next one's.
  std::optional<StepResult> unreturned;
  Timings timings;
  AttentionReport report;
  std::atomic<bool> cancelled{false};
};

// A sequence's part of a forward pass: its next `rows` tokens.
struct PassMember {
  TokenSequence* text;
  int64_t rows;
  // Null: exact. Otherwise `report` is added to.
  const AttentionMode* mode = nullptr;
  AttentionReport* report = nullptr;
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
  PrefixCache prefixes;
  Buffer outputs;  // of the last forward pass
  uint64_t last_salt = 0;

  // Sessions may be dropped while another thread computes; their sequences go to the prefix cache,
  // or are released, at the next turn, so that dropping never waits.
  std::mutex dropped_mutex;
  struct Dropped {
    TokenSequence text;
    bool reuse;
  };
  std::vector<Dropped> dropped;

  // --- scheduler.cpp: the caller holds `turn` ---
  void require_open() const;
  void release_dropped();
  // --- persistence.cpp ---
  // The tokens of a pass over the next `rows` of a text and those of its unit before; *first: the
  // position of the first of them.
  std::vector<int32_t> unit_tokens(const TokenSequence& text, int64_t rows, int64_t* first) const;
  const std::vector<KvImageRun>& runs_of(TokenSequence& text) const;
  // Throws ContextOverflow or SessionMismatch if a session on disk has other tokens than a prompt.
  void check_opened(std::span<const int32_t> tokens, const std::string& path) const;

  // --- scheduler.cpp, continued ---
  // Checks a prompt against the model and gives its parts their places.
  TokenSequence place(const Prompt& prompt) const;
  void check_tokens(std::span<const int32_t> tokens, int64_t held) const;
  // What the store makes; cached prefixes make room if they must.
  template <class Make>
  auto with_room(const Make& make) {
    for (;;) {
      try {
        return make();
      } catch (const Error& error) {
        if (error.code() != ErrorCode::kOutOfMemory || !prefixes.drop(*kv)) throw;
      }
    }
  }
  // One forward pass: logits or hidden states of the batch rows that are wanted.
  ConstRows forward(std::span<const PassMember> members, std::span<const int32_t> wanted_rows,
                    ModelOutput output, const Poll& poll);
  std::shared_ptr<const ImageFeatures> features_of(const PlacedImage& image, const Poll& poll);
  std::vector<StepResult> step(std::span<Session::State* const> sessions, const Poll& poll);
  int64_t prefill(Session::State& session, int64_t most, const Poll& poll);
  // Outputs at each of the next tokens of a text, at most `most` of them and what one pass holds.
  // They are the backend's until the next pass.
  ConstRows next_outputs(TokenSequence& text, ModelOutput output, int64_t most, const Poll& poll);
  // The same for whoever does not hold `turn`: `take` gets them while it is held. How many.
  template <class Take>
  int64_t take_outputs(TokenSequence& text, ModelOutput output, int64_t most, const Poll& poll,
                       const Take& take) {
    const std::lock_guard guard(turn);
    require_open();
    release_dropped();
    const ConstRows rows = next_outputs(text, output, most, poll);
    take(rows);
    return rows.rows;
  }
  // engine.cpp: rows for whoever will have them, in the memory of the device or of the host.
  DeviceRows shared_rows(int64_t rows, int64_t columns, bool on_host);
  // Rows without gaps, within the memory of the device; waits for it.
  void copy_on_device(float* to, ConstRows rows);
  // The next token of each session, from its row of logits; of these as little as will do goes to
  // the host.
  struct Chosen {
    int32_t token = 0;
    std::vector<float> logits;  // if log-probabilities are wanted
  };
  std::vector<Chosen> choose(ConstRows logits, std::span<Session::State* const> sessions);
  StepResult emit(Session::State& session, const Chosen& chosen);
};

// Attention leaves pages out for so many rows of a session at most: each of them looks for pages of
// its own, while many rows share what they read.
constexpr int64_t kMostApproximate = 32;

// When logits of every row are wanted: 256 rows of 202,048 logits are 207 MB.
constexpr int64_t kEvaluationRows = 256;

}  // namespace puna
