// Public: load a checkpoint, open sessions, step them.
//
//   auto engine = Engine::load({.path = "Llama-4-Scout-17B-16E-Instruct"});
//   auto session = engine->session();
//   session->prompt({engine->tokenizer()->encode("Once upon a time"), {}});
//   session->begin(SamplingOptions{});
//   for (StepResult r; (r = session->step()).finish == FinishReason::kNone;) std::cout << r.text;
//
// Pull, not callback: nothing runs between steps. Thread-safe: any thread may call any method;
// forward passes take turns. A session belongs to one caller at a time.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "puna/plan.h"
#include "puna/types.h"

namespace puna {

class Tokenizer;
class Engine;
class Session;

// A prompt as the model sees it: `tokens` holds the image token at each place of an image row, and
// the tiles of `images`, in order, fill those places.
struct Prompt {
  std::vector<int32_t> tokens;
  std::vector<std::shared_ptr<const PreparedPixels>> images;
};

// Rows of fp32 in the memory of the device that computed them, which is done with them.
struct DeviceRows {
  std::shared_ptr<float> data;  // [rows][columns]; lasts as long as it is shared, engine or not
  int64_t rows = 0, columns = 0;
  std::optional<int> gpu;        // whose memory it is, as CUDA counts them; none: the host's
  std::weak_ptr<Engine> engine;  // that computed them
};

// Called between layers; what it throws ends the step and leaves the session as it was before.
using Poll = std::function<void()>;

struct BackendStatus;

class Engine : public std::enable_shared_from_this<Engine> {
 public:
  static std::shared_ptr<Engine> load(const LoadOptions& options);
  ~Engine();

  const ModelInfo& info() const;
  const Plan& plan() const;            // by which it was loaded
  const Tokenizer* tokenizer() const;  // null: the checkpoint has none

  std::shared_ptr<Session> session();
  // A session that was saved to a directory, or up to its last whole chunk if it was not. With
  // `resume` it is made if there is none, and each chunk is durable there soon after it is
  // computed; without, the directory is only read. Throws SessionMismatch.
  std::shared_ptr<Session> open(const std::string& path, bool resume);
  // What of a saved session is good. `extent`: "journal" | "sampled" | "full".
  SessionReport verify(const std::string& path, const std::string& extent);
  // Cuts a saved session, also one damaged behind them, down to whole chunks within its first
  // `tokens` tokens; what is left.
  int64_t truncate_session(const std::string& path, int64_t tokens);

  // Throws InvalidRequest if an option is out of range for this model; Session::begin checks too.
  void check(const SamplingOptions& options) const;

  // One token for each of the sessions, computed as one batch; results in their order. Sessions
  // that have prompt left are prefilled first. If it throws, sessions that have got their token
  // give it at their next step.
  std::vector<StepResult> step(std::span<Session* const> sessions, const Poll& poll = {});

  // Logits [tokens][vocab] or hidden states [tokens][hidden] of a prompt, computed in pieces of the
  // lengths `cuts` (empty: one piece; 1 = a decode step).
  std::vector<float> outputs(ModelOutput output, const Prompt& prompt,
                             std::span<const int64_t> cuts, const Poll& poll = {});
  // The same, left in the memory of the device.
  DeviceRows device_outputs(ModelOutput output, const Prompt& prompt, std::span<const int64_t> cuts,
                            const Poll& poll = {});
  // Another of the same, in the memory of the device or of the host.
  DeviceRows copy(const DeviceRows& rows, bool to_host);
  // Log-probability of each token given those before it; the first has none (0).
  std::vector<double> score(std::span<const int32_t> tokens, const Poll& poll = {});

  // Stops running steps within a layer, waits for them, and frees everything. Later calls throw
  // EngineClosed. May be called twice.
  void close();
  bool closed() const;

  struct Impl;

 private:
  friend class Session;
  explicit Engine(std::unique_ptr<Impl> impl);
  // Computes a prompt; `take` has the rows of each pass, in their order and in the engine's turn.
  template <class Take>
  void compute(ModelOutput output, const Prompt& prompt, std::span<const int64_t> cuts,
               const Poll& poll, const Take& take);
  std::unique_ptr<Impl> impl_;
};

class Session {
 public:
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Makes `prompt` the session's text. What it shares from the start with what the session holds is
  // kept; the rest is computed by the next step. With `reuse`, so is what it shares with sessions
  // that have ended (and were prompted so), and what this session computes is left to later ones.
  void prompt(const Prompt& prompt, bool reuse = false);
  // Adds tokens to the session's text, after all it holds. An image token stands for itself.
  void append(std::span<const int32_t> tokens);
  // Forgets the text from token `tokens` on; not where there are pictures. What of the rest cannot
  // be restored exactly is computed again when it is needed.
  void truncate(int64_t tokens);
  // Computes the next tokens of the text but the last, at most `most` of them and what one pass
  // holds; how many are left. For long prompts, so that the caller sees how far it is; step() does
  // the same by itself.
  int64_t prefill(int64_t most, const Poll& poll = {});
  // Starts a turn: random state, limits, stop conditions. Attention that is not exact makes keys
  // and values that are not the text's own: such a session is not saved, and shares nothing with
  // others.
  void begin(const SamplingOptions& options);
  // One token of this session alone.
  StepResult step(const Poll& poll = {});
  // Computes the next tokens of the prompt, at most `most` of them and what one pass holds: the
  // logits [n][vocab], or the hidden states [n][hidden], at each. Empty: there are none left, and
  // step() needs another prompt first.
  std::vector<float> outputs(ModelOutput output, int64_t most, const Poll& poll = {});
  // The next step ends the turn with kCancelled. From any thread.
  void cancel();

  // Writes all that is computed to a directory, for Engine::open().
  void save(const std::string& path);
  // Waits until all whole chunks are durable where they go to a disk.
  void flush();
  // Empties the session and lets go of its directory now, not with the engine's next turn.
  void close();

  // A session that shares everything computed so far.
  std::shared_ptr<Session> fork();

  int64_t length() const;      // tokens held: computed and pending
  int64_t pending() const;     // of them
  int64_t batch_rows() const;  // that a forward pass computes at most
  std::vector<int32_t> tokens(int64_t first = 0) const;
  Timings timings() const;  // of the current turn
  // What attention left out in the current turn.
  AttentionReport attention() const;
  const Engine& engine() const { return *engine_; }

  struct State;

 private:
  friend class Engine;
  Session(std::shared_ptr<Engine> engine, std::unique_ptr<State> state);
  std::shared_ptr<Engine> engine_;
  std::unique_ptr<State> state_;
};

// What this build and this machine offer.
std::vector<BackendStatus> available_backends();
const char* version();

}  // namespace puna
