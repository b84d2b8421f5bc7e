// Engine: loading, the arithmetic of what fits, evaluation, and closing.
#include "puna/engine.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <limits>

#include "engine/factory.h"
#include "engine/fingerprint.h"
#include "engine/model_files.h"
#include "engine/plan.h"
#include "engine/state.h"
#include "model/open_model.h"
#include "model/packed.h"
#include "platform/system.h"

namespace puna {

namespace {

// Bytes that pages may take on disk: as given, or what is free where they go.
int64_t disk_budget(const LoadOptions& options) {
  if (options.kv_disk.empty()) return 0;
  if (options.kv_disk_bytes > 0) return options.kv_disk_bytes;
  std::error_code error;
  std::filesystem::path place = std::filesystem::absolute(options.kv_disk, error);
  while (place.has_relative_path() && !std::filesystem::exists(place, error))
    place = place.parent_path();
  const auto space = std::filesystem::space(place, error);
  return error ? 0 : static_cast<int64_t>(space.available);
}

// "auto" takes a GPU that holds all of the model, unless it is said what the host is to have.
LoadOptions options_for(const LoadOptions& options) {
  LoadOptions wanted = options;
  if (options.device == "auto" && options.device_experts == kExpertsThatFit)
    wanted.device_experts = kAllExperts;
  return wanted;
}

// Whether "auto" may be a GPU: not with named instructions, which are the CPU's, nor, as it has not
// been measured, with keys and values on a disk.
bool gpu_will_do(const LoadOptions& options) {
  return options.kv_disk.empty() && options.isa.empty();
}

int64_t columns_of(ModelOutput output, const ModelSpec& spec) {
  return output == ModelOutput::kLogits ? spec.vocab_size : spec.hidden;
}

size_t bytes_of(int64_t rows, int64_t columns) {
  return static_cast<size_t>(rows * columns) * sizeof(float);
}

// Throws OutOfMemory if the host's does not hold the outputs of a prompt.
void require_memory(ModelOutput output, const Prompt& prompt, int64_t columns) {
  const auto rows = static_cast<int64_t>(prompt.tokens.size());
  const auto bytes = rows * columns * static_cast<int64_t>(sizeof(float));
  if (bytes <= available_memory_bytes()) return;
  const bool logits = output == ModelOutput::kLogits;
  fail(ErrorCode::kOutOfMemory, {.asked = bytes, .limit = available_memory_bytes()}, "[",
       name_of(output), "] ", rows, " rows of ", columns, logits ? " logits" : " hidden states",
       " need ", in_words(bytes), ", ", in_words(available_memory_bytes()), " is free; use ",
       logits ? "score() or a shorter prompt" : "a shorter prompt");
}

}  // namespace

Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Engine::~Engine() = default;

const char* version() { return PUNA_VERSION; }

std::shared_ptr<Engine> Engine::load(const LoadOptions& options) {
  const auto start = std::chrono::steady_clock::now();
  check_stream(options.device, options.stream);
  auto impl = std::make_unique<Impl>();
  impl->options = options;
  impl->options.stream.reset();  // the backend keeps it
  OpenedModel model = open_model(options.path, options.mmproj);
  impl->spec = std::move(model.spec);
  impl->checkpoint = std::move(model.checkpoint);
  const ModelSpec& spec = impl->spec;
  const ModelWeights& weights = model.weights;
  const QuantRecipe recipe(options.quant, options.quant_overrides);
  if (model.packed && !recipe.as_stored()) {
    fail(ErrorCode::kInvalidRequest, "[load] ", options.path,
         " is quantised already; leave quant out, or load the original checkpoint");
  }
  const DType weight_type = stored_type(weights.text);

  // What will be needed, before a weight is read.
  std::optional<Planner> planner;
  for (const std::string& device : devices_to_try(options.device, gpu_will_do(options))) {
    impl->backend.reset();
    impl->backend = make_backend(device, {options.isa, options.threads, 0, options.stream});
    planner.emplace(spec, weights, model.packed_sizes(), impl->backend->device_memory());
    impl->plan = planner->plan(options_for(options), disk_budget(options));
    if (impl->plan.fits) break;
  }
  const Plan& plan = impl->plan;
  require_fit(plan);
  const PackedBytes& sizes = planner->weights(options);
  const bool vision = options.vision && spec.vision.has_value();
  impl->tokenizer = tokenizer_of(*impl->checkpoint);
  KvStoreOptions kv;
  kv.model = model_fingerprint(spec, *impl->checkpoint, options);
  kv.disk = options.kv_disk;
  kv.disk_budget = options.kv_disk_bytes;
  kv.read_ahead = read_ahead_for(plan.kv_sealed_bytes);
  // Prefixes of past requests stay until the room is needed, so there is always a bound.
  impl->kv =
      std::make_unique<KvStore>(kv_geometry(spec, kv_format(options.kv, weight_type)),
                                make_memory_tier(*impl->backend, plan.kv_room), std::move(kv),
                                make_host_tier(*impl->backend, plan.kv_host_room));

  const int64_t source_bytes = sizes.text_source + (vision ? sizes.vision_source : 0);
  const auto progress = [&options, source_bytes](int64_t done) {
    if (options.progress) options.progress(done, source_bytes);
  };
  // The matrices are taken as they lie in the packed form, or packed as the recipe says.
  PackingLoader packing(*impl->backend, recipe, impl->checkpoint.get(), progress);
  if (model.packed) model.packed->use(*impl->backend);
  WeightLoader& loader = model.packed ? static_cast<WeightLoader&>(*model.packed) : packing;
  impl->text = std::make_unique<TextModel>(
      spec, weights.text.embed,
      load_text(spec, weights.text, loader, plan.host_layers, plan.expert_window_bytes > 0),
      *impl->backend);
  if (vision)
    impl->vision =
        std::make_unique<VisionModel>(spec, load_vision(*weights.vision, loader), *impl->backend);

  ModelInfo& info = impl->info;
  const ParameterCount parameters = count_parameters(spec);
  info.path = options.path;
  info.device = impl->backend->description();
  if (plan.host_layers > 0)
    info.device += ", experts of " + std::to_string(plan.host_layers) + " of " +
                   std::to_string(plan.expert_layers) + " layers on " +
                   impl->backend->host().description();
  info.dtype = name_of(weight_type);
  const KvGeometry& geometry = impl->kv->geometry();
  info.kv_dtype = geometry.seal == KvSeal::kNone ? name_of(geometry.layout.dtype) : plan.kv;
  info.parameters = parameters.total;
  info.active_parameters = parameters.active;
  info.weight_bytes = loader.bytes();
  info.context = plan.context;
  info.max_context = spec.max_position;
  info.vocab_size = spec.vocab_size;
  info.hidden_size = spec.hidden;
  info.layers = static_cast<int64_t>(spec.layers.size());
  info.bos_token = spec.bos_token;
  info.image_token = spec.image_token;
  info.eos_tokens = spec.eos_tokens;
  info.warnings = spec.warnings;
  info.temperature = spec.generation.temperature;
  info.top_p = spec.generation.top_p;
  info.top_k = spec.generation.top_k;
  if (impl->vision) {
    info.image_size = spec.vision->image_size;
    info.tokens_per_tile = impl->vision->tokens_per_tile();
  }
  info.load_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return std::shared_ptr<Engine>(new Engine(std::move(impl)));
}

const ModelInfo& Engine::info() const { return impl_->info; }

const Plan& Engine::plan() const { return impl_->plan; }

const Tokenizer* Engine::tokenizer() const {
  return impl_->tokenizer ? &*impl_->tokenizer : nullptr;
}

void Engine::check(const SamplingOptions& options) const {
  impl_->require_open();
  check_sampling(options, impl_->info.vocab_size);
  if (!options.stop.empty() && !impl_->tokenizer) {
    fail(ErrorCode::kInvalidRequest, {.param = "stop"},
         "[sampling] stop strings need a tokenizer, which this checkpoint lacks; use stop token "
         "ids");
  }
}

std::shared_ptr<Session> Engine::session() {
  const std::lock_guard turn(impl_->turn);
  impl_->require_open();
  impl_->release_dropped();
  auto state = std::make_unique<Session::State>();
  state->text.sequence = impl_->kv->create();
  return std::shared_ptr<Session>(new Session(shared_from_this(), std::move(state)));
}

std::vector<StepResult> Engine::step(std::span<Session* const> sessions, const Poll& poll) {
  std::vector<Session::State*> states;
  for (Session* session : sessions) {
    if (session->engine_.get() != this) {
      fail(ErrorCode::kInvalidRequest, "[step] a session belongs to another engine");
    }
    states.push_back(session->state_.get());
  }
  const std::lock_guard turn(impl_->turn);
  impl_->require_open();
  impl_->release_dropped();
  return impl_->step(states, poll);
}

DeviceRows Engine::Impl::shared_rows(int64_t rows, int64_t columns, bool on_host) {
  const size_t bytes = bytes_of(rows, columns);
  const auto memory = std::make_shared<Buffer>(on_host ? backend->host().allocate(bytes)
                                                       : backend->allocate_shared(bytes));
  return {{memory, memory->floats()}, rows, columns, on_host ? std::nullopt : backend->gpu(), {}};
}

void Engine::Impl::copy_on_device(float* to, ConstRows rows) {
  backend->copy(to, rows.data, bytes_of(rows.rows, rows.cols));
  backend->to_host(nullptr, rows.slice(0, 0));  // waits
}

template <class Take>
void Engine::compute(ModelOutput output, const Prompt& prompt, std::span<const int64_t> cuts,
                     const Poll& poll, const Take& take) {
  const auto length = static_cast<int64_t>(prompt.tokens.size());
  const std::shared_ptr<Session> one = session();
  one->prompt(prompt);
  int64_t cut_total = 0;
  for (const int64_t cut : cuts) {
    if (cut < 1)
      fail(ErrorCode::kInvalidRequest, "[", name_of(output), "] a cut of ", cut,
           " tokens; each must be 1 or more");
    cut_total += std::min(cut, std::numeric_limits<int64_t>::max() - cut_total);  // not over it
  }
  if (!cuts.empty() && cut_total != length) {
    fail(ErrorCode::kInvalidRequest, "[", name_of(output), "] the cuts add up to ", cut_total,
         ", the prompt has ", length, " tokens");
  }
  const std::array<int64_t, 1> whole{length};
  for (int64_t cut : cuts.empty() ? std::span<const int64_t>(whole) : cuts) {
    while (cut > 0) cut -= impl_->take_outputs(one->state_->text, output, cut, poll, take);
  }
}

std::vector<float> Engine::outputs(ModelOutput output, const Prompt& prompt,
                                   std::span<const int64_t> cuts, const Poll& poll) {
  const int64_t columns = columns_of(output, impl_->spec);
  require_memory(output, prompt, columns);
  std::vector<float> all(prompt.tokens.size() * static_cast<size_t>(columns));
  float* to = all.data();
  compute(output, prompt, cuts, poll, [&](ConstRows rows) {
    impl_->backend->to_host(to, rows);
    to += rows.rows * columns;
  });
  return all;
}

DeviceRows Engine::device_outputs(ModelOutput output, const Prompt& prompt,
                                  std::span<const int64_t> cuts, const Poll& poll) {
  const int64_t columns = columns_of(output, impl_->spec);
  DeviceRows all;
  {
    const std::lock_guard turn(impl_->turn);
    impl_->require_open();
    if (!impl_->backend->gpu()) require_memory(output, prompt, columns);
    all = impl_->shared_rows(static_cast<int64_t>(prompt.tokens.size()), columns, false);
  }
  all.engine = weak_from_this();
  float* to = all.data.get();
  compute(output, prompt, cuts, poll, [&](ConstRows rows) {
    impl_->copy_on_device(to, rows);
    to += rows.rows * columns;
  });
  return all;
}

DeviceRows Engine::copy(const DeviceRows& rows, bool to_host) {
  const std::lock_guard turn(impl_->turn);
  impl_->require_open();
  DeviceRows made = impl_->shared_rows(rows.rows, rows.columns, to_host);
  made.engine = rows.engine;
  const ConstRows from(rows.data.get(), rows.rows, rows.columns);
  if (to_host)
    impl_->backend->to_host(made.data.get(), from);
  else
    impl_->copy_on_device(made.data.get(), from);
  return made;
}

std::vector<double> Engine::score(std::span<const int32_t> tokens, const Poll& poll) {
  const auto vocab = static_cast<size_t>(impl_->info.vocab_size);
  const std::shared_ptr<Session> one = session();
  one->prompt({{tokens.begin(), tokens.end()}, {}});
  std::vector<double> scores{0.0};
  while (scores.size() < tokens.size()) {
    const std::vector<float> rows = one->outputs(ModelOutput::kLogits, kEvaluationRows, poll);
    for (size_t at = 0; at < rows.size() && scores.size() < tokens.size(); at += vocab)
      scores.push_back(log_probability({rows.data() + at, vocab}, tokens[scores.size()]));
  }
  return scores;
}

void Engine::close() {
  impl_->closed = true;  // steps that are running see it at their next layer
  const std::lock_guard turn(impl_->turn);
  impl_->text.reset();
  impl_->vision.reset();
  impl_->features = {};
  impl_->prefixes.clear();
  impl_->outputs = {};
  impl_->kv.reset();
  impl_->backend.reset();
  impl_->checkpoint.reset();
}

bool Engine::closed() const { return impl_->closed; }

}  // namespace puna
