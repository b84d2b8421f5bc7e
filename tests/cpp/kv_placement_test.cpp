// The store and attention together: equal bits wherever keys and values lie. Lives of sequences,
// cut, forked, taken back, saved, resumed, in memory or streamed from disk through a small ring,
// against one that computes everything at once in memory.
#include "kv_attention_fixture.h"

namespace {

using namespace fixture;

KvOutputs all_at_once(Backend& backend, const KvShape& shape, const Text& text) {
  KvStore store(shape.geometry, make_ram_tier(0));
  const auto s = store.create();
  KvOutputs outputs(shape.layers());
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
  const KvShape shape = random_kv_shape(random);
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
    KvOutputs outputs;
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
        std::vector<KvOutputs*> outputs;
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
    const KvOutputs expected = all_at_once(*same_isa[0].backend, shape, life.text);
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
