// Engine and Session as Python sees them: conversions only. Every call that computes releases the
// GIL.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <limits>
#include <memory>

#include "bindings/module.h"
#include "engine/quantize.h"
#include "puna/engine.h"
#include "text/tokenizer.h"

namespace py = pybind11;

namespace puna::bindings {

namespace {

using Pixels = py::array_t<float, py::array::c_style | py::array::forcecast>;

// Runs pending Python signal handlers (Ctrl-C), at most every 20 ms: the GIL may be contended.
Poll signal_poll() {
  auto last = std::chrono::steady_clock::now();
  return [last]() mutable {
    const auto now = std::chrono::steady_clock::now();
    if (now - last < std::chrono::milliseconds(20)) return;
    last = now;
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  };
}

using Ids = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

std::vector<int32_t> vector_of(const Ids& ids) { return {ids.data(), ids.data() + ids.size()}; }

Prompt prompt_of(std::vector<int32_t> tokens, const std::vector<Pixels>& images) {
  Prompt prompt;
  prompt.tokens = std::move(tokens);
  for (const Pixels& image : images) {
    if (image.ndim() != 4 || image.shape(1) != 3 || image.shape(2) != image.shape(3)) {
      fail(ErrorCode::kImage, "[prompt] pixel values have ", image.ndim(),
           " dimensions; they must be (tiles, 3, size, size)");
    }
    auto pixels = std::make_shared<PreparedPixels>();
    pixels->tiles = image.shape(0);
    pixels->size = image.shape(2);
    pixels->data.assign(image.data(), image.data() + image.size());
    prompt.images.push_back(std::move(pixels));
  }
  return prompt;
}

py::object finish_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone:
      return py::none();
    case FinishReason::kStop:
      return py::str("stop");
    case FinishReason::kLength:
      return py::str("length");
    case FinishReason::kCancelled:
      return py::str("cancelled");
  }
  return py::none();
}

py::dict info_of(const Engine& engine) {
  const ModelInfo& info = engine.info();
  using namespace py::literals;  // NOLINT
  return py::dict("path"_a = info.path, "device"_a = info.device, "dtype"_a = info.dtype,
                  "kv_dtype"_a = info.kv_dtype, "parameters"_a = info.parameters,
                  "active_parameters"_a = info.active_parameters,
                  "weight_bytes"_a = info.weight_bytes, "max_context"_a = info.max_context,
                  "vocab_size"_a = info.vocab_size, "hidden_size"_a = info.hidden_size,
                  "layers"_a = info.layers, "image_size"_a = info.image_size,
                  "tokens_per_tile"_a = info.tokens_per_tile, "bos_token"_a = info.bos_token,
                  "image_token"_a = info.image_token, "eos_tokens"_a = info.eos_tokens,
                  "load_seconds"_a = info.load_seconds, "warnings"_a = info.warnings,
                  "temperature"_a = info.temperature, "top_p"_a = info.top_p,
                  "top_k"_a = info.top_k);
}

py::dict timings_of(const Session& session) {
  Timings t;
  {
    const py::gil_scoped_release release;
    t = session.timings();
  }
  using namespace py::literals;  // NOLINT
  return py::dict("load_seconds"_a = t.load_seconds,
                  "first_token_seconds"_a = t.first_token_seconds,
                  "prefill_seconds"_a = t.prefill_seconds, "decode_seconds"_a = t.decode_seconds,
                  "prefill_tokens"_a = t.prefill_tokens, "decode_tokens"_a = t.decode_tokens,
                  "cached_tokens"_a = t.cached_tokens, "image_tokens"_a = t.image_tokens,
                  "kv_bytes"_a = t.kv_bytes, "peak_bytes"_a = t.peak_bytes);
}

using QuantOverrides = std::vector<std::pair<std::string, std::string>>;

// Passes progress on, and lets Ctrl-C end the work. `progress` must outlive what is returned.
std::function<void(int64_t, int64_t)> reporting(const py::object& progress) {
  return [&progress, signals = signal_poll()](int64_t done, int64_t total) {
    signals();
    if (progress.is_none()) return;
    const py::gil_scoped_acquire gil;
    progress(done, total);
  };
}

// A pointer that keeps the object which owns what it points to; let go of on any thread.
std::shared_ptr<void> kept_alive(py::object owner, uintptr_t pointer) {
  PyObject* const kept = owner.release().ptr();
  return {reinterpret_cast<void*>(pointer), [kept](void*) {
            if (Py_IsInitialized() == 0) return;  // then nobody is left to be told
            const py::gil_scoped_acquire gil;
            Py_DECREF(kept);
          }};
}

std::shared_ptr<Engine> load(const std::string& path, const std::string& mmproj,
                             const std::string& device, const std::string& isa, int threads,
                             const std::string& kv, bool kv_host, const std::string& kv_disk,
                             int64_t kv_disk_bytes, int64_t context, int64_t memory, bool vision,
                             const std::string& quant, QuantOverrides quant_overrides,
                             int64_t device_experts, int64_t host_memory, py::object stream,
                             uintptr_t stream_handle, const py::object& progress) {
  LoadOptions options;
  options.quant = quant;
  options.quant_overrides = std::move(quant_overrides);
  options.path = path;
  options.mmproj = mmproj;
  options.device = device;
  options.isa = isa;
  options.threads = threads;
  options.kv = kv;
  options.kv_host = kv_host;
  options.kv_disk = kv_disk;
  options.kv_disk_bytes = kv_disk_bytes;
  options.context = context;
  options.memory = memory;
  options.vision = vision;
  options.device_experts = device_experts;
  options.host_memory = host_memory;
  if (!stream.is_none()) options.stream = kept_alive(std::move(stream), stream_handle);
  options.progress = reporting(progress);
  const py::gil_scoped_release release;
  return Engine::load(options);
}

std::vector<std::string> quantize_checkpoint(const std::string& path, const std::string& mmproj,
                                             const std::string& out, const std::string& quant,
                                             QuantOverrides quant_overrides, int threads,
                                             std::vector<int32_t> calibration,
                                             const py::object& progress,
                                             const py::object& calibration_progress) {
  const QuantizeOptions options{path,
                                out,
                                mmproj,
                                quant,
                                std::move(quant_overrides),
                                threads,
                                std::move(calibration),
                                reporting(progress),
                                reporting(calibration_progress)};
  const py::gil_scoped_release release;
  return quantize(options);
}

int64_t prefill(Session& session, double seconds) {
  struct Late {};
  const auto start = std::chrono::steady_clock::now();
  const py::gil_scoped_release release;
  try {
    return session.prefill(std::numeric_limits<int64_t>::max(), [&, signals = signal_poll()] {
      const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
      if (spent.count() >= seconds) throw Late{};
      signals();
    });
  } catch (const Late&) {
    return -1;
  }
}

// One token each; sessions that are not done after `seconds` are cancelled within a layer.
std::vector<StepResult> step(Engine& engine, const std::vector<Session*>& sessions,
                             double seconds) {
  const auto start = std::chrono::steady_clock::now();
  const auto cancel_if_late = [&] {
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
    if (spent.count() < seconds) return;
    for (Session* session : sessions) session->cancel();
  };
  const py::gil_scoped_release release;
  cancel_if_late();
  return engine.step(sessions, [&, signals = signal_poll()] {
    cancel_if_late();
    signals();
  });
}

// [values / columns, columns], without a copy.
py::array_t<float> array_of(std::vector<float> values, int64_t columns) {
  auto owned = std::make_unique<std::vector<float>>(std::move(values));
  const float* data = owned->data();
  const auto rows = static_cast<int64_t>(owned->size()) / columns;
  const py::capsule owner(owned.release(),
                          [](void* p) { delete static_cast<std::vector<float>*>(p); });
  return py::array_t<float>({rows, columns}, data, owner);
}

template <ModelOutput kOutput>
py::array_t<float> outputs(Engine& engine, const Ids& tokens, const std::vector<Pixels>& images,
                           const std::vector<int64_t>& cuts) {
  const Prompt prompt = prompt_of(vector_of(tokens), images);
  std::vector<float> values;
  {
    const py::gil_scoped_release release;
    values = engine.outputs(kOutput, prompt, cuts, signal_poll());
  }
  const ModelInfo& info = engine.info();
  return array_of(std::move(values),
                  kOutput == ModelOutput::kLogits ? info.vocab_size : info.hidden_size);
}

template <ModelOutput kOutput>
py::object device_outputs(Engine& engine, const Ids& tokens, const std::vector<Pixels>& images,
                          const std::vector<int64_t>& cuts) {
  const Prompt prompt = prompt_of(vector_of(tokens), images);
  DeviceRows rows;
  {
    const py::gil_scoped_release release;
    rows = engine.device_outputs(kOutput, prompt, cuts, signal_poll());
  }
  return device_array(std::move(rows));
}

AttentionMode::Kind attention_kind(const std::string& name) {
  return name == "certified" ? AttentionMode::Kind::kCertified
         : name == "budget"  ? AttentionMode::Kind::kBudget
                             : AttentionMode::Kind::kExact;
}

SamplingOptions sampling(double temperature, double top_p, int64_t top_k, double min_p,
                         double repetition_penalty, double presence_penalty,
                         double frequency_penalty,
                         std::vector<std::pair<int32_t, double>> logit_bias, uint64_t seed,
                         int64_t max_tokens, int64_t min_tokens, std::vector<int32_t> stop_ids,
                         std::vector<std::string> stop, bool ignore_eos, int logprobs,
                         bool want_logprobs, const AttentionMode& attention) {
  return {temperature,
          top_p,
          top_k,
          min_p,
          repetition_penalty,
          presence_penalty,
          frequency_penalty,
          std::move(logit_bias),
          seed,
          max_tokens,
          min_tokens,
          std::move(stop_ids),
          std::move(stop),
          ignore_eos,
          logprobs,
          want_logprobs,
          attention};
}

}  // namespace

void bind_engine(py::module_& module) {
  using namespace py::literals;  // NOLINT

  py::class_<StepResult>(module, "Step", "One token of one session.")
      .def_readonly("token", &StepResult::token, "Its id, or -1 if the turn had ended.")
      .def_readonly("text", &StepResult::text, "Text that may be shown now.")
      .def_readonly("logprob", &StepResult::logprob, "Log-probability of the token, if asked for.")
      .def_readonly("stop", &StepResult::stop, "The stop string that ended the turn, or empty.")
      .def_property_readonly(
          "top",
          [](const StepResult& step) {
            py::list pairs;
            for (const TokenLogprob& item : step.top)
              pairs.append(py::make_tuple(item.token, item.logprob));
            return pairs;
          },
          "(token, logprob) of the alternatives, most likely first.")
      .def_property_readonly(
          "finish", [](const StepResult& step) { return finish_name(step.finish); },
          "Why the turn ended: None, 'stop', 'length' or 'cancelled'.");

  py::class_<AttentionMode>(module, "AttentionMode", "Which pages attention may leave out.")
      .def(py::init([](const std::string& kind, double tau, double delta, double fraction,
                       double sample, int64_t sink_pages, int64_t recent_pages) {
             return AttentionMode{attention_kind(kind), tau,         delta, fraction, sample,
                                  sink_pages,           recent_pages};
           }),
           "kind"_a, "tau"_a, "delta"_a, "fraction"_a, "sample"_a, "sink_pages"_a,
           "recent_pages"_a);

  py::class_<SamplingOptions>(module, "Sampling", "How the tokens of a turn are chosen.")
      .def(py::init(&sampling), py::kw_only(), "temperature"_a, "top_p"_a, "top_k"_a, "min_p"_a,
           "repetition_penalty"_a, "presence_penalty"_a, "frequency_penalty"_a, "logit_bias"_a,
           "seed"_a, "max_tokens"_a, "min_tokens"_a, "stop_ids"_a, "stop"_a, "ignore_eos"_a,
           "logprobs"_a, "want_logprobs"_a, "attention"_a);

  py::class_<Session, std::shared_ptr<Session>>(module, "Session", "One sequence of tokens.")
      .def(
          "prompt",
          [](Session& session, const Ids& tokens, const std::vector<Pixels>& images, bool reuse) {
            const Prompt prompt = prompt_of(vector_of(tokens), images);
            const py::gil_scoped_release release;
            session.prompt(prompt, reuse);
          },
          "tokens"_a, "images"_a, "reuse"_a = false,
          "Makes (tokens, tiles per image) the session's text, keeping what it shares with it. "
          "With reuse, also what sessions that have ended share with it.")
      .def(
          "append",
          [](Session& session, const Ids& tokens) {
            const std::vector<int32_t> ids = vector_of(tokens);
            const py::gil_scoped_release release;
            session.append(ids);
          },
          "tokens"_a, "Adds tokens after all that the session holds.")
      .def("truncate", &Session::truncate, "tokens"_a, py::call_guard<py::gil_scoped_release>(),
           "Keeps the first tokens of the session's text.")
      .def("prefill", &prefill, "seconds"_a = std::numeric_limits<double>::infinity(),
           "Computes one pass of the text, never its last token; returns how many are left to "
           "compute before that one, or -1 if the seconds ran out.")
      .def("begin", &Session::begin, "options"_a, py::call_guard<py::gil_scoped_release>(),
           "Starts a turn with these sampling options.")
      .def(
          "logits",
          [](Session& session, int64_t most) {
            std::vector<float> values;
            {
              const py::gil_scoped_release release;
              values = session.outputs(ModelOutput::kLogits, most, signal_poll());
            }
            return array_of(std::move(values), session.engine().info().vocab_size);
          },
          "most"_a,
          "float32 [n, vocab]: logits at each of the next tokens of the prompt, at most so many; "
          "n is 0 when none is left.")
      .def("cancel", &Session::cancel, "Ends the turn at the next step; from any thread.")
      .def("save", &Session::save, "path"_a, py::call_guard<py::gil_scoped_release>(),
           "Writes what is computed to a directory.")
      .def("flush", &Session::flush, py::call_guard<py::gil_scoped_release>(),
           "Waits until whole chunks are durable.")
      .def("close", &Session::close, py::call_guard<py::gil_scoped_release>(),
           "Empties the session and lets go of its directory.")
      .def("fork", &Session::fork, py::call_guard<py::gil_scoped_release>(),
           "A session that shares everything computed so far.")
      .def("tokens", &Session::tokens, "first"_a = 0, py::call_guard<py::gil_scoped_release>(),
           "Ids held, computed and pending, from there on.")
      .def_property_readonly(
          "length", py::cpp_function(&Session::length, py::call_guard<py::gil_scoped_release>()),
          "Number of ids held.")
      .def_property_readonly("batch_rows", &Session::batch_rows,
                             "Tokens that a forward pass computes at most.")
      .def("pending", &Session::pending, py::call_guard<py::gil_scoped_release>(),
           "How many of them are not computed yet.")
      .def(
          "attention",
          [](const Session& session) {
            AttentionReport report;
            {
              const py::gil_scoped_release release;
              report = session.attention();
            }
            return py::make_tuple(report.pages, report.read, report.worst_share,
                                  report.worst_interval, report.unread_bytes);
          },
          "(pages, read, worst share, worst interval, unread bytes) of the current turn.")
      .def("timings", &timings_of, "Times, token counts and memory of the current turn.");

  py::class_<Engine, std::shared_ptr<Engine>>(module, "Engine", "A loaded checkpoint.")
      .def("info", &info_of, "Facts about the model.")
      .def(
          "plan", [](const Engine& engine) { return dict_of(engine.plan()); },
          "What was planned before loading: bytes by kind.")
      .def(
          "tokenizer", [](const Engine& engine) { return engine.tokenizer(); },
          py::return_value_policy::reference_internal, "The tokenizer, or None.")
      .def("session", &Engine::session, py::call_guard<py::gil_scoped_release>(),
           "Opens a session.")
      .def("open", &Engine::open, "path"_a, "resume"_a, py::call_guard<py::gil_scoped_release>(),
           "Opens a session from a directory; to go on with it there, or only to read.")
      .def(
          "verify",
          [](Engine& engine, const std::string& path, const std::string& extent) {
            SessionReport report;
            {
              const py::gil_scoped_release release;
              report = engine.verify(path, extent);
            }
            return py::dict("chunks"_a = report.chunks, "pages"_a = report.pages,
                            "good_tokens"_a = report.good_tokens, "fault"_a = report.fault);
          },
          "path"_a, "extent"_a, "What of a saved session is good.")
      .def("truncate_session", &Engine::truncate_session, "path"_a, "tokens"_a,
           py::call_guard<py::gil_scoped_release>(), "Cuts a saved session down to whole chunks.")
      .def("check", &Engine::check, "options"_a,
           "Raises InvalidRequest if a sampling option is out of range for this model.")
      .def("step", &step, "sessions"_a, "seconds"_a = std::numeric_limits<double>::infinity(),
           "One token for each session, computed as one batch. Sessions that have none after so "
           "many seconds are cancelled.")
      .def("logits", &outputs<ModelOutput::kLogits>, "tokens"_a, "images"_a, "cuts"_a,
           "float32 [tokens, vocab].")
      .def("hidden_states", &outputs<ModelOutput::kHiddenStates>, "tokens"_a, "images"_a, "cuts"_a,
           "float32 [tokens, hidden]: after the last norm.")
      .def("device_logits", &device_outputs<ModelOutput::kLogits>, "tokens"_a, "images"_a, "cuts"_a,
           "The logits in the memory of the device: a DeviceArray.")
      .def("device_hidden_states", &device_outputs<ModelOutput::kHiddenStates>, "tokens"_a,
           "images"_a, "cuts"_a, "The hidden states in the memory of the device: a DeviceArray.")
      .def(
          "score",
          [](Engine& engine, const Ids& tokens) {
            const std::vector<int32_t> ids = vector_of(tokens);
            const py::gil_scoped_release release;
            return engine.score(ids, signal_poll());
          },
          "tokens"_a, "Log-probability of each token given those before it.")
      .def("close", &Engine::close, py::call_guard<py::gil_scoped_release>(),
           "Stops running steps and frees the model.")
      .def_property_readonly("closed", &Engine::closed, "Whether close() was called.");

  module.def("load", &load, py::kw_only(), "path"_a, "mmproj"_a, "device"_a, "isa"_a, "threads"_a,
             "kv"_a, "kv_host"_a, "kv_disk"_a, "kv_disk_bytes"_a, "context"_a, "memory"_a,
             "vision"_a, "quant"_a, "quant_overrides"_a, "device_experts"_a, "host_memory"_a,
             "stream"_a, "stream_handle"_a, "progress"_a, "Loads a checkpoint.");
  module.def("quantize", &quantize_checkpoint, py::kw_only(), "path"_a, "mmproj"_a, "out"_a,
             "quant"_a, "quant_overrides"_a, "threads"_a, "calibration"_a, "progress"_a,
             "calibration_progress"_a,
             "Writes a checkpoint in the packed form; returns what looked odd in it.");
  module.def("version", &version, "The version of puna.");
}

}  // namespace puna::bindings
