// puna-bench model: prefill and decode of a text model of the true layer shapes with random
// weights, through the whole path of the engine: TextModel, Backend and KvStore.
#include <algorithm>
#include <cmath>
#include <functional>
#include <iostream>
#include <memory>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "bench.h"
#include "cloning_backend.h"
#include "device_ceilings.h"
#include "engine/factory.h"
#include "kv/kv_store.h"
#include "model/parameters.h"
#include "model/text_model.h"
#include "platform/system.h"
#include "profile.h"
#include "routing_probe.h"
#include "synthetic.h"

namespace puna::bench {
namespace {

// Enough for prompts without repetition, while embedding and head stay small beside the few layers
// made.
constexpr int64_t kVocabulary = 2048, kWholeVocabulary = 202048;
constexpr int64_t kBatchRows = 512;  // of one forward pass

std::string gib(int64_t bytes) {
  const int64_t tenths = (bytes * 10 + (int64_t{1} << 29)) >> 30;
  return std::to_string(tenths / 10) + "." + std::to_string(tenths % 10) + " GiB";
}

// Multiplies and adds of one forward pass over `rows` tokens from `position` on, with logits of the
// last one; and the bytes of the cache that it reads.
struct Work {
  double operations = 0, cache_bytes = 0;
};
Work forward_work(const ModelSpec& spec, int64_t position, int64_t rows) {
  const int64_t queries = spec.heads * spec.head_dim, keys = spec.kv_heads * spec.head_dim;
  Work work;
  double weights = 0;  // that each row is multiplied with
  for (const LayerSpec& layer : spec.layers) {
    const int64_t feed_forward = 3 * spec.hidden * layer.intermediate;
    weights += static_cast<double>(spec.hidden * (2 * queries + 2 * keys + layer.experts) +
                                   feed_forward * (1 + layer.top_k));
    double seen = 0;  // tokens, by all rows together
    for (int64_t p = position; p < position + rows; ++p) {
      seen += static_cast<double>(layer.chunk > 0 ? p % layer.chunk + 1 : p + 1);
    }
    work.operations += 4.0 * static_cast<double>(queries) * seen;
    const int64_t first = layer.chunk > 0 ? position / layer.chunk * layer.chunk : 0;
    work.cache_bytes += 2.0 * 2.0 * static_cast<double>(keys * (position + rows - first));
  }
  work.operations += 2.0 * weights * static_cast<double>(rows);
  work.operations += 2.0 * static_cast<double>(spec.vocab_size * spec.hidden);
  return work;
}

KvGeometry geometry_of(const ModelSpec& spec) {
  KvGeometry geometry{{DType::kBF16, spec.kv_heads, spec.head_dim}, {}};
  for (const LayerSpec& layer : spec.layers) geometry.chunk.push_back(layer.chunk);
  return geometry;
}

int64_t experts_of(const ModelSpec& spec) {
  int64_t experts = 0;
  for (const LayerSpec& layer : spec.layers) experts = std::max(experts, layer.experts);
  return experts;
}

// Of the text model, in the memory of the device that computes.
int64_t packed_bytes(const ModelSpec& spec, const QuantRecipe& recipe, int64_t host_layers) {
  ModelWeights weights;
  for (const ExpectedTensor& tensor : expected_tensors(spec, usual_prefixes(spec), weights)) {
    tensor.place->dtype = DType::kBF16;
    tensor.place->data = &weights;  // anything: nothing is read
    tensor.place->rank = static_cast<int>(tensor.shape.size());
    std::copy(tensor.shape.begin(), tensor.shape.end(), tensor.place->shape.begin());
  }
  const PackedBytes bytes = packed_bytes_of(spec, weights, recipe);
  int64_t device = bytes.text_packed;
  int64_t largest = 0;
  for (const auto& [layer, experts] : bytes.experts) {
    if (host_layers-- <= 0) break;
    device -= experts.bytes;
    largest = std::max(largest, experts.largest);
  }
  device += MoeWeights::kSentMatrices * largest;
  return device;
}

// With `experts` experts, or if that is 0 with all, halved until they fit into `budget` bytes.
ModelSpec fitting_spec(const std::string& shape, int64_t layers, int64_t experts, int64_t vocab,
                       const QuantRecipe& recipe, int64_t host_layers, int64_t budget) {
  const auto spec_with = [&](int64_t made) {
    return published_spec(shape, {.layers = layers, .experts = made, .vocab = vocab});
  };
  const int64_t published = experts_of(spec_with(0));
  if (experts > published) {
    fail(ErrorCode::kInvalidRequest, "[model] --experts is ", experts, ", and these layers of ",
         shape, " have ", published);
  }
  ModelSpec spec = spec_with(experts);
  while (experts == 0 && packed_bytes(spec, recipe, host_layers) > budget && experts_of(spec) > 1) {
    spec = spec_with(experts_of(spec) / 2);
  }
  if (packed_bytes(spec, recipe, host_layers) > budget) {
    fail(ErrorCode::kOutOfMemory, "[model] ", layers, " layers of ", shape,
         published > 0 ? " with " + std::to_string(experts_of(spec)) + " experts" : "", " need ",
         gib(packed_bytes(spec, recipe, host_layers)), ", and ", gib(budget),
         " is free for weights; ask for fewer --layers or --experts");
  }
  return spec;
}

// Sequences of a model, computed with random tokens.
class Runner {
 public:
  Runner(const ModelSpec& spec, Backend& backend, TextModel& model, int64_t depth)
      : spec_(spec),
        backend_(backend),
        model_(model),
        kv_(geometry_of(spec), make_memory_tier(backend, backend.device_memory().value_or(0))),
        host_(static_cast<size_t>(spec.vocab_size)) {
    logits_ = backend.allocate(host_.size() * sizeof(float));
    start_ = kv_.create();
    // Zero keys and values: attention takes the same time over any.
    for (int64_t left = depth; left > 0;) {
      const KvStore::Append append{start_, std::min({left, kv_.room(start_), kBatchRows})};
      const KvStore::Plan plan = kv_.plan({&append, 1});
      kv_.apply(plan);
      kv_.commit(plan);
      left -= append.tokens;
    }
  }

  // One token more of each of `sequences` copies of the start, `tokens` times.
  void decode(int64_t tokens, int64_t sequences) {
    std::vector<KvStore::Append> appends;
    for (int64_t i = 0; i < sequences; ++i) appends.push_back({kv_.fork(start_), 1});
    std::vector<int32_t> ids(appends.size()), last(appends.size());
    std::iota(last.begin(), last.end(), 0);
    std::mt19937 random(1);
    std::uniform_int_distribution<int32_t> draw(0, static_cast<int32_t>(spec_.vocab_size) - 1);
    const Buffer buffer =
        backend_.allocate(ids.size() * static_cast<size_t>(spec_.vocab_size) * sizeof(float));
    const Rows logits(buffer.floats(), sequences, spec_.vocab_size);
    std::vector<float> host(ids.size() * static_cast<size_t>(spec_.vocab_size));
    for (int64_t done = 0; done < tokens; ++done) {
      for (int32_t& id : ids) id = draw(random);
      std::vector<TextBatch::Segment> segments;
      for (const KvStore::Append& append : appends)
        segments.push_back({append.sequence, kv_.length(append.sequence), 1});
      const KvStore::Plan plan = kv_.plan(appends);
      kv_.apply(plan);
      model_.forward({ids, segments, {}, last}, kv_, logits, {});
      backend_.to_host(host.data(), logits);
      kv_.commit(plan);
    }
    for (const KvStore::Append& append : appends) kv_.release(append.sequence);
  }

  // `tokens` more of a copy of the start, `rows` in a pass.
  void prefill(int64_t tokens, int64_t rows) {
    const KvStore::Sequence sequence = kv_.fork(start_);
    std::mt19937 random(1);
    std::uniform_int_distribution<int32_t> draw(0, static_cast<int32_t>(spec_.vocab_size) - 1);
    for (int64_t done = 0; done < tokens;) {
      const KvStore::Append append{sequence, std::min({tokens - done, kv_.room(sequence), rows})};
      std::vector<int32_t> ids(static_cast<size_t>(append.tokens));
      for (int32_t& id : ids) id = draw(random);
      const TextBatch::Segment segment{sequence, kv_.length(sequence), append.tokens};
      const auto last = static_cast<int32_t>(append.tokens - 1);
      const KvStore::Plan plan = kv_.plan({&append, 1});
      kv_.apply(plan);
      const Rows logits(logits_.floats(), 1, spec_.vocab_size);
      model_.forward({ids, {&segment, 1}, {}, {&last, 1}}, kv_, logits, {});
      backend_.to_host(host_.data(), logits);
      kv_.commit(plan);
      done += append.tokens;
    }
    kv_.release(sequence);
  }

 private:
  const ModelSpec& spec_;
  Backend& backend_;
  TextModel& model_;
  KvStore kv_;
  KvStore::Sequence start_ = 0;
  Buffer logits_;
  std::vector<float> host_;  // the logits
};

struct Phase {
  std::string name;
  int64_t tokens, rows;  // of each sequence, and in one pass
  int64_t sequences;
  std::function<void()> run;
  std::vector<double> seconds;
};

void print_profile(Profile& profile, std::span<const Phase> phases, const std::string& device,
                   bool json) {
  Report report;
  report.fact("device", device);
  profile.take();
  for (const Phase& phase : phases) {
    phase.run();
    const auto times = profile.take();
    double seconds = 0;
    for (const auto& [kernel, time] : times) seconds += time.seconds;
    for (const auto& [kernel, time] : times)
      report.row({{"phase", phase.name},
                  {"kernel", kernel},
                  {"calls", time.calls},
                  {"us each", 1e6 * time.seconds / static_cast<double>(time.calls)},
                  {"% of the phase", 100 * time.seconds / seconds}});
  }
  report.print(std::cout, json);
}

}  // namespace

int run_model(int argc, char** argv) {
  const Arguments arguments(
      "model",
      {{"shape", "NAME", "scout, maverick or guard (default scout)"},
       {"layers", "N", "layers made (default 4)"},
       {"experts", "N", "experts made (default: all, halved until they fit)"},
       {"dtype", "NAME", "bf16, or what weights are quantised to (default bf16)"},
       {"prompt", "N", "tokens of the prompt (default 512)"},
       {"tokens", "N", "tokens decoded (default 64)"},
       {"sequences", "N", "that are decoded together (default 1)"},
       {"depth", "N", "tokens already in the cache before either (default 0)"},
       {"vocab", "N", "tokens of the vocabulary made (default 2048 of 202048)"},
       {"batch", "N", "tokens of the prompt in one pass (default 512)"},
       {"device", "NAME", "cpu (default), cuda or cuda:N, where matrices of one shape are equal"},
       {"host-experts", "N", "first layers whose experts a GPU leaves to the host (default 0)"},
       {"threads", "N", "compute threads (default: the usable cores)"},
       {"isa", "NAME", "instruction set (default: the best)"},
       {"rounds", "N", "rounds of which the medians are taken (default 3)"},
       {"profile", nullptr, "time each kernel of the first GPU instead"},
       {"json", nullptr, "print JSON"}},
      argc, argv);
  if (arguments.wants_help()) {
    std::cout << arguments.help();
    return 0;
  }
  const std::string shape = arguments.text("shape", "scout");
  const std::string dtype = arguments.text("dtype", "bf16");
  const QuantRecipe recipe(dtype == "bf16" ? "" : dtype, {});
  const int64_t layers = arguments.integer("layers", 4, 1, 48);
  const int64_t prompt = arguments.integer("prompt", 512, 1, 1 << 20);
  const int64_t tokens = arguments.integer("tokens", 64, 1, 1 << 20);
  const int64_t depth = arguments.integer("depth", 0, 0, (1 << 20) - 1);
  const int64_t sequences = arguments.integer("sequences", 1, 1, 1024);
  const int64_t rounds = arguments.integer("rounds", 3, 1, 1000);
  const auto threads = static_cast<int>(arguments.integer("threads", 0, 1, ThreadPool::kMaxLanes));
  const std::string isa = arguments.text("isa", "");

  const int64_t vocab = arguments.integer("vocab", kVocabulary, 1, kWholeVocabulary);
  const int64_t batch = arguments.integer("batch", kBatchRows, 1, 1 << 20);

  std::unique_ptr<Profile> profile;
  if (arguments.has("profile")) profile = std::make_unique<Profile>();
  const std::unique_ptr<Backend> device =
      profile ? profile->make_backend(0)
              : make_backend(arguments.text("device", "cpu"), {isa, threads});
  const bool on_gpu = device->device_memory().has_value();
  const int64_t host_layers = on_gpu ? arguments.integer("host-experts", 0, 0, 48) : 0;
  // Beside the weights: what the ceilings read, the block of random numbers, activations and cache.
  const int64_t beside = on_gpu ? int64_t{8} << 30 : Ceilings::kBytes + (int64_t{1} << 30);
  const ModelSpec spec = fitting_spec(
      shape, layers, arguments.integer("experts", 0, 1, 128), vocab, recipe, host_layers,
      device->device_memory().value_or(available_memory_bytes()) - beside);
  CloningBackend cloning(*device);
  RoutingProbe backend(on_gpu ? cloning : *device);
  auto source = std::make_unique<SyntheticWeights>(spec);
  // Read where it lies, so copied from the block, which goes.
  const TensorRef& table = source->weights().text.embed;
  const std::vector<uint16_t> embedding(
      static_cast<const uint16_t*>(table.data),
      static_cast<const uint16_t*>(table.data) + table.elements());
  TensorRef embedding_view = table;
  embedding_view.data = embedding.data();
  SyntheticLoader loader(backend, recipe, *source);
  std::unique_ptr<TextModel> model;
  const double load_seconds = seconds_of([&] {
    model = std::make_unique<TextModel>(
        spec, embedding_view,
        load_text(spec, source->weights().text, loader, host_layers, /*send_experts=*/true),
        backend);
  });
  source.reset();
  MachineCeilings ceilings(*device, isa, threads);
  Runner runner(spec, backend, *model, depth);

  backend.watch(true);
  runner.prefill(prompt, batch);
  backend.watch(false);
  const int64_t seen = backend.experts_seen();
  const int64_t moe_layers = std::count_if(spec.layers.begin(), spec.layers.end(),
                                           [](const LayerSpec& layer) { return layer.moe; });
  const int64_t made = moe_layers * experts_of(spec);
  Phase phases[] = {
      {"prefill", prompt, batch, 1, [&] { runner.prefill(prompt, batch); }, {}},
      {"decode", tokens, 1, sequences, [&] { runner.decode(tokens, sequences); }, {}}};
  if (profile) {
    print_profile(*profile, phases, device->description(), arguments.has("json"));
    return 0;
  }
  for (int64_t round = 0; round < rounds; ++round) {
    for (Phase& phase : phases) {
      ceilings.sample();
      phase.seconds.push_back(seconds_of(phase.run));
    }
  }

  Report report;
  report.fact("processor", processor_name());
  report.fact("device", device->description());
  report.fact("memory GiB", static_cast<double>(total_memory_bytes()) / (1 << 30));
  report.fact("rounds", rounds);
  report.fact("shape", shape + ", random weights, " + dtype);
  report.fact("layers made", layers);
  report.fact("vocabulary made", std::to_string(vocab) + " of " + std::to_string(kWholeVocabulary));
  if (moe_layers > 0) {
    const int64_t published = experts_of(published_spec(shape, {.layers = layers, .vocab = vocab}));
    report.fact("experts made", std::to_string(experts_of(spec)) + " of " +
                                    std::to_string(published) + " in " +
                                    std::to_string(moe_layers) + " layers");
    if (host_layers > 0)
      report.fact("layers whose experts the host has",
                  std::to_string(std::min(host_layers, moe_layers)) + ", on " +
                      device->host().description());
    report.fact("experts the prompt used", std::to_string(seen) + " of " + std::to_string(made));
  }
  report.fact("weights GiB", static_cast<double>(loader.bytes()) / (1 << 30));
  report.fact("packing seconds", load_seconds);
  report.fact("peak resident GiB, ceilings' 1 GiB included",
              static_cast<double>(peak_resident_bytes()) / (1 << 30));
  report.fact("read GB/s", ceilings.read() / 1e9);
  report.fact("bf16 peak GFLOP/s", ceilings.bf16() / 1e9);
  for (const Phase& phase : phases) {
    double operations = 0, bytes = 0;
    for (int64_t done = 0; done < phase.tokens; done += phase.rows) {
      const int64_t rows = std::min(phase.rows, phase.tokens - done);
      const Work work = forward_work(spec, depth + done, rows);
      operations += work.operations * static_cast<double>(phase.sequences);
      // A prompt reads every expert that it uses once, a token its top_k (one) in each layer, and
      // tokens of several sequences as many as they hit, if they choose evenly.
      const auto experts = static_cast<double>(std::max<int64_t>(1, experts_of(spec)));
      const double hit =
          experts * (1 - std::pow(1 - 1 / experts, static_cast<double>(phase.sequences)));
      const double routed = static_cast<double>(loader.routed_bytes()) /
                            static_cast<double>(std::max<int64_t>(1, made));
      bytes += work.cache_bytes * static_cast<double>(phase.sequences) +
               static_cast<double>(loader.bytes() - loader.routed_bytes()) +
               routed * (phase.rows == 1 ? hit * static_cast<double>(moe_layers)
                                         : static_cast<double>(seen));
    }
    const double seconds = median(phase.seconds);
    const double made_tokens = static_cast<double>(phase.tokens * phase.sequences);
    report.row(
        {{"phase", phase.name},
         {"tokens", phase.tokens},
         {"depth", depth},
         {"sequences", phase.sequences},
         {"tokens/s", made_tokens / seconds},
         {"best", made_tokens / *std::min_element(phase.seconds.begin(), phase.seconds.end())},
         {"GB/s", bytes / seconds / 1e9},
         {"% of read", 100 * bytes / seconds / ceilings.read()},
         {"GFLOP/s", operations / seconds / 1e9},
         {"% of bf16 peak", 100 * operations / seconds / ceilings.bf16()}});
  }
  report.print(std::cout, arguments.has("json"));
  return 0;
}

}  // namespace puna::bench
