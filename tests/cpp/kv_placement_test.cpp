// The store and attention together: equal bits wherever keys and values lie. Lives of sequences,
// cut, forked, taken back, saved, resumed, in memory or streamed from disk through a small ring,
// against one that computes everything at once in memory.
#include <numeric>

#include "backend_fixture.h"
#include "kv_fixture.h"

namespace {

using namespace fixture;

struct Shape {
  int64_t heads;
  KvGeometry geometry;

  int64_t head_dim() const { return geometry.layout.head_dim; }
  int64_t cols() const { return (heads + 2 * geometry.layout.kv_heads) * head_dim(); }
  int64_t out() const { return heads * head_dim(); }
  size_t layers() const { return geometry.chunk.size(); }
};

Shape random_shape(std::mt19937& random) {
  const KvSeal seals[] = {KvSeal::kNone, KvSeal::kInt8, KvSeal::kInt4};
  const int64_t dims[] = {8, 16, 20}, kv_heads = 1 + random() % 2;
  const std::vector<int64_t> chunks[] = {{512, 0, 0}, {0, 256, 512, 0}, {768, 0}, {1024, 256, 0}};
  return {kv_heads * static_cast<int64_t>(1 + random() % 3),
          {{random() % 3 ? DType::kBF16 : DType::kF32, kv_heads, dims[random() % 3]},
           chunks[random() % 4],
           seals[random() % 3]}};
}

// Projected rows that follow from the text up to there, as those of a model do.
void project(const Shape& shape, const Text& text, int64_t layer, int64_t first, int64_t count,
             float* out) {
  uint64_t key = static_cast<uint64_t>(layer) * 77;
  for (int64_t t = 0; t < first + count; ++t) {
    key = mixed(key ^ static_cast<uint64_t>(text.tokens[t]));
    if (t < first) continue;
    for (int64_t c = 0; c < shape.cols(); ++c)
      *out++ = static_cast<float>(
                   static_cast<int32_t>(mixed(key + static_cast<uint64_t>(c)) >> 40) - (1 << 23)) *
               0x1p-22f;
  }
}

// A forward pass of all layers; appends the rows of each member's outputs, layer by layer.
void forward(const Shape& shape, KvStore& store, Backend& backend,
             const std::vector<Member>& members,
             std::vector<std::vector<std::vector<float>>*> outputs) {
  std::vector<KvStore::Append> appends;
  for (const Member& member : members)
    appends.push_back({member.sequence, member.tokens, member.text->view()});
  const KvStore::Plan plan = store.plan(appends);
  store.apply(plan);
  std::vector<int64_t> layers(shape.layers());
  std::iota(layers.begin(), layers.end(), int64_t{0});
  store.begin_pass(layers);
  for (const int64_t layer : layers) {
    AttentionInput input;
    std::vector<AttentionSegment> segments;
    std::vector<float> qkv;
    int64_t rows = 0;
    for (const Member& member : members) {
      const KvView view = store.view(member.sequence, layer);
      AttentionSegment& segment = segments.emplace_back();
      segment.first_row = rows;
      segment.rows = member.tokens;
      segment.position = store.length(member.sequence);
      segment.first_position = view.first_position;
      segment.sealed = view.sealed;
      segment.stream = view.stream;
      segment.first_open = view.first_open;
      segment.open = view.open;
      rows += member.tokens;
      qkv.resize(static_cast<size_t>(rows * shape.cols()));
      project(shape, *member.text, layer, segment.position, member.tokens,
              qkv.data() + segment.first_row * shape.cols());
    }
    input.qkv = {qkv.data(), rows, shape.cols()};
    input.heads = shape.heads;
    input.layout = store.geometry().layout;
    if (store.geometry().global(static_cast<size_t>(layer)))
      input.sealed = store.geometry().sealed_layout();
    input.segments = segments;
    std::vector<float> out(static_cast<size_t>(rows * shape.out()));
    backend.attention({out.data(), rows, shape.out()}, input);
    for (size_t m = 0; m < members.size(); ++m) {
      std::vector<float>& to = (*outputs[m])[static_cast<size_t>(layer)];
      const auto first = out.begin() + segments[m].first_row * shape.out();
      to.insert(to.end(), first, first + segments[m].rows * shape.out());
    }
  }
  store.commit(plan);
}

using Outputs = std::vector<std::vector<float>>;  // [layer][row * out()]

Outputs all_at_once(Backend& backend, const Shape& shape, const Text& text) {
  KvStore store(shape.geometry, make_ram_tier(0));
  const auto s = store.create();
  Outputs outputs(shape.layers());
  Text so_far;
  while (so_far.tokens.size() < text.tokens.size()) {
    const auto done = static_cast<int64_t>(so_far.tokens.size());
    const int64_t taken = std::min(store.room(s), static_cast<int64_t>(text.tokens.size()) - done);
    so_far.tokens.assign(text.tokens.begin(), text.tokens.begin() + done + taken);
    forward(shape, store, backend, {{s, &so_far, taken}}, {&outputs});
  }
  return outputs;
}

// Lives of sequences that follow from the seed; how many bytes were streamed.
int64_t live(unsigned seed) {
  int64_t streamed = 0;
  std::mt19937 random(seed);
  const Shape shape = random_shape(random);
  auto& same_isa = subjects()[random() % subjects().size()];
  const TemporaryDirectory directory;
  KvStoreOptions options;
  if (random() % 4) options.disk = directory.path("cache");
  options.read_ahead = 1;
  options.poison = true;
  const auto page =
      static_cast<int64_t>(std::max(shape.geometry.sealed_bytes(), shape.geometry.open_bytes()));
  const auto layers = static_cast<int64_t>(shape.layers());
  const int64_t budget = options.disk.empty() ? 0 : (40 + layers * (25 + random() % 20)) * page;
  auto store = std::make_unique<KvStore>(shape.geometry, make_ram_tier(budget), options);

  struct Life {
    Text text;
    Outputs outputs;
  };
  std::map<KvStore::Sequence, Life> lives;
  lives[store->create()].outputs.resize(shape.layers());
  for (int step = 0; step < 14; ++step) {
    auto chosen = std::next(lives.begin(), static_cast<int64_t>(random() % lives.size()));
    const auto s = chosen->first;
    switch (random() % 7) {
      case 0:
        if (lives.size() < 3) {
          const Life copy = chosen->second;
          lives[store->fork(s)] = copy;
        }
        break;
      case 1: {
        const int64_t back = store->restorable(s, store->length(s) - random() % 900);
        store->truncate(s, back);
        chosen->second.text.cut(back);
        for (auto& rows : chosen->second.outputs)
          rows.resize(static_cast<size_t>(back * shape.out()));
        break;
      }
      case 2: {
        // Through a session, in another store.
        if (chosen->second.text.tokens.empty()) break;
        const std::string path = directory.path("s" + std::to_string(step));
        Life life = std::move(chosen->second);
        store->save(s, path, life.text.view());
        streamed += store->statistics().read_bytes;
        lives.clear();
        store.reset();
        store = std::make_unique<KvStore>(shape.geometry, make_ram_tier(budget), options);
        const auto opened = store->open(path, random() % 2);
        CHECK(opened.tokens == life.text.tokens);
        lives[opened.sequence] = std::move(life);
        break;
      }
      default: {
        // One piece of each of some sequences.
        std::vector<Member> members;
        std::vector<Outputs*> outputs;
        const int64_t most = random() % 2 ? 700 : 40;
        for (auto& [sequence, life] : lives) {
          if (sequence != s && random() % 2) continue;
          const auto wanted = static_cast<int64_t>(1 + random() % most);
          const int64_t tokens = std::min(store->room(sequence), wanted);
          life.text.grow(tokens, random() % 3);
          members.push_back({sequence, &life.text, tokens});
          outputs.push_back(&life.outputs);
        }
        forward(shape, *store, *same_isa[random() % 3].backend, members, outputs);
      }
    }
  }
  for (const auto& [sequence, life] : lives) {
    const Outputs expected = all_at_once(*same_isa[0].backend, shape, life.text);
    for (size_t layer = 0; layer < shape.layers(); ++layer) {
      CHECK_EQ(life.outputs[layer].size(), expected[layer].size());
      check_same_bits("seed " + std::to_string(seed) + ", layer " + std::to_string(layer),
                      life.outputs[layer].data(), expected[layer].data(),
                      std::min(life.outputs[layer].size(), expected[layer].size()));
    }
  }
  return streamed + store->statistics().read_bytes;
}

}  // namespace

TEST(equal_bits_wherever_keys_and_values_lie) {
  int64_t streamed = 0;
  for (unsigned seed = 1; seed <= 24; ++seed) streamed += live(seed);
  CHECK(streamed > 0);
}

NIGHTLY_TEST(equal_bits_in_thousands_of_lives) {
  for (unsigned seed = 1; seed <= 2000; ++seed) live(seed);
}
