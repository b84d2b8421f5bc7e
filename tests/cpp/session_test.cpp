// Sessions on disk: what is saved comes back, whatever crashes and however files are damaged.
#include <fstream>

#include "crash_files.h"
#include "kv_fixture.h"

using namespace fixture;

namespace {

constexpr KvPageLayout kLayout{DType::kBF16, 1, 8};
constexpr int64_t kUnit = 512;
const std::vector<int64_t> kLayers{0, 1, 2};

KvGeometry geometry(KvSeal seal = KvSeal::kInt8) { return {kLayout, {512, 0, 0}, seal}; }

KvStoreOptions options_for(FileSystem* files, const std::string& disk = "", uint8_t model = 1) {
  KvStoreOptions options;
  options.model.fill(model);
  options.disk = disk;
  options.read_ahead = 1;
  options.poison = true;
  options.files = files;
  if (files) options.reads = [] { return make_threaded_read_queue(2); };
  return options;
}

std::unique_ptr<KvStore> make_store(FileSystem* files, const std::string& disk = "",
                                    KvSeal seal = KvSeal::kInt8, int64_t budget = 0) {
  return std::make_unique<KvStore>(geometry(seal), make_ram_tier(budget), options_for(files, disk));
}

// Pages of all layers, the chunked one's too; nothing of what this appends stays.
int64_t look(KvStore& store, KvStore::Sequence sequence, const Text& text) {
  begin_pass_of_one_more(store, sequence, text, kLayers);
  int64_t wrong = read_layer(store, {{sequence, &text, 0}}, 1);
  wrong += read_layer(store, {{sequence, &text, 0}}, 2);
  for (const int64_t layer : kLayers) {
    const KvView view = store.view(sequence, layer);
    const auto length = static_cast<int64_t>(text.tokens.size());
    // Of the open pages, those that hold anything yet.
    const int64_t first = view.first_position / kPageTokens + view.first_open;
    for (int64_t i = 0; (first + i) * kPageTokens < length; ++i)
      wrong += !page_is(view.open[i], store.geometry().open_bytes(), layer, text.key(first + i));
  }
  return wrong;
}

// Memory that stands for a device's, or the host's; pages that were freed are overwritten.
class WatchedTier final : public KvTier {
 public:
  WatchedTier(int64_t budget, bool of_host) : of_host_(of_host), under_(make_ram_tier(budget)) {}
  const char* name() const override { return "watched"; }
  bool host_memory() const override { return of_host_; }
  void* allocate(size_t bytes) override { return under_->allocate(bytes); }
  void free(void* page, size_t bytes) override {
    std::memset(page, 0xee, bytes);
    under_->free(page, bytes);
  }
  void copy(void* to, const void* from, size_t bytes) override { under_->copy(to, from, bytes); }
  int64_t bytes_in_use() const override { return under_->bytes_in_use(); }
  int64_t bytes_left() const override { return under_->bytes_left(); }

 private:
  const bool of_host_;
  const std::unique_ptr<KvTier> under_;
};

Text text_of(const KvStore::Opened& opened) { return {opened.tokens, opened.images}; }

std::string mismatch(const std::function<void()>& function) {
  try {
    function();
  } catch (const Error& error) {
    CHECK_EQ(static_cast<int>(error.code()), static_cast<int>(ErrorCode::kSessionMismatch));
    return error.what();
  }
  CHECK(false);
  return "";
}
void check_told(const std::string& told, const char* expected) {
  CHECK(told.find(expected) != std::string::npos);
  if (told.find(expected) == std::string::npos) std::fprintf(stderr, "told: %s\n", told.c_str());
}

}  // namespace

TEST(a_saved_session_comes_back) {
  const TemporaryDirectory directory;
  for (const KvSeal seal : {KvSeal::kNone, KvSeal::kInt8, KvSeal::kInt4}) {
    for (const bool disk : {false, true}) {
      for (const int64_t length : {1, 255, 256, 511, 512, 513, 1024, 2000}) {
        const std::string path = directory.path("s");
        std::filesystem::remove_all(path);
        const std::string cache = disk ? directory.path("cache") : "";
        Text text;
        text.images = {{5, 20, 111}, {500, 30, 222}, {1990, 4, 333}};
        {
          const auto store = make_store(nullptr, cache, seal);
          const auto s = store->create();
          grow(*store, s, text, length, 1, 300);
          store->save(s, path, text.view());
          CHECK_EQ(look(*store, s, text), 0);
        }
        for (const bool resume : {false, true}) {
          const auto store = make_store(nullptr, cache, seal);
          const auto opened = store->open(path, resume);
          CHECK_EQ(store->length(opened.sequence), length);
          CHECK(opened.tokens == text.tokens);
          Text again = text_of(opened);
          CHECK_EQ(look(*store, opened.sequence, again), 0);
          CHECK_EQ(grow(*store, opened.sequence, again, 700, 2, 300), 0);
          const VerifyReport report = store->verify(path, Verify::kFull);
          CHECK_EQ(report.fault, "");
        }
      }
    }
  }
}

// Else the whole session might be gone with the power.
TEST(the_name_of_a_new_session_is_durable_too) {
  const std::pair<const char*, const char*> paths[] = {
      {"s", "."}, {"s/", "."}, {"a/s", "a"}, {"/s", "/"}, {"/a/b/s", "/a/b"}, {"./s", "."}};
  for (const auto& [path, parent] : paths) {
    CrashFiles files;
    Text text;
    const auto store = make_store(&files);
    const auto s = store->create();
    grow(*store, s, text, 300, 1, 300);
    store->save(s, path, text.view());
    CHECK(files.synced.contains(parent));
  }
}

TEST(pictures_are_part_of_the_text) {
  const TemporaryDirectory directory;
  const auto store = make_store(nullptr);
  const auto s = store->create();
  Text text;
  text.images = {{5, 20, 111, true},
                 {500, 30, 222, true},
                 {530, 4, 222, false},
                 {534, 40, 222, true},
                 {600, 9, 222, true}};
  grow(*store, s, text, 800, 1);
  store->save(s, directory.path("s"), text.view());
  const auto opened = make_store(nullptr)->open(directory.path("s"), false);
  CHECK(opened.images == text.images);
  // Another picture at the same place.
  Text other = text;
  other.images[0].key = 112;
  CHECK_THROWS(ErrorCode::kInternal, store->save(s, directory.path("t"), other.view()));
}

// Keys and values that are not the text's alone have a name of their own.
TEST(a_salted_text_shares_no_chunk) {
  const auto store = make_store(nullptr);
  const auto first = store->create(), second = store->create();
  Text text;
  text.grow(kUnit, 1);
  const Digest root = KvIdentity{options_for(nullptr).model, geometry()}.root();
  KvText salted = text.view();
  salted.salt = 7;
  CHECK(chain_hash(root, salted, 0, kUnit) != chain_hash(root, text.view(), 0, kUnit));
  for (const auto sequence : {first, second}) {
    KvStore::Append append{sequence, kUnit, text.view()};
    append.text.salt = static_cast<uint64_t>(sequence);
    const KvStore::Plan plan = store->plan({&append, 1});
    store->apply(plan);
    store->commit(plan);
  }
  CHECK_EQ(store->statistics().chunks, 2);
}

TEST(an_attached_session_grows_by_itself) {
  const TemporaryDirectory directory;
  const std::string path = directory.path("s");
  Text text;
  {
    const auto store = make_store(nullptr, directory.path("cache"));
    const auto s = store->create();
    store->attach(s, path, text.view());
    grow(*store, s, text, 3 * kUnit + 100, 1);
    store->flush(s);
    // Another store reads it meanwhile; nobody else writes it.
    CHECK_EQ(make_store(nullptr)->open(path, false).tokens.size(), size_t{3 * kUnit});
    check_told(mismatch([&] { make_store(nullptr)->open(path, true); }), "being written");
    grow(*store, s, text, kUnit, 1);
  }  // what was finished is waited for
  const auto store = make_store(nullptr);
  const auto opened = store->open(path, true);
  CHECK_EQ(opened.tokens.size(), size_t{4 * kUnit});
  Text again = text_of(opened);
  CHECK_EQ(look(*store, opened.sequence, again), 0);
  grow(*store, opened.sequence, again, kUnit + 7, 5);
  store->save(opened.sequence, path, again.view());
  const auto third = make_store(nullptr);
  CHECK_EQ(third->open(path, false).tokens.size(), size_t{5 * kUnit + 7});
}

TEST(attaching_late_writes_what_is_there) {
  const TemporaryDirectory directory;
  for (const bool disk : {false, true}) {
    const std::string path = directory.path(disk ? "a" : "b");
    const auto store = make_store(nullptr, disk ? directory.path("cache") : "");
    const auto s = store->create();
    Text text;
    grow(*store, s, text, 3 * kUnit + 100, 1);
    store->attach(s, path, text.view());
    store->flush(s);
    CHECK_EQ(make_store(nullptr)->open(path, false).tokens.size(), size_t{3 * kUnit});
  }
}

TEST(a_session_that_took_another_turn_takes_its_journal_along) {
  const TemporaryDirectory directory;
  const std::string path = directory.path("s");
  const auto store = make_store(nullptr, directory.path("cache"));
  const auto s = store->create();
  Text text;
  store->attach(s, path, text.view());
  grow(*store, s, text, 4 * kUnit, 1);
  store->flush(s);
  store->truncate(s, 2 * kUnit);
  text.cut(2 * kUnit);
  grow(*store, s, text, kUnit, 2);
  store->flush(s);
  const auto other = make_store(nullptr);
  const auto opened = other->open(path, false);
  CHECK(opened.tokens == text.tokens);
  CHECK_EQ(look(*other, opened.sequence, text), 0);
  int64_t files = 0;
  for ([[maybe_unused]] const auto& file : std::filesystem::directory_iterator(path + "/chunks"))
    ++files;
  CHECK_EQ(files, 3);
}

TEST(a_session_does_not_get_chunks_of_a_text_it_has_left) {
  const TemporaryDirectory directory;
  Faults faults;
  FaultyFiles files(faults);
  const auto store = make_store(&files, directory.path("cache"));
  const auto s = store->create();
  Text text;
  store->attach(s, directory.path("s"), text.view());
  grow(*store, s, text, kUnit, 1);
  store->flush(s);
  faults.space = 0;
  grow(*store, s, text, kUnit, 1);
  const auto fork = store->fork(s);  // holds the chunk that could not be written
  const Text left = text;
  CHECK_THROWS(ErrorCode::kStorage, store->flush(s));
  store->truncate(s, kUnit);
  text.cut(kUnit);
  faults.space = -1;
  // The first call may still tell of the last try; it is made again for the fork, not the session.
  for (int turn = 0; turn < 2; ++turn) {
    try {
      store->flush(fork);
    } catch (const Error&) {
    }
  }
  grow(*store, s, text, kUnit, 2);
  store->flush(s);
  const auto other = make_store(nullptr);
  CHECK(other->open(directory.path("s"), false).tokens == text.tokens);
  CHECK_EQ(look(*store, fork, left), 0);
}

// A chunk that could not be written moves to a device's memory before it is tried again.
TEST(a_chunk_that_moved_since_it_could_not_be_written) {
  const TemporaryDirectory directory;
  const std::string path = directory.path("s");
  Faults faults;
  FaultyFiles files(faults);
  const KvGeometry shape = geometry();
  const auto open = static_cast<int64_t>(shape.open_bytes());
  const auto sealed = static_cast<int64_t>(shape.sealed_bytes());
  const auto store = std::make_unique<KvStore>(
      shape, std::make_unique<WatchedTier>(30 * open + 30 * sealed, false), options_for(&files),
      std::make_unique<WatchedTier>(0, true));
  const auto nothing = store->create();
  store->attach(nothing, path, {});
  store->release(nothing);
  const auto s = store->create();
  Text text;
  grow(*store, s, text, kUnit, 1);
  const auto fork = store->fork(s);
  const auto in_reach = [&] {
    return store->view(fork, 1).sealed[0] != nullptr && store->view(fork, 2).sealed[0] != nullptr;
  };
  CHECK(in_reach());
  const auto press_out = [&] {
    std::vector<KvStore::Sequence> others;
    try {
      for (;;) {
        Text other;
        others.push_back(store->create());
        grow(*store, others.back(), other, kUnit - 1, others.size());
      }
    } catch (const Error&) {
      for (const auto other : others) store->release(other);
    }
  };
  press_out();
  CHECK(!in_reach());  // it lies in the host's memory
  faults.space = 0;
  store->attach(s, path, text.view());
  CHECK_THROWS(ErrorCode::kStorage, store->flush(s));
  store->flush(fork);  // waits for the second try
  CHECK_EQ(look(*store, fork, text), 0);
  begin_pass_of_one_more(*store, fork, text, kLayers);  // ends the pass, after which they are there
  CHECK(in_reach());
  press_out();  // other pages where it lay
  faults.space = -1;
  try {
    store->flush(s);  // may tell of the last try
  } catch (const Error&) {
  }
  store->flush(s);
  const auto other = make_store(nullptr);
  const auto opened = other->open(path, false);
  CHECK(opened.tokens == text.tokens);
  CHECK_EQ(look(*other, opened.sequence, text), 0);
}

TEST(sessions_with_a_common_prefix_share_its_files) {
  const TemporaryDirectory directory;
  const auto store = make_store(nullptr, directory.path("cache"));
  const auto a = store->create();
  Text first;
  grow(*store, a, first, 3 * kUnit, 1);
  const auto b = store->fork(a);
  Text second = first;
  grow(*store, b, second, 2 * kUnit, 2);
  store->save(a, directory.path("a"), first.view());
  store->save(b, directory.path("b"), second.view());
  int64_t shared = 0;
  for (const auto& file : std::filesystem::directory_iterator(directory.path("b/chunks")))
    shared += std::filesystem::hard_link_count(file) == 3;  // the cache, a and b
  CHECK_EQ(shared, 3);
  // Sessions stay whole without the cache and without each other.
  store->release(a);
  store->release(b);
  std::filesystem::remove_all(directory.path("a"));
  const auto other = make_store(nullptr);
  const auto opened = other->open(directory.path("b"), false);
  CHECK(opened.tokens == second.tokens);
  CHECK_EQ(look(*other, opened.sequence, second), 0);
}

// What a session has no more may be what others went on from; then its files stay.
TEST(a_session_that_is_cut_leaves_forks_what_they_read) {
  const TemporaryDirectory directory;
  const std::string path = directory.path("s");
  Text text;
  {
    const auto store = make_store(nullptr);
    const auto s = store->create();
    grow(*store, s, text, 4 * kUnit, 1);
    store->save(s, path, text.view());
  }
  const auto files = [&] {
    const std::filesystem::directory_iterator all(path + "/chunks");
    return std::distance(begin(all), end(all));
  };
  const auto store = make_store(nullptr);
  const auto s = store->open(path, true).sequence;
  const auto fork = store->fork(s);
  Text cut = text;
  store->truncate(s, 2 * kUnit);
  cut.cut(2 * kUnit);
  grow(*store, s, cut, kUnit, 2);  // in the place of another, by the writer
  store->save(s, path, cut.view());
  CHECK_EQ(look(*store, fork, text), 0);
  CHECK_EQ(files(), 5);
  store->release(s);
  CHECK_EQ(store->truncate_session(path, 0), 0);
  CHECK_EQ(look(*store, fork, text), 0);
  // Nor is it taken for a part of the session, or kept without need.
  CHECK_EQ(make_store(nullptr)->open(path, false).tokens.size(), size_t{0});
  store->release(fork);
  CHECK_EQ(store->truncate_session(path, 0), 0);
  CHECK_EQ(files(), 0);
}

TEST(where_files_cannot_be_linked_they_are_copied) {
  const TemporaryDirectory directory;
  Faults faults;
  FaultyFiles files(faults);
  files.links = false;
  Text text;
  {
    const auto store = make_store(&files, directory.path("cache"));
    const auto s = store->create();
    grow(*store, s, text, 3 * kUnit + 5, 1);
    store->save(s, directory.path("s"), text.view());
  }
  const auto store = make_store(nullptr);
  const auto opened = store->open(directory.path("s"), false);
  CHECK_EQ(look(*store, opened.sequence, text), 0);
}

TEST(saving_again_writes_what_is_new) {
  const TemporaryDirectory directory;
  Faults faults;
  FaultyFiles files(faults);
  const auto store = make_store(&files);
  const auto s = store->create();
  Text text;
  grow(*store, s, text, 6 * kUnit + 100, 1);
  store->save(s, directory.path("s"), text.view());
  grow(*store, s, text, 10, 1);
  // Room for the tail, not for the chunks.
  faults.space = 60'000;
  store->save(s, directory.path("s"), text.view());
  CHECK(faults.space < 60'000);
  faults.space = -1;
  CHECK(make_store(nullptr)->open(directory.path("s"), false).tokens == text.tokens);
}

TEST(a_full_disk_leaves_the_session_as_it_was) {
  const TemporaryDirectory directory;
  Faults faults;
  FaultyFiles files(faults);
  const auto store = make_store(&files);
  const auto s = store->create();
  Text text;
  grow(*store, s, text, 2 * kUnit, 1);
  store->save(s, directory.path("s"), text.view());
  const Text saved = text;
  grow(*store, s, text, 2 * kUnit, 1);
  for (const int64_t space : {0, 3000, 40'000}) {
    faults.space = space;
    CHECK_THROWS(ErrorCode::kStorage, store->save(s, directory.path("s"), text.view()));
    const auto other = make_store(nullptr);
    const auto opened = other->open(directory.path("s"), false);
    CHECK(opened.tokens.size() >= saved.tokens.size());
    CHECK_EQ(look(*other, opened.sequence, text_of(opened)), 0);
  }
  faults.space = -1;
  store->save(s, directory.path("s"), text.view());
  CHECK(make_store(nullptr)->open(directory.path("s"), false).tokens == text.tokens);
}

TEST(what_a_save_made_good_is_not_told_any_more) {
  const TemporaryDirectory directory;
  const std::string path = directory.path("s");
  Faults faults;
  FaultyFiles files(faults);
  for (const bool disk : {false, true}) {
    const auto store = make_store(&files, disk ? directory.path("cache") : "");
    const auto s = store->create();
    Text text;
    store->attach(s, path, text.view());
    if (!disk) faults.space = 0;  // else the session's part alone fails
    if (disk) std::filesystem::remove_all(path + "/chunks");
    grow(*store, s, text, kUnit, 1);
    CHECK_THROWS(ErrorCode::kStorage, store->flush(s));
    store->flush(store->fork(s));  // waits for the second try
    faults.space = -1;
    std::filesystem::create_directories(path + "/chunks");
    store->save(s, path, text.view());
    store->flush(s);
    CHECK_EQ(grow(*store, s, text, 100, 1), 0);
    store->save(s, path, text.view());
    store->flush(s);
    CHECK(make_store(nullptr)->open(path, false).tokens == text.tokens);
    store->release(s);
    std::filesystem::remove_all(path);
  }
}

// Nor does it keep the directory from others once its session is gone.
TEST(a_session_that_could_not_be_written_is_left_to_others) {
  const TemporaryDirectory directory;
  const std::string path = directory.path("s");
  Faults faults;
  FaultyFiles files(faults);
  const auto store = make_store(&files, directory.path("cache"));
  const auto s = store->create();
  Text text;
  store->attach(s, path, text.view());
  faults.space = 0;
  grow(*store, s, text, kUnit, 1);
  CHECK_THROWS(ErrorCode::kStorage, store->flush(s));
  const auto fork = store->fork(s);
  store->flush(fork);  // has the second try's failure noted
  store->release(s);
  CHECK_EQ(make_store(nullptr)->open(path, true).tokens.size(), size_t{0});
}

TEST(a_full_disk_leaves_the_tail_of_another_text) {
  const TemporaryDirectory directory;
  const std::string path = directory.path("s");
  Faults faults;
  FaultyFiles files(faults);
  const auto store = make_store(&files);
  const auto s = store->create();
  Text text;
  grow(*store, s, text, kUnit + kUnit / 2, 1);
  store->save(s, path, text.view());
  const Text saved = text;
  store->truncate(s, kUnit);
  text.cut(kUnit);
  grow(*store, s, text, kUnit / 4, 2);
  for (const int64_t space : {0, 3000, 20'000}) {
    faults.space = space;
    CHECK_THROWS(ErrorCode::kStorage, store->save(s, path, text.view()));
    CHECK(!std::filesystem::exists(path + "/tail.tmp"));
    const auto other = make_store(nullptr);
    const auto opened = other->open(path, false);
    CHECK(opened.tokens == saved.tokens);
    CHECK_EQ(look(*other, opened.sequence, saved), 0);
  }
  faults.space = -1;
  store->save(s, path, text.view());
  CHECK(make_store(nullptr)->open(path, false).tokens == text.tokens);
}

TEST(a_session_on_disk_larger_than_memory_streams) {
  const TemporaryDirectory directory;
  Text text;
  {
    const auto store = make_store(nullptr);
    const auto s = store->create();
    grow(*store, s, text, 30 * kUnit + 100, 1);
    store->save(s, directory.path("s"), text.view());
  }
  const KvGeometry shape = geometry();
  const int64_t budget = 60 * static_cast<int64_t>(shape.sealed_bytes() + shape.open_bytes());
  const auto store = make_store(nullptr, "", KvSeal::kInt8, budget);
  const auto opened = store->open(directory.path("s"), false);
  Text again = text_of(opened);
  CHECK_EQ(look(*store, opened.sequence, again), 0);
  CHECK(store->bytes_in_use() <= budget);
  // A fork, to the left of where it was saved.
  const auto fork = store->fork(opened.sequence);
  store->truncate(fork, 20 * kUnit);
  again.cut(20 * kUnit);
  CHECK_EQ(grow(*store, fork, again, 100, 3), 0);
}

TEST(what_does_not_fit_is_refused_with_the_reason) {
  const TemporaryDirectory directory;
  const std::string path = directory.path("s");
  Text text;
  const auto store = make_store(nullptr);
  const auto s = store->create();
  grow(*store, s, text, 2 * kUnit + 300, 1);
  store->save(s, path, text.view());

  KvStore other_model(geometry(), make_ram_tier(0), options_for(nullptr, "", 2));
  check_told(mismatch([&] { other_model.open(path, false); }), "another model");
  check_told(mismatch([&] { make_store(nullptr, "", KvSeal::kInt4)->open(path, false); }),
             "holds keys and values in int8, the model was loaded with kv=int4");
  KvStore other_layers({kLayout, {0, 512, 0}, KvSeal::kInt8}, make_ram_tier(0),
                       options_for(nullptr));
  check_told(mismatch([&] { other_layers.open(path, false); }), "other layers or heads");
  check_told(mismatch([&] { store->open(directory.path("nothing"), false); }), "not a session");
  check_told(mismatch([&] { store->open(directory.path("nothing"), true); }), "not a session");
  CHECK(!std::filesystem::exists(directory.path("nothing")));
  check_told(mismatch([&] { other_model.save(other_model.create(), path, {}); }), "another model");

  for (const auto& file : std::filesystem::directory_iterator(path + "/chunks"))
    std::filesystem::resize_file(file, 4096 * 3);
  check_told(mismatch([&] { make_store(nullptr)->open(path, false); }), "is damaged");
  for (const auto& file : std::filesystem::directory_iterator(path + "/chunks"))
    std::filesystem::remove(file);
  check_told(mismatch([&] { make_store(nullptr)->open(path, false); }), "is missing");
}

TEST(truncating_a_session_on_disk) {
  const TemporaryDirectory directory;
  const std::string path = directory.path("s");
  Text text;
  const auto store = make_store(nullptr);
  const auto s = store->create();
  grow(*store, s, text, 4 * kUnit + 300, 1);
  store->save(s, path, text.view());
  CHECK_EQ(store->truncate_session(path, 1'000'000), 4 * kUnit + 300);
  CHECK_EQ(store->truncate_session(path, 4 * kUnit + 299), 4 * kUnit);
  CHECK_EQ(store->truncate_session(path, 3 * kUnit - 1), 2 * kUnit);
  const auto other = make_store(nullptr);
  const auto opened = other->open(path, false);
  text.cut(2 * kUnit);
  CHECK(opened.tokens == text.tokens);
  CHECK_EQ(look(*other, opened.sequence, text), 0);
  // Damage in the journal: what lies before it can be kept.
  store->save(s, path, [&] {
    text.grow(2 * kUnit + 300, 1);
    return text.view();
  }());
  std::fstream journal(path + "/journal", std::ios::in | std::ios::out | std::ios::binary);
  journal.seekp(144 + 50);
  journal.put(77);
  journal.close();
  check_told(mismatch([&] { store->open(path, false); }), "truncating it to 512 tokens");
  CHECK(!store->verify(path, Verify::kJournal).fault.empty());
  CHECK_EQ(store->truncate_session(path, 1'000'000), kUnit);
  CHECK_EQ(make_store(nullptr)->open(path, true).tokens.size(), size_t{kUnit});
}

TEST(verify_looks_as_far_as_it_is_asked_to) {
  const auto files = std::make_unique<CrashFiles>();
  const auto store = make_store(files.get());
  const auto s = store->create();
  Text text;
  grow(*store, s, text, 4 * kUnit + 300, 1);
  store->save(s, "/d/s", text.view());
  CHECK_EQ(store->verify("/d/s", Verify::kJournal).pages, 0);
  CHECK_EQ(store->verify("/d/s", Verify::kJournal).chunks, 4);
  CHECK_EQ(store->verify("/d/s", Verify::kSampled).pages, 4 * 2 + 2 * 2 + 1);
  const VerifyReport all = store->verify("/d/s", Verify::kFull);
  CHECK_EQ(all.pages, 4 * 4 + 2 * 2 + 2);
  CHECK_EQ(all.good_tokens, 4 * kUnit + 300);
  // The third chunk's last page.
  Digest name = KvIdentity{options_for(nullptr).model, geometry()}.root();
  for (int64_t i = 0; i < 3; ++i) name = chain_hash(name, text.view(), i * kUnit, (i + 1) * kUnit);
  const std::string path = "/d/s/chunks/" + hex(name);
  for (const auto& [file, size] : files->sizes("/d/s"))
    if (file == path) files->byte(path, size - 1) ^= std::byte{1};
  const VerifyReport damaged = store->verify("/d/s", Verify::kFull);
  check_told(damaged.fault, "does not have the checksum");
  CHECK_EQ(damaged.good_tokens, 2 * kUnit);
}

// The power fails after a random operation, and any part of what was not synced is lost: the
// session opens, holds at least what was said to be durable and nothing but the truth, and goes on.
TEST(crashes) {
  int64_t opened_count = 0, longer = 0;
  for (unsigned seed = 1; seed <= 300; ++seed) {
    std::mt19937 random(seed);
    auto files = std::make_unique<CrashFiles>();
    const std::string cache = seed % 2 ? "/d/cache" : "";
    Text text;
    int64_t durable = 0;
    {
      const auto store = make_store(files.get(), cache);
      const auto s = store->create();
      files->operations_left = 1 + static_cast<int64_t>(random() % 250);
      try {
        store->attach(s, "/d/s", text.view());
        for (int step = 0; step < 12; ++step) {
          grow(*store, s, text, 1 + static_cast<int64_t>(random() % 700), 1);
          switch (random() % 4) {
            case 0:
              store->save(s, "/d/s", text.view());
              durable = store->length(s);
              break;
            case 1:
              store->flush(s);
              durable = std::max(durable, store->length(s) / kUnit * kUnit);
              break;
            case 2: {
              // Another text from some point on: what was durable of the old one need not stay.
              const int64_t back = store->restorable(s, static_cast<int64_t>(random() % 3000));
              if (random() % 3) break;
              store->truncate(s, back);
              text.cut(back);
              durable = std::min(durable, back / kUnit * kUnit);
              break;
            }
            default:
              break;
          }
        }
      } catch (const Error& error) {
        CHECK_EQ(static_cast<int>(error.code()), static_cast<int>(ErrorCode::kStorage));
      }
    }
    const auto after = files->crash(random);
    const auto store = make_store(after.get());
    if (!after->exists("/d/s/journal")) {
      CHECK_EQ(durable, 0);
      continue;
    }
    ++opened_count;
    const auto opened = store->open("/d/s", true);
    const auto length = static_cast<int64_t>(opened.tokens.size());
    Text again = text_of(opened);
    CHECK(length >= durable);
    longer += length > durable;
    // The text that it says it has, and its pages. (After a turn it may still be the old text.)
    CHECK_EQ(look(*store, opened.sequence, again), 0);
    CHECK_EQ(grow(*store, opened.sequence, again, kUnit + 50, 1), 0);
    store->save(opened.sequence, "/d/s", again.view());
    CHECK_EQ(store->verify("/d/s", Verify::kFull).fault, "");
  }
  CHECK(opened_count > 200);
  CHECK(longer > 0);
}

// Any single bit of any file: found out, or without consequence.
TEST(bit_flips) {
  const auto files = std::make_unique<CrashFiles>();
  const auto store = make_store(files.get());
  const auto s = store->create();
  Text text;
  text.images = {{5, 20, 111}, {700, 30, 222}, {1200, 10, 333}};
  grow(*store, s, text, 2 * kUnit + 300, 1);
  store->save(s, "/d/s", text.view());
  std::vector<std::pair<std::string, size_t>> sizes = files->sizes("/d/s");
  std::mt19937_64 random(7);
  int64_t found = 0, shorter = 0, harmless = 0, accepted = 0;
  for (int i = 0; i < check::trials(10'000); ++i) {
    // Small files as often as large ones every other time.
    const auto& [path, size] = sizes[random() % sizes.size()];
    if (size == 0) continue;
    std::byte& byte = files->byte(path, random() % size);
    const std::byte bit{static_cast<uint8_t>(1u << random() % 8)};
    byte ^= bit;
    const VerifyReport report = store->verify("/d/s", Verify::kFull);
    if (!report.fault.empty()) {
      ++found;
    } else {
      const KvIdentity identity{options_for(nullptr).model, geometry()};
      const SessionContents contents = read_session(*files, "/d/s", identity);
      const bool prefix =
          std::equal(contents.tokens.begin(), contents.tokens.end(), text.tokens.begin());
      if (!prefix)
        ++accepted;
      else if (contents.tokens.size() == text.tokens.size() && contents.images == text.images)
        ++harmless;  // the other copy of the header
      else
        ++shorter;  // the last record of the journal
    }
    byte ^= bit;
  }
  CHECK_EQ(accepted, 0);
  CHECK(found > check::trials(6000));
  CHECK(harmless > 0);
  CHECK(shorter > 0);
  CHECK_EQ(store->verify("/d/s", Verify::kFull).fault, "");
}
