// The KV store where attention reads a CUDA device's memory, on the emulator: equal bits wherever
// pages lie, in that memory, in the host's or in files, while the device does everything as late as
// it may. Most tokens are appended by the CPU, which writes the same pages: the emulator takes its
// time.
#include <array>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "cuda_subjects.h"
#include "kv/tiers/device.h"
#include "kv/tiers/pinned.h"
#include "kv_attention_fixture.h"

using namespace fixture;

namespace {

struct Late {
  Late() { emulator::set_late(true); }
  ~Late() { emulator::set_late(false); }
};

std::unique_ptr<Backend> device(int ordinal) {
  return make_cuda_backend(emulator::device_table(), ordinal, make_cpu_backend({"", 1}));
}

Backend& cpu() {
  static const auto backend = make_cpu_backend({"", 1});
  return *backend;
}

// Heads that the tensor cores take, too.
KvShape random_shape(std::mt19937& random) {
  KvShape shape = random_kv_shape(random);
  if (random() % 2) shape.geometry.layout = {DType::kBF16, shape.geometry.layout.kv_heads, 64};
  return shape;
}

// Bytes of pages of the device, 0: no bound, and of the host, beside the ring of pages from files.
std::unique_ptr<KvStore> make_store(Backend& backend, const KvShape& shape, int64_t on_device,
                                    int64_t on_host, KvStoreOptions options) {
  options.poison = true;
  options.read_ahead = 1;
  KvStoreOptions no_disk = options;
  no_disk.disk = "";
  const KvStore sizes(shape.geometry, make_device_tier(backend, 0), std::move(no_disk));
  on_host += sizes.read_ahead_bytes();
  return std::make_unique<KvStore>(shape.geometry, make_device_tier(backend, on_device),
                                   std::move(options), make_pinned_tier(backend, on_host));
}

// Appends to the text, and to the sequence, by the CPU, as long as there is memory; how much.
int64_t grow(const KvShape& shape, KvStore& store, Backend& backend, KvStore::Sequence sequence,
             Text& text, int64_t tokens, uint64_t seed) {
  int64_t done = 0;
  while (done < tokens) {
    const int64_t before = store.length(sequence);
    const int64_t taken = std::min({tokens - done, store.room(sequence), int64_t{400}});
    text.grow(taken, seed);
    try {
      // Copies of pages may be on their way.
      const KvStore::Append append{sequence, taken, text.view()};
      store.apply(store.plan({&append, 1}));
      backend.to_host(nullptr, {});
      forward(shape, store, cpu(), {{sequence, &text, taken}}, {}, 0);
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kOutOfMemory) throw;
      text.cut(before);
      return done;
    }
    done += taken;
  }
  return done;
}

// What files of a directory hold, by their names.
std::map<std::string, std::string> contents(const std::string& path) {
  std::map<std::string, std::string> all;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(path)) {
    if (!entry.is_regular_file()) continue;
    std::ostringstream text;
    text << std::ifstream(entry.path(), std::ios::binary).rdbuf();
    all[std::filesystem::relative(entry.path(), path).string()] = text.str();
  }
  return all;
}

struct Streamed {
  int64_t read = 0;       // bytes from files
  int64_t elsewhere = 0;  // chunks after steps that are not in the device's memory
  int64_t pieces = 0;     // that were compared
};

// Lives of sequences that follow from the seed, and of twins all of whose pages are in the device's
// memory.
void live(unsigned seed, Streamed& streamed) {
  std::mt19937 random(seed);
  const Late late;
  const KvShape shape = random_shape(random);
  const auto backend = device(static_cast<int>(random() % 4));
  const TemporaryDirectory directory;
  KvStoreOptions options;
  if (random() % 2) options.disk = directory.path("cache");
  const auto open = static_cast<int64_t>(shape.geometry.open_bytes());
  const auto sealed = static_cast<int64_t>(shape.geometry.sealed_bytes());
  const auto layers = static_cast<int64_t>(shape.layers());
  const int64_t on_device =
      layers * ((6 + random() % 6) * open + static_cast<int64_t>(4 + random() % 8) * sealed);
  const int64_t on_host = layers * (options.disk.empty() ? 200 : random() % 30) * sealed;
  const auto fresh = [&] { return make_store(*backend, shape, on_device, on_host, options); };
  auto store = fresh();
  const auto twins = make_store(*backend, shape, 0, int64_t{1} << 30, {});

  struct Life {
    Text text;
    KvStore::Sequence twin;
  };
  std::map<KvStore::Sequence, Life> lives;
  lives[store->create()].twin = twins->create();
  for (int step = 0; step < 16; ++step) {
    const auto chosen = std::next(lives.begin(), static_cast<int64_t>(random() % lives.size()));
    const auto s = chosen->first;
    Life& life = chosen->second;
    switch (random() % 8) {
      case 0:
        if (lives.size() < 3) lives[store->fork(s)] = {life.text, twins->fork(life.twin)};
        break;
      case 1: {
        const int64_t back = store->restorable(s, store->length(s) - random() % 900);
        store->truncate(s, back);
        twins->truncate(life.twin, back);
        life.text.cut(back);
        break;
      }
      case 2: {
        // Through a session, in another store.
        if (life.text.tokens.empty()) break;
        const std::string path = directory.path(std::to_string(step));
        store->save(s, path, life.text.view());
        CHECK_EQ(store->verify(path, Verify::kFull).good_tokens, std::ssize(life.text.tokens));
        const Life kept = std::move(life);
        streamed.read += store->statistics().read_bytes;
        lives.clear();
        store.reset();
        store = fresh();
        const auto opened = store->open(path, random() % 2);
        CHECK(opened.tokens == kept.text.tokens);
        lives[opened.sequence] = kept;
        break;
      }
      case 3:
      case 4: {
        const int64_t tokens = 200 + random() % 1500;
        Text same = life.text;
        const uint64_t seed_of_text = random() % 3;
        const int64_t done = grow(shape, *store, *backend, s, life.text, tokens, seed_of_text);
        grow(shape, *twins, *backend, life.twin, same, done, seed_of_text);
        break;
      }
      default: {
        // One piece of each of some sequences; of some rows, few or many.
        std::vector<Member> members, twin_members;
        std::vector<KvOutputs> outputs(lives.size(), KvOutputs(shape.layers())), expected = outputs;
        std::vector<KvOutputs*> to, twin_to;
        const int64_t most = random() % 3 ? 3 : 60;
        for (auto& [sequence, other] : lives) {
          if (sequence != s && random() % 2) continue;
          const auto tokens = std::min<int64_t>(store->room(sequence), 1 + random() % most);
          other.text.grow(tokens, random() % 3);
          members.push_back({sequence, &other.text, tokens});
          twin_members.push_back({other.twin, &other.text, tokens});
          to.push_back(&outputs[to.size()]);
          twin_to.push_back(&expected[twin_to.size()]);
        }
        const int64_t wanted = random() % 2 ? 1 : kAllRows;
        try {
          forward(shape, *store, *backend, members, to, wanted);
        } catch (const Error& error) {
          if (error.code() != ErrorCode::kOutOfMemory) throw;
          for (auto& [sequence, other] : lives) other.text.cut(store->length(sequence));
          break;
        }
        ++streamed.pieces;
        forward(shape, *twins, *backend, twin_members, twin_to, wanted);
        CHECK(outputs == expected);
        if (outputs != expected) std::printf("  seed %u, step %d\n", seed, step);
      }
    }
    for (const auto& [sequence, other] : lives)
      CHECK_EQ(store->length(sequence), std::ssize(other.text.tokens));
    const KvStatistics now = store->statistics();
    streamed.elsewhere += now.chunks - now.resident;
  }
  streamed.read += store->statistics().read_bytes;
}

}  // namespace

TEST(equal_bits_wherever_pages_lie) {
  Streamed streamed;
  for (unsigned seed = 1; seed <= 8; ++seed) live(seed, streamed);
  CHECK(streamed.elsewhere > 30);
  CHECK(streamed.read > 0);
  CHECK(streamed.pieces > 20);
}

NIGHTLY_TEST(equal_bits_in_hundreds_of_lives) {
  Streamed streamed;
  for (unsigned seed = 1; seed <= 300; ++seed) live(seed, streamed);
}

// More pages than the window holds, of two sequences whose streams differ; few rows and many.
TEST(pages_beyond_the_window) {
  for (const auto& [dim, seal] :
       {std::pair<int64_t, KvSeal>{64, KvSeal::kInt4}, {64, KvSeal::kNone}, {8, KvSeal::kInt8}}) {
    const Late late;
    const KvShape shape{4, {{DType::kBF16, 2, dim}, {0, 1024}, seal}};
    const auto backend = device(1);
    const TemporaryDirectory directory;
    KvStoreOptions options;
    options.disk = directory.path("cache");
    const auto sealed = static_cast<int64_t>(shape.geometry.sealed_bytes());
    const int64_t on_device = 16 * static_cast<int64_t>(shape.geometry.open_bytes()) + 14 * sealed;
    const auto store = make_store(*backend, shape, on_device, 18 * sealed, std::move(options));
    const auto twins = make_store(*backend, shape, 0, int64_t{1} << 30, {});
    Text texts[2];
    KvStore::Sequence sequences[2], others[2];
    for (int i = 0; i < 2; ++i) {
      Text same;
      sequences[i] = store->create();
      others[i] = twins->create();
      // Once, files' pages are the last that come through the window.
      const int64_t tokens = (seal == KvSeal::kNone ? 16'300 : 9'300) - 4'300 * i;
      const auto seed = static_cast<uint64_t>(i);
      CHECK_EQ(grow(shape, *store, *backend, sequences[i], texts[i], tokens, seed), tokens);
      CHECK_EQ(grow(shape, *twins, *backend, others[i], same, tokens, seed), tokens);
    }
    // Few rows and many have kernels of their own; in one call both read the streams.
    const int64_t many = dim == 64 ? 40 : 3;
    for (const auto& rows : {std::array<int64_t, 2>{1, 1}, {many, 1}}) {
      std::vector<Member> members, twin_members;
      for (int i = 0; i < 2; ++i) {
        texts[i].grow(rows[i], 5);
        members.push_back({sequences[i], &texts[i], rows[i]});
        twin_members.push_back({others[i], &texts[i], rows[i]});
      }
      std::vector<KvOutputs> got(2, KvOutputs(2)), expected(2, KvOutputs(2));
      forward(shape, *store, *backend, members, {&got[0], &got[1]});
      forward(shape, *twins, *backend, twin_members, {&expected[0], &expected[1]});
      CHECK(got == expected);
    }
    CHECK(store->statistics().read_bytes > 0);
  }
}

// What a device saves, the CPU opens, and the other way round: the files are the same.
TEST(sessions_are_the_same_files_as_the_cpus) {
  const Late late;
  for (const KvSeal seal : {KvSeal::kInt8, KvSeal::kNone}) {
    const KvShape shape{2, {{DType::kBF16, 1, 16}, {0, 512, 0}, seal}};
    const auto backend = device(0);
    const TemporaryDirectory directory;
    Text text, same;
    const auto on_device = make_store(*backend, shape, 0, int64_t{1} << 28, {});
    KvStore on_host(shape.geometry, make_ram_tier(0));
    const auto a = on_device->create(), b = on_host.create();
    const std::string first = directory.path("device"), second = directory.path("host");
    on_device->attach(a, first, {});
    on_host.attach(b, second, {});
    grow(shape, *on_device, *backend, a, text, 1700, 1);
    grow(shape, on_host, cpu(), b, same, 1700, 1);
    on_device->save(a, first, text.view());
    on_host.save(b, second, same.view());
    const auto files = contents(first);
    CHECK(files.size() >= 5);  // three chunks, a tail and the journal
    CHECK(files == contents(second));
    CHECK_EQ(on_host.open(first, false).tokens.size(), text.tokens.size());
    // Into memory that is free the pages go with the first pass, and are not read again.
    const auto opened = on_device->open(second, false);
    const auto one_more = [&] {
      KvOutputs outputs(3);
      same.grow(1, 2);
      forward(shape, *on_device, *backend, {{opened.sequence, &same, 1}}, {&outputs});
      return on_device->statistics().read_bytes;
    };
    const int64_t read = one_more();
    CHECK(one_more() == read);
  }
}

// The host's tier gives a page again only when nothing is on its way to it or from it.
TEST(pinned_pages_are_not_given_before_copies_have_ended) {
  const Late late;
  const auto backend = device(0);
  constexpr size_t kBytes = 4096;
  const auto pinned = make_pinned_tier(*backend, 2 * kBytes);
  const auto on_device = make_device_tier(*backend, 0);
  void *const first = pinned->allocate(kBytes), *const second = pinned->allocate(kBytes);
  CHECK(first != nullptr && second != nullptr && pinned->allocate(kBytes) == nullptr);
  CHECK_EQ(pinned->bytes_left(), 0);
  void* const page = on_device->allocate(kBytes);
  const std::vector<char> text(kBytes, 'x');
  on_device->from_host(page, text.data(), kBytes);
  pinned->copy(first, page, kBytes);
  pinned->free(first, kBytes);
  void* const again = pinned->allocate(kBytes);
  CHECK(again == first);
  on_device->settle();
  CHECK(std::all_of(static_cast<char*>(again), static_cast<char*>(again) + kBytes,
                    [](char c) { return c == 0; }));
  std::vector<char> read(kBytes);
  on_device->to_host(read.data(), page, kBytes);
  CHECK(read == text);
  on_device->free(page, kBytes);
}
