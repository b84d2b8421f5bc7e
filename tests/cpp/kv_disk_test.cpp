// Chunks on disk: what goes there and comes back, within which bounds, in which order, and what
// happens when the disk fails.
#include <pthread.h>

#include <algorithm>
#include <fstream>
#include <mutex>
#include <thread>

#include "kv_fixture.h"

using namespace fixture;

namespace {

// Two global layers between chunked ones; a chunk file has 2 pages of each.
constexpr KvPageLayout kLayout{DType::kBF16, 2, 8};
constexpr int64_t kUnit = 512;

KvGeometry geometry(KvSeal seal = KvSeal::kInt8) { return {kLayout, {512, 0, 512, 0}, seal}; }

int64_t unit_bytes(const KvGeometry& of) {
  return 2 * kUnit / kPageTokens * static_cast<int64_t>(of.sealed_bytes());
}
// The ring, open pages of a pass of 512, the chunk at hand and one being written.
int64_t least_memory(const KvGeometry& of) {
  return 48 * static_cast<int64_t>(of.sealed_bytes()) + 12 * static_cast<int64_t>(of.open_bytes()) +
         2 * unit_bytes(of);
}

struct Rig {
  explicit Rig(int64_t spare_units, KvSeal seal = KvSeal::kInt8, int64_t disk_budget = 0)
      : files(faults) {
    KvStoreOptions options;
    options.disk = directory.path("cache");
    options.disk_budget = disk_budget;
    options.read_ahead = 1;  // the least
    options.poison = true;
    options.files = &files;
    options.reads = [] { return make_threaded_read_queue(4); };
    const KvGeometry shape = geometry(seal);
    budget = spare_units < 0 ? 0 : least_memory(shape) + spare_units * unit_bytes(shape);
    store = std::make_unique<KvStore>(shape, make_ram_tier(budget), options);
  }
  std::vector<std::string> chunk_files() const {
    std::vector<std::string> found;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(directory.path("cache")))
      if (entry.is_regular_file() && entry.path().filename() != "lock")
        found.push_back(entry.path().string());
    return found;
  }

  std::string chunk_file(const std::string& name) const {
    return directory.path("cache/puna-0/" + name);
  }

  TemporaryDirectory directory;
  Faults faults;
  FaultyFiles files;
  int64_t budget = 0;
  std::unique_ptr<KvStore> store;
};

template <class Function>
std::string message_of(ErrorCode code, Function&& function) {
  try {
    function();
  } catch (const Error& error) {
    CHECK_EQ(static_cast<int>(error.code()), static_cast<int>(code));
    return error.what();
  }
  CHECK(false);
  return "";
}

// As long as it lives no thread can be started: each would get a stack larger than there are
// addresses.
class HugeThreads {
 public:
  HugeThreads() {
    pthread_attr_t huge;
    pthread_getattr_default_np(&before_);
    pthread_getattr_default_np(&huge);
    pthread_attr_setstacksize(&huge, size_t{1} << 50);
    CHECK_EQ(pthread_setattr_default_np(&huge), 0);
    pthread_attr_destroy(&huge);
  }
  ~HugeThreads() {
    pthread_setattr_default_np(&before_);
    pthread_attr_destroy(&before_);
  }

 private:
  pthread_attr_t before_;
};

// Reads the whole sequence, without appending anything that stays.
int64_t look(KvStore& store, KvStore::Sequence sequence, const Text& text) {
  begin_pass_of_one_more(store, sequence, text, {0, 1, 2, 3});
  return read_layer(store, {{sequence, &text, 0}}, 1) +
         read_layer(store, {{sequence, &text, 0}}, 3);
}

}  // namespace

TEST(what_exceeds_memory_streams_from_disk) {
  for (const KvSeal seal : {KvSeal::kNone, KvSeal::kInt8, KvSeal::kInt4}) {
    for (const int64_t spare : {0, 3}) {
      Rig rig(spare, seal);
      KvStore& store = *rig.store;
      const auto s = store.create();
      Text text;
      CHECK_EQ(grow(store, s, text, 20 * kUnit + 300, 1), 0);
      CHECK(store.bytes_in_use() <= rig.budget);
      store.flush(s);
      const KvStatistics now = store.statistics();
      CHECK_EQ(now.chunks, 20);
      CHECK(now.resident >= spare);
      CHECK(now.resident < 8 + spare);
      CHECK(now.read_bytes > 0);
      CHECK_EQ(rig.chunk_files().size(), size_t{20});
      CHECK_EQ(look(store, s, text), 0);
      CHECK(store.bytes_in_use() <= rig.budget);
      store.release(s);
      CHECK(rig.chunk_files().empty());  // nobody needs them
      CHECK_EQ(store.statistics().disk_bytes, 0);
    }
  }
}

TEST(a_prefix_stays_in_memory) {
  Rig rig(4);
  KvStore& store = *rig.store;
  const auto s = store.create();
  Text text;
  grow(store, s, text, 20 * kUnit, 1);
  const KvView view = store.view(s, 1);
  size_t kept = 0;
  while (kept < view.sealed.size() && view.sealed[kept]) ++kept;
  CHECK(kept >= 8);
  // And the rest is not, but for the newest chunks.
  const auto others = std::count_if(view.sealed.begin() + static_cast<ptrdiff_t>(kept),
                                    view.sealed.end(), [](void* page) { return page != nullptr; });
  CHECK(others <= 3 * kUnit / kPageTokens);
}

TEST(nothing_streams_where_memory_suffices) {
  Rig rig(-1);
  KvStore& store = *rig.store;
  const auto s = store.create();
  Text text;
  CHECK_EQ(grow(store, s, text, 10 * kUnit, 1), 0);
  store.flush(s);
  CHECK_EQ(store.statistics().read_bytes, 0);
  CHECK_EQ(store.statistics().resident, 10);
  CHECK_EQ(rig.chunk_files().size(), size_t{10});  // durable all the same
}

TEST(without_a_disk_the_budget_is_the_end) {
  const KvGeometry shape = geometry();
  KvStore store(shape, make_ram_tier(least_memory(shape)));
  const auto s = store.create();
  Text text;
  CHECK_THROWS(ErrorCode::kOutOfMemory, grow(store, s, text, 100 * kUnit, 1));
  CHECK(store.length(s) > 0);
}

TEST(forks_share_chunks_and_streams) {
  Rig rig(1);
  KvStore& store = *rig.store;
  const auto a = store.create();
  Text first;
  grow(store, a, first, 8 * kUnit, 1);
  store.flush(a);
  const int64_t memory = store.bytes_in_use(), disk = store.statistics().disk_bytes;
  const auto b = store.fork(a);
  CHECK_EQ(store.bytes_in_use(), memory);
  CHECK_EQ(store.statistics().disk_bytes, disk);
  Text second = first;
  // One pass over both: one stream, since what is missing is the same.
  first.grow(100, 2);
  second.grow(100, 3);
  int64_t read = store.statistics().read_bytes;
  CHECK_EQ(pass(store, {{a, &first, 100}, {b, &second, 100}}), 0);
  const int64_t both = store.statistics().read_bytes - read;
  const std::vector<Member> alone{{a, &first, 1}};
  first.grow(1, 2);
  read = store.statistics().read_bytes;
  CHECK_EQ(pass(store, alone), 0);
  CHECK_EQ(store.statistics().read_bytes - read, both);
  // Chunks of their own: two streams.
  grow(store, a, first, 4 * kUnit, 4);
  grow(store, b, second, 4 * kUnit, 5);
  first.grow(1, 6);
  second.grow(1, 6);
  CHECK_EQ(pass(store, {{a, &first, 1}, {b, &second, 1}}), 0);
  CHECK_EQ(pass(store, {}), 0);
  store.release(a);
  second.grow(1, 7);
  CHECK_EQ(pass(store, {{b, &second, 1}}), 0);
}

TEST(equal_texts_have_the_same_chunks) {
  Rig rig(-1);
  KvStore& store = *rig.store;
  const auto a = store.create(), b = store.create();
  Text first, second;
  grow(store, a, first, 3 * kUnit, 1);
  grow(store, b, second, 2 * kUnit, 1);
  grow(store, b, second, kUnit, 9);
  store.flush(a);
  store.flush(b);
  CHECK_EQ(store.statistics().chunks, 4);
  CHECK_EQ(rig.chunk_files().size(), size_t{4});
  // A picture in one of them makes another text.
  const auto c = store.create();
  Text third;
  third.images.push_back({10, 5, 77});
  grow(store, c, third, kUnit, 1);
  CHECK_EQ(store.statistics().chunks, 5);
  CHECK_EQ(look(store, a, first) + look(store, b, second) + look(store, c, third), 0);
}

TEST(chunks_stay_in_memory_that_has_become_free) {
  Rig rig(6);
  KvStore& store = *rig.store;
  const auto a = store.create(), b = store.create();
  Text first, second;
  grow(store, a, first, 8 * kUnit, 1);
  grow(store, b, second, 8 * kUnit, 2);
  store.flush(a);
  store.flush(b);
  CHECK(store.statistics().resident < 12);
  store.release(a);
  CHECK_EQ(look(store, b, second), 0);
  CHECK_EQ(look(store, b, second), 0);
  const int64_t resident = store.statistics().resident, read = store.statistics().read_bytes;
  CHECK(resident >= 5);
  CHECK_EQ(look(store, b, second), 0);
  CHECK_EQ(store.statistics().resident, resident);
  CHECK(store.statistics().read_bytes - read <= (8 - resident) * unit_bytes(store.geometry()));
  CHECK(store.bytes_in_use() <= rig.budget);
}

TEST(going_back_over_chunks) {
  Rig rig(0);
  KvStore& store = *rig.store;
  const auto s = store.create();
  Text text;
  grow(store, s, text, 10 * kUnit + 100, 1);
  CHECK_EQ(store.restorable(s, 10 * kUnit + 50), 10 * kUnit + 50);
  CHECK_EQ(store.restorable(s, 9 * kUnit + 300), 9 * kUnit);
  CHECK_EQ(store.restorable(s, 7 * kUnit), 7 * kUnit);
  store.truncate(s, 7 * kUnit);
  text.cut(7 * kUnit);
  CHECK_EQ(look(store, s, text), 0);
  CHECK_EQ(grow(store, s, text, 3 * kUnit, 2), 0);
  CHECK_EQ(look(store, s, text), 0);
  store.truncate(s, 0);
  CHECK_EQ(store.length(s), 0);
}

TEST(going_back_into_a_chunk_in_memory) {
  // All layers global: the pages are there, whatever the chunk.
  for (const KvSeal seal : {KvSeal::kNone, KvSeal::kInt8}) {
    KvStore store({kLayout, {0, 0}, seal}, make_ram_tier(0));
    const auto s = store.create();
    Text text;
    grow(store, s, text, 8192 + 300, 1, 2048);
    CHECK_EQ(store.statistics().chunks, 1);
    const auto other = store.fork(s);
    const int64_t wanted = 5000, got = store.restorable(s, wanted);
    CHECK_EQ(got, seal == KvSeal::kNone ? wanted : 4864);
    store.truncate(s, got);
    Text cut = text;
    cut.cut(got);
    CHECK_EQ(grow(store, s, cut, 4000, 2), 0);
    CHECK_EQ(grow(store, other, text, 10, 1), 0);
  }
}

TEST(streams_hold_as_many_pages_as_they_promise) {
  Rig rig(0);
  KvStore& store = *rig.store;
  const auto s = store.create();
  Text text;
  grow(store, s, text, 40 * kUnit, 1);
  text.grow(1, 1);
  CHECK_EQ(pass(store, {{s, &text, 1}}, KvStream::kHeld), 0);
  text.grow(1, 1);
  CHECK_EQ(pass(store, {{s, &text, 1}}, 1), 0);
  // More than the ring has: slower, not stuck.
  text.grow(1, 1);
  CHECK_EQ(pass(store, {{s, &text, 1}}, 70), 0);
}

TEST(pages_are_overwritten_once_they_were_passed) {
  Rig rig(0);
  KvStore& store = *rig.store;
  const auto s = store.create();
  Text text;
  grow(store, s, text, 20 * kUnit, 1);
  begin_pass_of_one_more(store, s, text, {1});
  const KvView view = store.view(s, 1);
  int64_t first = 0;
  while (view.sealed[static_cast<size_t>(first)]) ++first;
  const auto* page = static_cast<const unsigned char*>(view.stream->wait(first));
  const std::vector<unsigned char> before(page, page + 100);
  view.stream->passed(first + 2);
  CHECK(std::memcmp(page, before.data(), 100) != 0);
}

TEST(the_next_layer_is_read_behind_the_one_at_hand) {
  Rig rig(0);
  KvStore& store = *rig.store;
  const auto s = store.create();
  Text text;
  grow(store, s, text, 10 * kUnit, 1);
  store.flush(s);
  std::mutex mutex;
  std::vector<std::pair<std::string, uint64_t>> order;
  rig.faults.on_read = [&](const std::string& path, uint64_t offset, size_t) {
    const std::lock_guard guard(mutex);
    order.push_back({path, offset});
  };
  const int64_t before = store.statistics().read_bytes;
  begin_pass_of_one_more(store, s, text, {0, 1, 2, 3});
  // Nothing was asked for, and the ring fills: layer 1, then layer 3.
  const int64_t missing = 10 - store.statistics().resident;
  const int64_t bytes = missing * unit_bytes(store.geometry());
  for (int i = 0; i < 2000 && store.statistics().read_bytes - before < bytes; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  CHECK_EQ(store.statistics().read_bytes - before, bytes);
  CHECK_EQ(read_layer(store, {{s, &text, 0}}, 1) + read_layer(store, {{s, &text, 0}}, 3), 0);
  rig.faults.on_read = nullptr;
}

TEST(a_layer_that_is_not_read_is_not_streamed) {
  Rig rig(0);
  KvStore& store = *rig.store;
  const auto s = store.create();
  Text text;
  grow(store, s, text, 10 * kUnit, 1);
  const int64_t before = store.statistics().read_bytes;
  begin_pass_of_one_more(store, s, text, {0, 1, 2});
  CHECK_EQ(read_layer(store, {{s, &text, 0}}, 1), 0);
  CHECK(store.view(s, 3).stream == nullptr);
  CHECK_EQ(store.statistics().read_bytes - before,
           (10 - store.statistics().resident) * unit_bytes(store.geometry()) / 2);
}

TEST(a_pass_that_leaves_pages_out_does_not_read_them) {
  Rig rig(0);
  KvStore& store = *rig.store;
  const auto s = store.create();
  Text text;
  grow(store, s, text, 40 * kUnit, 1);
  store.flush(s);
  const std::vector<uint64_t> keys = page_keys(text);
  const KvSealedLayout layout = store.geometry().sealed_layout();
  const size_t first_word = layout.key_scale_offset(0) / 8;
  const size_t words = layout.key_scale_bytes() * static_cast<size_t>(layout.kv_heads) / 8;
  const size_t page_bytes = store.geometry().sealed_bytes();

  // What is read once is known from then on, within the budget.
  int64_t unknown = 0;
  begin_pass_of_one_more(store, s, text, {1, 3}, true);
  for (const int64_t layer : {1, 3}) {
    const KvView view = store.view(s, layer);
    CHECK_EQ(view.key_scales.size(), view.sealed.size());
    unknown += std::count(view.key_scales.begin(), view.key_scales.end(), nullptr);
    CHECK_EQ(read_layer(store, {{s, &text, 0}}, layer), 0);
  }
  CHECK_EQ(unknown, 2 * 80);
  CHECK(store.bytes_in_use() <= rig.budget);
  for (const int64_t step : {1, 3, 200}) {
    const int64_t before = store.statistics().read_bytes;
    int64_t streamed = 0, wanted_pages = 0;
    begin_pass_of_one_more(store, s, text, {1, 3}, true);
    for (const int64_t layer : {1, 3}) {
      const KvView view = store.view(s, layer);
      std::vector<uint8_t> wanted(view.sealed.size()), others(view.sealed.size());
      for (size_t i = 0; i < view.sealed.size(); ++i) {
        CHECK_EQ(view.key_scales[i] == nullptr, view.sealed[i] != nullptr);
        if (view.sealed[i] != nullptr) continue;
        ++streamed;
        (static_cast<int64_t>(i) % step == 0 ? wanted : others)[i] = 1;
        const auto* scales = static_cast<const uint64_t*>(view.key_scales[i]);
        for (size_t w = 0; w < words; ++w)
          CHECK_EQ(scales[w],
                   mixed(keys[i] + static_cast<uint64_t>(layer) * 7919 + first_word + w));
      }
      // In a second round what the first left out, but for every fifth.
      for (size_t i = 0; i < others.size(); i += 5) others[i] = 0;
      for (const auto* round : {&wanted, &others}) {
        view.stream->restart(*round);
        for (size_t i = 0; i < round->size(); ++i) {
          if ((*round)[i] == 0) continue;
          ++wanted_pages;
          CHECK(page_is(view.stream->wait(static_cast<int64_t>(i)), page_bytes, layer, keys[i]));
          view.stream->passed(static_cast<int64_t>(i) + 1);
        }
      }
    }
    CHECK(streamed > 2 * 50);
    CHECK_EQ(look(store, s, text), 0);
    CHECK(store.bytes_in_use() <= rig.budget);
    // Beside them the rings that were full before anything was known, and what look() read.
    const int64_t read = store.statistics().read_bytes - before;
    const auto bytes = static_cast<int64_t>(page_bytes);
    CHECK(read >= (wanted_pages + streamed) * bytes);
    CHECK(read <= (wanted_pages + streamed + 2 * 48) * bytes);
  }
  // Memory that a longer text needs is given back for it.
  CHECK_EQ(grow(store, s, text, 10 * kUnit, 2), 0);
  CHECK(store.bytes_in_use() <= rig.budget);
  CHECK_EQ(look(store, s, text), 0);
}

TEST(the_disk_budget_is_kept) {
  const int64_t file = static_cast<int64_t>(page_file_bytes(chunk_sections(geometry())));
  Rig rig(-1, KvSeal::kInt8, 3 * file + 100);
  KvStore& store = *rig.store;
  const auto s = store.create();
  Text text;
  grow(store, s, text, 4 * kUnit - 1, 1);
  CHECK_THROWS(ErrorCode::kOutOfMemory, grow(store, s, text, 1, 1));
  text.cut(4 * kUnit - 1);
  CHECK_EQ(store.length(s), 4 * kUnit - 1);
  const auto other = store.create();
  Text second;
  CHECK_EQ(grow(store, other, second, 100, 2), 0);  // needs none
  store.release(other);
  store.truncate(s, 2 * kUnit);
  text.cut(2 * kUnit);
  CHECK_EQ(grow(store, s, text, kUnit, 3), 0);
  CHECK(store.statistics().disk_bytes <= 3 * file);
}

TEST(a_full_disk_is_reported_and_got_over) {
  Rig rig(-1);
  KvStore& store = *rig.store;
  const auto s = store.create();
  Text text;
  grow(store, s, text, 2 * kUnit, 1);
  store.flush(s);
  rig.faults.space = 5000;
  grow(store, s, text, kUnit, 1);
  const std::string told = message_of(ErrorCode::kStorage, [&] { store.flush(s); });
  CHECK(told.find("No space left") != std::string::npos);
  CHECK_EQ(store.length(s), 3 * kUnit);
  // Still full: the next pass is refused, and nothing has changed.
  message_of(ErrorCode::kStorage, [&] {
    store.flush(s);
    grow(store, s, text, 10, 1);
  });
  text.cut(store.length(s));
  // Up to the last durable chunk all is well.
  const auto fork = store.fork(s);
  store.truncate(fork, 2 * kUnit);
  Text cut = text;
  cut.cut(2 * kUnit);
  CHECK_EQ(grow(store, fork, cut, 100, 3), 0);
  // The disk has room again: the write is done over.
  rig.faults.space = -1;
  try {
    store.flush(s);  // may tell of the last try
  } catch (const Error&) {
  }
  store.flush(s);
  CHECK_EQ(grow(store, s, text, 10, 1), 0);
  for (const std::string& path : rig.chunk_files()) CHECK(!path.ends_with(".tmp"));
}

TEST(memory_that_waits_for_a_full_disk_gives_up_with_its_reason) {
  Rig rig(0);
  KvStore& store = *rig.store;
  rig.faults.space = 0;
  const auto s = store.create();
  Text text;
  const std::string told =
      message_of(ErrorCode::kStorage, [&] { grow(store, s, text, 50 * kUnit, 1); });
  CHECK(told.find("No space left") != std::string::npos);
  rig.faults.space = -1;
  store.truncate(s, 0);
  text.cut(0);
  CHECK_EQ(grow(store, s, text, 20 * kUnit, 2), 0);
}

// What keeps a chunk from being written is told later, of one that could not even be handed over,
// too: the tokens are there.
TEST(a_thread_that_the_system_refuses_is_asked_for_again) {
  Rig rig(-1);
  KvStore& store = *rig.store;
  const auto a = store.create(), b = store.create();
  Text first, second;
  grow(store, a, first, kUnit - 1, 1);
  grow(store, b, second, kUnit - 1, 2);
  first.grow(1, 1);
  second.grow(1, 2);
  {
    const HugeThreads none;
    CHECK_EQ(pass(store, {{a, &first, 1}, {b, &second, 1}}), 0);
    CHECK_EQ(store.length(a), kUnit);
    CHECK_EQ(store.length(b), kUnit);
    message_of(ErrorCode::kDevice, [&] { store.flush(b); });
    message_of(ErrorCode::kDevice, [&] { grow(store, a, first, 10, 1); });
    first.cut(kUnit);
  }
  message_of(ErrorCode::kDevice, [&] { store.flush(a); });  // of the last try
  store.flush(a);
  store.flush(b);
  CHECK_EQ(rig.chunk_files().size(), size_t{2});
  CHECK_EQ(grow(store, a, first, 10, 1) + grow(store, b, second, 10, 2), 0);
}

TEST(failed_syncs_make_nothing_durable) {
  Rig rig(-1);
  KvStore& store = *rig.store;
  rig.faults.fail_sync = true;
  const auto s = store.create();
  Text text;
  grow(store, s, text, kUnit, 1);
  CHECK_THROWS(ErrorCode::kStorage, store.flush(s));
  rig.faults.fail_sync = false;
}

TEST(reads_that_fail_end_the_pass_and_nothing_else) {
  Rig rig(0);
  KvStore& store = *rig.store;
  const auto s = store.create();
  Text text;
  grow(store, s, text, 16 * kUnit, 1);
  for (const int64_t good : {0, 1, 5}) {
    rig.faults.good_reads = good;
    const std::string told = message_of(ErrorCode::kStorage, [&] { look(store, s, text); });
    CHECK(told.find("cannot be read") != std::string::npos);
    CHECK_EQ(store.length(s), 16 * kUnit);
  }
  rig.faults.good_reads = -1;
  CHECK_EQ(look(store, s, text), 0);  // it was the moment's
  CHECK_EQ(grow(store, s, text, 600, 1), 0);
}

// What happens to a file behind the store's back.
void damage(const std::function<void(const std::string&)>& harm, ErrorCode code,
            const char* expected) {
  Rig rig(0);
  KvStore& store = *rig.store;
  const auto s = store.create();
  Text text;
  grow(store, s, text, 12 * kUnit, 1);
  store.flush(s);
  const KvView view = store.view(s, 1);
  int64_t gone = 0;
  while (view.sealed[static_cast<size_t>(gone)]) ++gone;
  const int64_t chunk = gone / 2;
  Text prefix = text;
  prefix.cut((chunk + 1) * kUnit);
  KvIdentity identity{{}, geometry()};
  Digest name = identity.root();
  for (int64_t i = 0; i <= chunk; ++i)
    name = chain_hash(name, text.view(), i * kUnit, (i + 1) * kUnit);
  harm(rig.chunk_file(hex(name)));
  CHECK_EQ(store.readable(s), store.length(s));
  const auto first = store.fork(s), second = store.fork(s);
  const std::string told = message_of(code, [&] { look(store, s, text); });
  CHECK(told.find(expected) != std::string::npos);
  if (told.find(expected) == std::string::npos) std::fprintf(stderr, "%s\n", told.c_str());
  // Whoever computes the chunk again has it written again, for all.
  Text again = text;
  CHECK_EQ(store.readable(first), chunk * kUnit);
  store.truncate(first, chunk * kUnit);
  again.cut(chunk * kUnit);
  CHECK_EQ(grow(store, first, again, kUnit + 100, 1), 0);
  CHECK_EQ(store.readable(second), store.length(second));
  CHECK_EQ(look(store, second, text), 0);
  store.flush(first);
  CHECK(std::filesystem::exists(rig.chunk_file(hex(name))));
  grow(store, first, again, 6 * kUnit, 7);  // which presses it out again
  CHECK_EQ(look(store, second, text), 0);
  CHECK_EQ(store.readable(second), store.length(second));
  store.release(first);
  store.release(second);
  // Before the damage the sequence is as good as ever.
  store.truncate(s, chunk * kUnit);
  text.cut(chunk * kUnit);
  CHECK_EQ(grow(store, s, text, 2 * kUnit, 5), 0);
}

// Writes a byte and gives the file its old time again, as a failing disk would.
void flip(const std::string& path, uint64_t offset) {
  const auto time = std::filesystem::last_write_time(path);
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(static_cast<std::streamoff>(offset));
  const char byte = static_cast<char>(file.get() ^ 4);
  file.seekp(static_cast<std::streamoff>(offset));
  file.put(byte);
  file.close();
  std::filesystem::last_write_time(path, time);
}

TEST(damaged_files_are_found_out) {
  damage([](const std::string& path) { flip(path, 4096 + 17); }, ErrorCode::kSessionMismatch,
         "does not have the checksum");
  damage([](const std::string& path) { flip(path, std::filesystem::file_size(path) - 1); },
         ErrorCode::kSessionMismatch, "does not have the checksum");
  damage([](const std::string& path) { std::filesystem::remove(path); }, ErrorCode::kStorage,
         "No such file");
  damage([](const std::string& path) { std::filesystem::resize_file(path, 8192); },
         ErrorCode::kSessionMismatch, "changed or replaced");
  damage(
      [](const std::string& path) {
        std::filesystem::copy_file(path, path + "x");
        std::filesystem::rename(path + "x", path);
      },
      ErrorCode::kSessionMismatch, "changed or replaced");
}

TEST(what_a_killed_process_left_is_removed) {
  const TemporaryDirectory directory;
  KvStoreOptions options;
  options.disk = directory.path("cache");
  options.read_ahead = 1;
  std::filesystem::create_directories(directory.path("cache/puna-0"));
  std::ofstream(directory.path("cache/puna-0/lock")) << "";
  std::ofstream(directory.path("cache/puna-0/old-chunk")) << "left over";
  {
    KvStore first(geometry(), make_ram_tier(0), options);
    CHECK(!std::filesystem::exists(directory.path("cache/puna-0/old-chunk")));
    KvStore second(geometry(), make_ram_tier(0), options);  // beside a live one
    CHECK(std::filesystem::exists(directory.path("cache/puna-1/lock")));
  }
  CHECK(std::filesystem::is_empty(directory.path("cache")));
}

// Random lives of several sequences on real files through whatever the kernel reads best with,
// against the plainest model: their texts.
TEST(random_lives_on_disk) {
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    const TemporaryDirectory directory;
    std::mt19937 random(static_cast<unsigned>(seed));
    KvStoreOptions options;
    options.disk = directory.path("cache");
    options.read_ahead = 1;
    options.poison = true;
    const KvGeometry shape = geometry(seed % 2 ? KvSeal::kInt4 : KvSeal::kNone);
    const int64_t budget = 2 * least_memory(shape);
    KvStore store(shape, make_ram_tier(budget), options);
    std::map<KvStore::Sequence, Text> texts;
    texts[store.create()];
    int64_t wrong = 0;
    for (int step = 0; step < 120; ++step) {
      auto chosen = std::next(texts.begin(), static_cast<int64_t>(random() % texts.size()));
      const auto s = chosen->first;
      switch (random() % 8) {
        case 0:
          if (texts.size() < 5) {
            const Text copy = chosen->second;
            texts[store.fork(s)] = copy;
          }
          break;
        case 1: {
          const int64_t length = store.restorable(s, static_cast<int64_t>(random() % 9000));
          store.truncate(s, length);
          chosen->second.cut(length);
          break;
        }
        case 2:
          if (texts.size() > 1) {
            store.release(s);
            texts.erase(chosen);
          }
          break;
        case 3: {
          // All at once.
          std::vector<Member> members;
          for (auto& [sequence, text] : texts) {
            const int64_t tokens = std::min<int64_t>(store.room(sequence), 1 + random() % 60);
            text.grow(tokens, random() % 3);
            members.push_back({sequence, &text, tokens});
          }
          wrong += pass(store, members);
          break;
        }
        default:
          wrong += grow(store, s, chosen->second, 1 + random() % 1500, random() % 3);
      }
      CHECK(store.bytes_in_use() <= budget);
    }
    for (const auto& [s, text] : texts) {
      CHECK_EQ(store.length(s), static_cast<int64_t>(text.tokens.size()));
      wrong += look(store, s, text);
    }
    CHECK_EQ(wrong, 0);
    CHECK(store.statistics().read_bytes > 0);
  }
}
