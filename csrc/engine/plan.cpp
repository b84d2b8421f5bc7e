#include "engine/plan.h"

#include <algorithm>
#include <array>
#include <set>
#include <sstream>

#include "base/error.h"
#include "engine/factory.h"
#include "image/tiling.h"
#include "model/open_model.h"
#include "platform/system.h"

namespace puna {
namespace {

// Memory left to everything else when what is free sets the bound: this share of what the weights
// leave is used.
constexpr double kShareOfFreeMemory = 0.9;
constexpr size_t kMostRemedies = 3;

// Of a row at one expert: its input, gate and up, and what they become.
int64_t expert_floats(const ModelSpec& spec, const LayerSpec& layer) {
  return spec.hidden + 3 * layer.intermediate;
}

// The activations of a forward pass: those of TextModel, and what a backend keeps of one layer's
// feed-forward block, all as fp32, beside the logits of one row.
int64_t scratch_bytes(const ModelSpec& spec, int64_t rows) {
  const int64_t attention = 2 * spec.hidden + (2 * spec.heads + 2 * spec.kv_heads) * spec.head_dim;
  int64_t feed_forward = 0;
  for (const LayerSpec& layer : spec.layers) {
    const int64_t experts = 1 + (layer.moe ? layer.top_k : 0);  // the shared one sees it, too
    feed_forward = std::max(feed_forward, experts * expert_floats(spec, layer));
  }
  const int64_t floats = rows * (attention + feed_forward) + spec.vocab_size;
  return floats * static_cast<int64_t>(sizeof(float));
}

// Of the rows of pictures that are kept, at most.
int64_t picture_bytes(const ModelSpec& spec) {
  const auto largest =
      static_cast<size_t>((kMaxTiles + 1) * spec.vision->tokens_per_tile() * spec.hidden) *
      sizeof(float);
  return static_cast<int64_t>(
      std::min(kKeptPictures * largest, std::max(kKeptPictureBytes, largest)));
}

// What the host needs beside the weights to compute a layer's routed experts for a GPU: rows that
// come, what is kept of each at its experts, and rows that go.
int64_t host_scratch_bytes(const ModelSpec& spec, int64_t rows) {
  int64_t floats = 0;
  for (const LayerSpec& layer : spec.layers)
    if (layer.moe)
      floats =
          std::max(floats, spec.hidden + layer.top_k * (expert_floats(spec, layer) + spec.hidden));
  return rows * floats * static_cast<int64_t>(sizeof(float));
}

int64_t global_layers(const KvGeometry& geometry) {
  return std::count(geometry.chunk.begin(), geometry.chunk.end(), 0);
}

int64_t layers_with_experts(const ModelSpec& spec) {
  return std::count_if(spec.layers.begin(), spec.layers.end(),
                       [](const LayerSpec& layer) { return layer.moe; });
}

struct ExpertsOfLayer {
  LayerExpertBytes all;
  int64_t active = 0;  // bytes that one token reads
};

// Of the layers that have routed experts, in order.
std::vector<ExpertsOfLayer> experts_by_layer(const ModelSpec& spec, const PackedBytes& sizes) {
  std::vector<ExpertsOfLayer> layers;
  for (size_t l = 0; l < spec.layers.size(); ++l) {
    if (!spec.layers[l].moe) continue;
    const auto found = sizes.experts.find(static_cast<int64_t>(l));
    const LayerExpertBytes all = found == sizes.experts.end() ? LayerExpertBytes() : found->second;
    layers.push_back({all, all.bytes / spec.layers[l].experts * spec.layers[l].top_k});
  }
  return layers;
}

// Of so many bytes that weights leave.
int64_t usable(int64_t left, bool given) {
  const auto share = kShareOfFreeMemory * static_cast<double>(std::max<int64_t>(left, 0));
  return given ? left : static_cast<int64_t>(share);
}

bool host_suffices(const Plan& plan) { return plan.host_needed <= plan.host_memory; }

std::string joined(const std::vector<std::string>& parts) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : ", ") + part;
  return text;
}

}  // namespace

int64_t read_ahead_for(int64_t sealed_bytes) {
  return std::min(KvStoreOptions().read_ahead, sealed_bytes);
}

std::string in_words(int64_t bytes) {
  constexpr std::array<const char*, 5> kUnits{"bytes", "KiB", "MiB", "GiB", "TiB"};
  double amount = static_cast<double>(bytes);
  size_t unit = 0;
  for (; amount >= 1024 && unit + 1 < kUnits.size(); ++unit) amount /= 1024;
  std::ostringstream text;
  text.precision(amount < 1000 ? 3 : 4);
  text << amount << ' ' << kUnits[unit];
  return text.str();
}

KvFormat kv_format(const std::string& wanted, DType weights) {
  const bool wide = weights == DType::kF32 || weights == DType::kF16;
  if (wanted == "auto") return kv_format(wide ? "fp32" : "bf16", weights);
  if (wanted == "fp32") return {wanted, DType::kF32, KvSeal::kNone};
  if (wanted == "bf16") return {wanted, DType::kBF16, KvSeal::kNone};
  if (wanted == "int8") return {wanted, DType::kBF16, KvSeal::kInt8};
  if (wanted == "int4") return {wanted, DType::kBF16, KvSeal::kInt4};
  fail(ErrorCode::kInvalidRequest, "kv is '", wanted,
       "'; it must be 'auto', 'bf16', 'fp32', 'int8' or 'int4'");
}

KvGeometry kv_geometry(const ModelSpec& spec, const KvFormat& format) {
  KvGeometry geometry{{format.open, spec.kv_heads, spec.head_dim}, {}, format.seal};
  for (const LayerSpec& layer : spec.layers) geometry.chunk.push_back(layer.chunk);
  return geometry;
}

Planner::Planner(const ModelSpec& spec, const ModelWeights& weights,
                 std::optional<PackedBytes> packed, std::optional<int64_t> device_memory)
    : spec_(spec),
      weights_(weights),
      packed_(packed),
      on_gpu_(device_memory.has_value()),
      free_memory_(device_memory.value_or(available_memory_bytes())),
      batch_rows_(device_memory ? kDeviceBatchRows : kBatchRows) {}

const PackedBytes& Planner::weights(const LoadOptions& options) const {
  if (packed_) return *packed_;
  const auto found = sizes_.find(options.quant);
  if (found != sizes_.end()) return found->second;
  const QuantRecipe recipe(options.quant, options.quant_overrides);
  return sizes_.emplace(options.quant, packed_bytes_of(spec_, weights_, recipe)).first->second;
}

Plan Planner::evaluate(const LoadOptions& options, int64_t disk) const {
  if (!on_gpu_) return evaluate(options, disk, 0);
  const int64_t layers = layers_with_experts(spec_);
  if (options.device_experts == kAllExperts) return evaluate(options, disk, 0);
  if (options.device_experts != kExpertsThatFit)
    return evaluate(options, disk, layers - options.device_experts);
  // As few as leave room for the context.
  LoadOptions with_context = options;
  if (options.context == 0)
    with_context.context = std::min(spec_.max_position, kContextBeforeExperts);
  int64_t host_layers = 0;
  for (int64_t end = layers; host_layers < end;) {
    const int64_t middle = host_layers + (end - host_layers) / 2;
    const Plan plan = evaluate(with_context, disk, middle);
    if (plan.context <= plan.largest_context)
      end = middle;
    else
      host_layers = middle + 1;
  }
  return evaluate(options, disk, host_layers);
}

Plan Planner::evaluate(const LoadOptions& options, int64_t disk, int64_t host_layers) const {
  const Plan plan = evaluate(options, disk, host_layers, true);
  if (plan.context <= plan.largest_context || plan.expert_window_bytes == 0) return plan;
  return evaluate(options, disk, host_layers, false);
}

Plan Planner::evaluate(const LoadOptions& options, int64_t disk, int64_t host_layers,
                       bool with_window) const {
  const PackedBytes& sizes = weights(options);
  const KvFormat format = kv_format(options.kv, stored_type(weights_.text));
  const KvGeometry geometry = kv_geometry(spec_, format);
  const KvStore kv(geometry, make_memory_tier(0));

  Plan plan;
  plan.kv = format.name;
  plan.batch_rows = batch_rows_;
  plan.max_context = spec_.max_position;
  plan.text_bytes = sizes.text_packed;
  plan.vision_bytes = options.vision && spec_.vision ? sizes.vision_packed : 0;
  plan.memory_given = options.memory > 0;
  plan.memory_budget = plan.memory_given ? options.memory : free_memory_;
  plan.disk_budget = disk;
  plan.host_layers = host_layers;
  plan.kv_offloads = on_gpu_ && (options.kv_host || disk > 0);
  place_experts(plan, options, with_window);
  const int64_t weight_bytes =
      plan.text_bytes + plan.vision_bytes - plan.host_expert_bytes + plan.expert_window_bytes;
  const int64_t room = usable(plan.memory_budget - weight_bytes, plan.memory_given);

  const auto pass = [this](int64_t tokens) { return std::min(tokens, batch_rows_); };
  const int64_t pictures = plan.vision_bytes > 0 ? picture_bytes(spec_) : 0;
  const auto scratch = [&](int64_t tokens) {
    return scratch_bytes(spec_, pass(tokens)) + pictures;
  };
  const auto footprint = [&](int64_t tokens) { return kv.footprint(tokens, pass(tokens)); };
  const auto page = static_cast<int64_t>(geometry.sealed_bytes());
  const int64_t layers = global_layers(geometry);
  const auto sealed = [&](int64_t tokens) { return layers * (tokens / kPageTokens) * page; };
  // What is on its way from files, those of a disk or of a session that is opened, takes memory of
  // the host; to a GPU, some of its own, too.
  const auto ring = [&](int64_t tokens) {
    const bool read = disk > 0 || (geometry.unit() > 0 && tokens >= geometry.unit());
    return read ? kv.read_ahead_bytes(read_ahead_for(sealed(tokens))) : 0;
  };
  const auto ahead_of = [&](int64_t tokens) {
    return !on_gpu_ ? ring(tokens) : plan.kv_offloads ? KvStream::kHeld * page : 0;
  };
  const auto host_beside = [&](int64_t tokens) {
    int64_t experts = 0;
    if (host_layers > 0)
      experts = plan.host_expert_bytes + host_scratch_bytes(spec_, pass(tokens)) +
                (plan.expert_window_bytes > 0 ? MoeWeights::kStagedBytes : 0);
    if (!plan.kv_offloads) return experts;
    return experts + ring(tokens) + (disk > 0 ? KvStore::kMostCopied * kv.chunk_file_bytes() : 0);
  };
  const auto host_room = [&](int64_t tokens) {
    if (!plan.kv_offloads) return int64_t{0};
    const bool given = options.host_memory > 0;
    return std::max<int64_t>(0, usable(plan.host_memory - host_beside(tokens), given));
  };
  // Of so many bytes, a GPU leaves a whole number of layers of chunks to the host, and may have to
  // leave one that it has the most part of the room for.
  const auto offloaded = [&](int64_t bytes) {
    const int64_t layer = std::max<int64_t>(geometry.unit() / kPageTokens * page, 1);
    return bytes <= 0 ? 0 : (bytes + layer - 1) / layer * layer + layer;
  };
  const auto fits = [&](int64_t tokens) {
    const KvFootprint cache = footprint(tokens);
    const int64_t cache_room = room - scratch(tokens), ahead = ahead_of(tokens);
    if (cache.memory <= cache_room - (on_gpu_ ? 0 : ahead)) return true;
    if (cache.least_memory > cache_room - ahead) return false;
    if (disk > 0) return cache.disk <= disk;
    return plan.kv_offloads && offloaded(cache.memory - (cache_room - ahead)) <= host_room(tokens);
  };
  int64_t too_long = spec_.max_position + 1;
  while (too_long - plan.largest_context > 1) {
    const int64_t middle = plan.largest_context + (too_long - plan.largest_context) / 2;
    (fits(middle) ? plan.largest_context : too_long) = middle;
  }
  plan.context = options.context > 0 ? options.context : std::max<int64_t>(plan.largest_context, 1);

  const KvFootprint cache = footprint(plan.context);
  const int64_t ahead = ahead_of(plan.context);
  KvGeometry local = geometry;
  std::erase(local.chunk, 0);
  plan.scratch_bytes = scratch(plan.context);
  plan.kv_local_bytes = KvStore(local, make_memory_tier(0)).bytes_for(plan.context);
  plan.kv_sealed_bytes = sealed(plan.context);
  plan.kv_open_bytes = cache.memory - plan.kv_local_bytes - plan.kv_sealed_bytes;
  plan.kv_bytes_per_token = layers * page / kPageTokens;

  // A GPU's window is beside its pages, while the host's ring is of the pages' memory.
  const int64_t cache_room = room - plan.scratch_bytes - ahead;
  plan.kv_room = on_gpu_ ? cache_room : cache_room + ahead;
  const bool fits_whole = cache.memory <= (on_gpu_ ? cache_room + ahead : cache_room);
  if (on_gpu_ && fits_whole) plan.kv_room = std::max(plan.kv_room, cache.memory);
  // A window that would take more than what it makes room for is of no use.
  const bool spills = !fits_whole && (on_gpu_ ? plan.kv_offloads : disk > 0) &&
                      (!on_gpu_ || cache.least_memory + ahead < cache.memory);
  plan.kv_memory_bytes = spills ? std::max(cache_room, cache.least_memory) : cache.memory;
  plan.kv_disk_bytes = plan.disk_needed = spills && disk > 0 ? cache.disk : 0;
  plan.memory_needed = weight_bytes + plan.scratch_bytes + (spills || !on_gpu_ ? ahead : 0) +
                       (spills ? cache.least_memory : cache.memory);
  plan.kv_host_room = on_gpu_ ? host_room(plan.context) + ring(plan.context) : 0;
  const int64_t elsewhere = cache.memory - plan.kv_memory_bytes;
  plan.host_needed = host_beside(plan.context);
  if (on_gpu_ && spills) {
    const int64_t needed = offloaded(elsewhere);
    plan.kv_host_bytes = disk > 0 ? std::min(elsewhere, host_room(plan.context)) : elsewhere;
    if (disk == 0) plan.host_needed += needed;
    plan.step_link_bytes = elsewhere;
  }
  plan.step_disk_bytes = elsewhere - plan.kv_host_bytes;
  plan.step_memory_bytes += plan.kv_memory_bytes;
  plan.fits = plan.context <= plan.largest_context && host_suffices(plan);
  return plan;
}

// What lies where, and what a token reads of the weights.
void Planner::place_experts(Plan& plan, const LoadOptions& options, bool with_window) const {
  plan.on_gpu = on_gpu_;
  if (plan.host_layers > 0 || plan.kv_offloads)
    plan.host_memory = options.host_memory > 0 ? options.host_memory : available_memory_bytes();
  plan.step_memory_bytes = plan.text_bytes;
  for (const ExpertsOfLayer& layer : experts_by_layer(spec_, weights(options))) {
    const bool on_host = plan.expert_layers++ < plan.host_layers;
    plan.step_memory_bytes -= on_host ? layer.all.bytes : layer.all.bytes - layer.active;
    if (!on_host) continue;
    plan.host_expert_bytes += layer.all.bytes;
    if (with_window && layer.all.quantized)
      plan.expert_window_bytes =
          std::max(plan.expert_window_bytes, MoeWeights::kSentMatrices * layer.all.largest);
    plan.step_host_bytes += layer.active;
  }
}

// All sets of changes but a shorter context, and what would be needed then.
std::vector<Planner::Choice> Planner::choices(const LoadOptions& options, const Plan& plan) const {
  std::vector<std::string> formats{""}, quants{""};
  if (plan.kv != "int8" && plan.kv != "int4") formats.emplace_back("int8");
  if (plan.kv != "int4") formats.emplace_back("int4");
  if (!packed_ && options.quant != "int4") {
    if (options.quant != "int8") quants.emplace_back("int8");
    quants.emplace_back("int4");
  }
  constexpr int64_t kAnyDisk = int64_t{1} << 60;  // what is needed is said
  const bool experts_fixed = on_gpu_ && options.device_experts != kExpertsThatFit;
  // None more, a GPU's host, or a disk.
  enum Offload { kAsIs, kHost, kDisk };
  std::vector<Offload> offloads{kAsIs};
  if (on_gpu_ && !plan.kv_offloads) offloads.push_back(kHost);
  if (plan.disk_budget == 0) offloads.push_back(kDisk);
  std::vector<Choice> all;
  for (const bool leave_experts : {true, false}) {
    if (leave_experts && !experts_fixed) continue;
    for (const bool drop_vision : {false, true}) {
      if (drop_vision && plan.vision_bytes == 0) continue;
      for (const std::string& quant : quants) {
        for (const Offload offload : offloads) {
          for (const std::string& kv : formats) {
            Choice& choice = all.emplace_back();
            LoadOptions changed = options;
            changed.context = plan.context;
            if (leave_experts) {
              changed.device_experts = kExpertsThatFit;
              choice.changes.emplace_back("experts='auto'");
            }
            if (!kv.empty()) {
              changed.kv = kv;
              choice.changes.push_back("kv='" + kv + "'");
            }
            if (offload == kHost) {
              changed.kv_host = true;
              choice.changes.emplace_back("kv_offload='host'");
            }
            if (offload == kDisk) choice.changes.emplace_back("kv_offload='disk:DIR'");
            if (!quant.empty()) {
              changed.quant = quant;
              choice.changes.push_back("quant='" + quant + "'");
            }
            if (drop_vision) {
              changed.vision = false;
              choice.changes.emplace_back("vision=False");
            }
            choice.plan = evaluate(changed, offload == kDisk ? kAnyDisk : plan.disk_budget);
          }
        }
      }
    }
  }
  return all;
}

std::vector<Remedy> Planner::remedies(const LoadOptions& options, const Plan& plan) const {
  std::vector<Remedy> found;
  std::set<std::string> kinds;  // of changes: a second one of a kind is no other way
  const auto add = [&](std::vector<std::string> changes, const Plan& result) {
    if (!result.fits) changes.push_back("memory=" + std::to_string(result.memory_needed));
    std::string kind;
    for (const std::string& change : changes) kind += change.substr(0, change.find('=') + 1);
    if (found.size() < kMostRemedies && kinds.insert(kind).second)
      found.push_back({joined(changes), result.memory_needed, result.disk_needed});
  };
  if (plan.largest_context > 0) {
    LoadOptions shorter = options;
    shorter.context = plan.largest_context;
    const Plan result = evaluate(shorter, plan.disk_budget);
    if (result.fits) add({"context=" + std::to_string(plan.largest_context)}, result);
  }
  // Those that change least first.
  std::vector<Choice> all = choices(options, plan);
  std::stable_sort(all.begin(), all.end(), [](const Choice& a, const Choice& b) {
    return a.changes.size() < b.changes.size();
  });
  for (const Choice& choice : all)
    if (choice.plan.fits) add(choice.changes, choice.plan);
  // With more memory: as it is, with the best of the single changes, and with all that helps.
  for (const size_t most : {all.back().changes.size(), size_t{1}, size_t{0}}) {
    const Choice* least = nullptr;
    for (const Choice& choice : all)
      if (!choice.plan.fits && host_suffices(choice.plan) && choice.changes.size() <= most &&
          (least == nullptr || choice.plan.memory_needed < least->plan.memory_needed))
        least = &choice;
    if (least != nullptr) add(least->changes, least->plan);
  }
  return found;
}

Plan Planner::plan(const LoadOptions& options, int64_t disk) const {
  if (options.context > spec_.max_position) {
    fail(ErrorCode::kContextOverflow, {.asked = options.context, .limit = spec_.max_position},
         "[load] context=", options.context, " was asked for, the model allows ",
         spec_.max_position);
  }
  const int64_t layers = layers_with_experts(spec_);
  if (on_gpu_ && options.device_experts > layers)
    fail(ErrorCode::kInvalidRequest, {.param = "experts"},
         "[load] experts=", options.device_experts, " layers were asked for, the model has ",
         layers, " with routed experts");
  Plan plan = evaluate(options, disk);
  if (!plan.fits) plan.remedies = remedies(options, plan);
  return plan;
}

void require_fit(const Plan& plan) {
  if (plan.fits) return;
  const char* const owner = plan.memory_given ? "the budget given by memory= is "
                            : plan.on_gpu     ? "the GPU has free "
                                              : "the system has free ";
  // Of a GPU, what must be in its memory.
  const int64_t text = plan.text_bytes - plan.host_expert_bytes;
  const int64_t weights = text + plan.vision_bytes;
  constexpr const char* kLeaveExperts = "; experts='auto' leaves to the host what does not fit";
  const bool could_leave_experts = plan.on_gpu && plan.host_layers < plan.expert_layers;
  const std::string beside_experts =
      plan.host_layers > 0 ? " beside the routed experts of " + std::to_string(plan.host_layers) +
                                 " layers, which are left to the host,"
                           : "";
  if (weights > plan.memory_budget) {
    const bool can_leave_vision = plan.vision_bytes > 0 && text <= plan.memory_budget;
    fail(ErrorCode::kOutOfMemory, {.asked = weights, .limit = plan.memory_budget},
         "[load] the weights", beside_experts, " need ", in_words(weights), " of memory, ", owner,
         in_words(plan.memory_budget),
         can_leave_vision      ? "; vision=False leaves the vision tower on disk and needs "
         : could_leave_experts ? kLeaveExperts
                               : "; use a machine with more, or a smaller checkpoint",
         can_leave_vision ? in_words(text) : "");
  }
  const int64_t fits = plan.largest_context;
  if (plan.context > fits && plan.kv_offloads && plan.memory_needed <= plan.memory_budget &&
      plan.disk_budget == 0) {
    fail(ErrorCode::kOutOfMemory, {.asked = plan.host_needed, .limit = plan.host_memory},
         "[load] a context of ", plan.context, " tokens needs ", in_words(plan.host_needed),
         " of the host's memory for what the GPU leaves to it, ", in_words(plan.kv_host_bytes),
         " of them KV cache, and ", in_words(plan.host_memory),
         " are given or free; the largest context that fits is ", fits, ": use context=", fits,
         ", kv='int8' or 'int4', or kv_offload='disk:DIR'");
  }
  if (plan.context > fits) {
    const int64_t beside = weights + plan.scratch_bytes;
    fail(ErrorCode::kOutOfMemory, {.asked = plan.memory_needed, .limit = plan.memory_budget},
         "[load] a context of ", plan.context, " tokens needs ",
         in_words(plan.memory_needed - beside), " of KV cache beside ", in_words(weights),
         " of weights and ", in_words(plan.scratch_bytes), " of activations, and ", owner,
         in_words(plan.memory_budget), "; the largest context that fits is ", fits,
         fits > 0 ? ": use context=" : ": give more memory", fits > 0 ? std::to_string(fits) : "",
         could_leave_experts ? kLeaveExperts : "",
         plan.on_gpu && !plan.kv_offloads
             ? "; kv_offload='host' leaves to the host's memory what the GPU's does not hold"
             : "");
  }
  fail(ErrorCode::kOutOfMemory, {.asked = plan.host_needed, .limit = plan.host_memory},
       "[load] the routed experts of ", plan.host_layers, " of ", plan.expert_layers, " layers",
       plan.kv_offloads ? " and the KV cache" : "", ", which the GPU leaves to the host, need ",
       in_words(plan.host_needed), " of the system's memory, which has free ",
       in_words(plan.host_memory),
       "; a shorter context= leaves less to it, quant='int4' makes experts smaller");
}

Plan plan(const LoadOptions& options, int64_t disk, std::optional<int64_t> gpu_memory) {
  const OpenedModel model = open_model(options.path, options.mmproj);
  const Planner planner(model.spec, model.weights, model.packed_sizes(), gpu_memory);
  return planner.plan(options, disk);
}

}  // namespace puna
