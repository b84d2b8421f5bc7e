// The page table: what a sequence holds at each length, who owns a shared page, what is refused.
#include "kv/kv_store.h"

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <vector>

#include "check.h"
#include "kv/tiers/ram.h"

using namespace puna;

namespace {

// One token's mark lies in the first value of head 0, so pages can be told apart.
constexpr KvPageLayout kLayout{DType::kF32, 1, 2};

const auto kPageBytes = static_cast<int64_t>(kLayout.page_bytes());

KvStore make_store(std::vector<int64_t> chunk, int64_t budget_pages = 0,
                   KvSeal seal = KvSeal::kNone) {
  return KvStore({kLayout, std::move(chunk), seal}, make_ram_tier(budget_pages * kPageBytes));
}

int64_t pages_in_use(const KvStore& store) { return store.bytes_in_use() / kPageBytes; }

int64_t page_count(const KvView& view) {
  return view.first_open + static_cast<int64_t>(view.open.size());
}
void* page_at(const KvView& view, int64_t page) {
  return page < view.first_open ? view.sealed[page] : view.open[page - view.first_open];
}

float& open_mark(void* page, int64_t token) {
  return reinterpret_cast<float*>(static_cast<char*>(page) +
                                  kLayout.value_offset(0))[kLayout.value_index(token, 0)];
}
float& sealed_mark(void* page, int64_t token) { return static_cast<float*>(page)[token]; }

// The mark of a position as attention reads it: a sealed page of its own form has them in a row.
float& mark(const KvStore& store, KvStore::Sequence sequence, int64_t layer, int64_t position) {
  const KvView view = store.view(sequence, layer);
  const int64_t token = position - view.first_position;
  void* const page = page_at(view, token / kPageTokens);
  const bool sealed =
      token / kPageTokens < view.first_open && store.geometry().seal != KvSeal::kNone;
  return sealed ? sealed_mark(page, token % kPageTokens) : open_mark(page, token % kPageTokens);
}

float mark_of(int64_t position, int64_t layer, int64_t salt) {
  return static_cast<float>(position * 8 + layer) + static_cast<float>(salt) * 1e6f;
}

// What attention does in a pass: marks the rows' positions in their open pages, and seals the pages
// that this fills.
void write(const KvStore& store, KvStore::Sequence sequence, int64_t layer, int64_t tokens,
           int64_t salt) {
  const KvView view = store.view(sequence, layer);
  const int64_t start = store.length(sequence) - view.first_position, end = start + tokens;
  for (int64_t t = start; t < end; ++t)
    open_mark(view.open[t / kPageTokens - view.first_open], t % kPageTokens) =
        mark_of(view.first_position + t, layer, salt);
  const bool global = store.geometry().chunk[layer] == 0;
  const bool seals = global && store.geometry().seal != KvSeal::kNone;
  CHECK_EQ(static_cast<int64_t>(view.sealed.size()), seals ? end / kPageTokens : view.first_open);
  CHECK_EQ(page_count(view), (end + kPageTokens - 1) / kPageTokens);
  for (int64_t page = view.first_open; seals && page < end / kPageTokens; ++page)
    for (int64_t t = 0; t < kPageTokens; ++t)
      sealed_mark(view.sealed[page], t) = open_mark(view.open[page - view.first_open], t);
}

// Appends `tokens` in as many steps as room() asks for, and marks position p of layer l with
// mark_of(p, l, salt).
void append(KvStore& store, KvStore::Sequence sequence, int64_t tokens, int64_t layers,
            int64_t salt = 0) {
  while (tokens > 0) {
    const int64_t step = std::min(tokens, store.room(sequence));
    const KvStore::Append wanted{sequence, step};
    const KvStore::Plan plan = store.plan({&wanted, 1});
    const int64_t before = store.bytes_in_use();
    store.apply(plan);
    CHECK_EQ(store.bytes_in_use(), before + plan.new_bytes);
    for (int64_t layer = 0; layer < layers; ++layer) write(store, sequence, layer, step, salt);
    store.commit(plan);
    tokens -= step;
  }
}

}  // namespace

TEST(length_pages_and_views) {
  KvStore store = make_store({512, 0});
  const auto s = store.create();
  CHECK_EQ(store.length(s), 0);
  CHECK_EQ(store.room(s), 512);
  CHECK_EQ(page_count(store.view(s, 0)), 0);
  append(store, s, 300, 2);
  CHECK_EQ(store.length(s), 300);
  CHECK_EQ(store.room(s), 212);
  CHECK_EQ(pages_in_use(store), 4);
  for (int64_t p = 0; p < 300; ++p)
    for (int64_t layer = 0; layer < 2; ++layer)
      CHECK_EQ(mark(store, s, layer, p), mark_of(p, layer, 0));
  store.release(s);
  CHECK_EQ(pages_in_use(store), 0);
  CHECK_THROWS(ErrorCode::kInternal, store.length(s));
}

TEST(chunked_layers_drop_their_chunk_at_its_boundary) {
  KvStore store = make_store({512, 0});
  const auto s = store.create();
  append(store, s, 512, 2);
  CHECK_EQ(store.view(s, 0).first_position, 512);
  CHECK_EQ(page_count(store.view(s, 0)), 0);
  CHECK_EQ(store.view(s, 1).first_position, 0);
  CHECK_EQ(pages_in_use(store), 2);
  append(store, s, 1, 2);
  CHECK_EQ(store.view(s, 0).first_position, 512);
  CHECK_EQ(page_count(store.view(s, 0)), 1);
  CHECK_EQ(mark(store, s, 0, 512), mark_of(512, 0, 0));
  CHECK_EQ(mark(store, s, 1, 17), mark_of(17, 1, 0));
}

TEST(chunks_need_not_be_whole_pages) {
  KvStore store = make_store({300, 0});
  const auto s = store.create();
  append(store, s, 700, 2);
  CHECK_EQ(store.view(s, 0).first_position, 600);
  CHECK_EQ(page_count(store.view(s, 0)), 1);
  CHECK_EQ(mark(store, s, 0, 650), mark_of(650, 0, 0));
  CHECK_EQ(mark(store, s, 1, 299), mark_of(299, 1, 0));
}

TEST(without_chunks_room_is_unbounded) {
  KvStore store = make_store({0, 0});
  const auto s = store.create();
  CHECK(store.room(s) > int64_t{1} << 60);
}

TEST(forks_share_until_one_writes) {
  KvStore store = make_store({0});
  const auto a = store.create();
  append(store, a, 300, 1);
  const auto b = store.fork(a);
  CHECK_EQ(store.length(b), 300);
  CHECK_EQ(pages_in_use(store), 2);
  append(store, b, 10, 1, 1);  // copies the half-filled page only
  CHECK_EQ(pages_in_use(store), 3);
  CHECK(page_at(store.view(a, 0), 0) == page_at(store.view(b, 0), 0));
  CHECK(page_at(store.view(a, 0), 1) != page_at(store.view(b, 0), 1));
  append(store, a, 10, 1, 2);  // sole owner of its page by now
  CHECK_EQ(pages_in_use(store), 3);
  for (int64_t p = 0; p < 310; ++p) {
    CHECK_EQ(mark(store, a, 0, p), mark_of(p, 0, p < 300 ? 0 : 2));
    CHECK_EQ(mark(store, b, 0, p), mark_of(p, 0, p < 300 ? 0 : 1));
  }
  store.release(a);
  CHECK_EQ(pages_in_use(store), 2);
  CHECK_EQ(mark(store, b, 0, 5), mark_of(5, 0, 0));
}

TEST(forks_at_a_page_boundary_share_all) {
  KvStore store = make_store({0});
  const auto a = store.create();
  append(store, a, 256, 1);
  const auto b = store.fork(a);
  append(store, b, 1, 1);
  CHECK_EQ(pages_in_use(store), 2);
}

TEST(forks_do_not_share_pages_that_were_never_filled) {
  KvStore store = make_store({0});
  const auto a = store.create();
  append(store, a, 256, 1);
  const KvStore::Append wanted{a, 5};
  store.apply(store.plan({&wanted, 1}));  // and the forward pass fails: no commit
  const auto b = store.fork(a);
  append(store, a, 5, 1, 1);
  append(store, b, 5, 1, 2);
  CHECK_EQ(mark(store, a, 0, 258), mark_of(258, 0, 1));
  CHECK_EQ(mark(store, b, 0, 258), mark_of(258, 0, 2));
  CHECK_EQ(pages_in_use(store), 3);
}

TEST(plan_counts_exactly_when_forks_write_together) {
  KvStore store = make_store({0}, 3);
  const auto a = store.create();
  append(store, a, 10, 1);
  const auto b = store.fork(a), c = store.fork(a);
  const KvStore::Append wanted[] = {{a, 1}, {b, 1}, {c, 1}};
  const KvStore::Plan plan = store.plan(wanted);
  CHECK_EQ(plan.open_pages, 2);  // the last owner writes in place
  store.apply(plan);
  store.commit(plan);
  CHECK_EQ(pages_in_use(store), 3);
  CHECK(page_at(store.view(a, 0), 0) != page_at(store.view(b, 0), 0));
  CHECK(page_at(store.view(b, 0), 0) != page_at(store.view(c, 0), 0));
  CHECK(page_at(store.view(a, 0), 0) != page_at(store.view(c, 0), 0));
}

TEST(plan_refuses_without_side_effects) {
  KvStore store = make_store({0, 512}, 3);
  const auto a = store.create(), b = store.create();
  append(store, a, 1, 2);
  const KvStore::Append wanted[] = {{b, 1}};
  CHECK_THROWS(ErrorCode::kOutOfMemory, store.plan(wanted));
  CHECK_EQ(pages_in_use(store), 2);
  CHECK_EQ(store.length(b), 0);
  CHECK_EQ(page_count(store.view(b, 0)), 0);
  append(store, a, 255, 2);  // the pages at hand are still good
  store.release(a);
  append(store, b, 1, 2);
  CHECK_EQ(store.length(b), 1);

  const KvStore::Append nothing[] = {{b, 0}}, twice[] = {{b, 1}, {b, 1}}, over[] = {{b, 512}};
  CHECK_THROWS(ErrorCode::kInternal, store.plan(nothing));
  CHECK_THROWS(ErrorCode::kInternal, store.plan(twice));
  CHECK_THROWS(ErrorCode::kInternal, store.plan(over));  // beyond the chunk's boundary
}

TEST(apply_twice_takes_pages_once) {
  KvStore store = make_store({0});
  const auto s = store.create();
  const KvStore::Append wanted{s, 300};
  const KvStore::Plan plan = store.plan({&wanted, 1});
  store.apply(plan);
  store.apply(plan);
  CHECK_EQ(pages_in_use(store), 2);
  store.truncate(s, 0);  // gives uncommitted pages back
  CHECK_EQ(pages_in_use(store), 0);
}

TEST(truncate_and_restorable) {
  KvStore store = make_store({512, 0});
  const auto s = store.create();
  append(store, s, 1300, 2);
  CHECK_EQ(store.restorable(s, 5000), 1300);
  CHECK_EQ(store.restorable(s, 1300), 1300);
  CHECK_EQ(store.restorable(s, 1030), 1030);
  CHECK_EQ(store.restorable(s, 1024), 1024);
  CHECK_EQ(store.restorable(s, 1023), 512);  // that chunk's keys are gone
  CHECK_EQ(store.restorable(s, 512), 512);
  CHECK_EQ(store.restorable(s, 511), 0);
  CHECK_EQ(store.restorable(s, -3), 0);
  CHECK_THROWS(ErrorCode::kInternal, store.truncate(s, 1023));
  CHECK_THROWS(ErrorCode::kInternal, store.truncate(s, 1301));
  store.truncate(s, 1100);
  CHECK_EQ(store.length(s), 1100);
  CHECK_EQ(mark(store, s, 0, 1099), mark_of(1099, 0, 0));
  CHECK_EQ(pages_in_use(store), 1 + 5);
  store.truncate(s, 512);
  CHECK_EQ(store.view(s, 0).first_position, 512);
  CHECK_EQ(page_count(store.view(s, 0)), 0);
  CHECK_EQ(pages_in_use(store), 2);
  append(store, s, 5, 2, 1);
  CHECK_EQ(mark(store, s, 0, 514), mark_of(514, 0, 1));
  CHECK_EQ(mark(store, s, 1, 511), mark_of(511, 1, 0));
}

TEST(restorable_with_two_chunk_lengths) {
  KvStore store = make_store({300, 200});
  const auto s = store.create();
  append(store, s, 1150, 2);
  CHECK_EQ(store.room(s), 50);
  CHECK_EQ(store.restorable(s, 1000), 1000);
  CHECK_EQ(store.restorable(s, 999), 600);  // 800 is no boundary of 300, 900 none of 200
  CHECK_EQ(store.restorable(s, 1149), 1149);
}

TEST(truncate_then_append_copies_a_shared_page) {
  KvStore store = make_store({0});
  const auto a = store.create();
  append(store, a, 200, 1);
  const auto b = store.fork(a);
  store.truncate(b, 100);
  append(store, b, 20, 1, 1);
  CHECK_EQ(mark(store, a, 0, 105), mark_of(105, 0, 0));
  CHECK_EQ(mark(store, b, 0, 105), mark_of(105, 0, 1));
  CHECK_EQ(mark(store, b, 0, 99), mark_of(99, 0, 0));
}

TEST(bytes_for_counts_whole_pages_and_one_chunk) {
  const KvStore store = make_store({512, 0, 300});
  const auto pages = [&](int64_t tokens) { return store.bytes_for(tokens) / kPageBytes; };
  CHECK_EQ(pages(0), 0);
  CHECK_EQ(pages(1), 3);
  CHECK_EQ(pages(10000), 2 + 40 + 2);
}

TEST(full_pages_are_sealed_and_their_open_form_is_recycled) {
  for (const KvSeal seal : {KvSeal::kInt8, KvSeal::kInt4}) {
    KvStore store = make_store({0, 512}, 0, seal);
    const auto sealed = static_cast<int64_t>(store.geometry().sealed_bytes());
    const auto open = static_cast<int64_t>(store.geometry().open_bytes());
    const auto s = store.create();
    append(store, s, 300, 2);
    CHECK_EQ(store.bytes_in_use(), sealed + open + 2 * open);
    CHECK_EQ(store.view(s, 0).first_open, 1);
    CHECK_EQ(store.view(s, 1).first_open, 0);
    append(store, s, 212, 2);
    CHECK_EQ(store.bytes_in_use(), 2 * sealed);
    append(store, s, 1, 2);
    CHECK_EQ(store.bytes_in_use(), 2 * sealed + 2 * open);
    CHECK_EQ(store.bytes_for(513), 2 * sealed + open + 2 * open);
    for (int64_t p = 0; p < 513; ++p) CHECK_EQ(mark(store, s, 0, p), mark_of(p, 0, 0));
  }
}

TEST(sealed_forks_share_until_one_writes) {
  KvStore store = make_store({0}, 0, KvSeal::kInt8);
  const auto sealed = static_cast<int64_t>(store.geometry().sealed_bytes());
  const auto open = static_cast<int64_t>(store.geometry().open_bytes());
  const auto a = store.create();
  append(store, a, 300, 1);
  const auto b = store.fork(a);
  CHECK_EQ(store.bytes_in_use(), sealed + open);
  append(store, b, 300, 1, 1);
  CHECK_EQ(store.bytes_in_use(), 2 * sealed + 2 * open);
  append(store, a, 1, 1, 2);
  CHECK_EQ(store.bytes_in_use(), 2 * sealed + 2 * open);
  CHECK_EQ(mark(store, a, 0, 300), mark_of(300, 0, 2));
  CHECK_EQ(mark(store, b, 0, 300), mark_of(300, 0, 1));
  CHECK_EQ(mark(store, b, 0, 299), mark_of(299, 0, 0));
}

TEST(below_the_open_page_a_sealed_sequence_goes_back_to_page_boundaries) {
  KvStore store = make_store({0, 1024}, 0, KvSeal::kInt4);
  const auto s = store.create();
  append(store, s, 900, 2);
  CHECK_EQ(store.restorable(s, 850), 850);
  CHECK_EQ(store.restorable(s, 768), 768);
  CHECK_EQ(store.restorable(s, 767), 512);  // the open form of that page is gone
  CHECK_THROWS(ErrorCode::kInternal, store.truncate(s, 700));
  store.truncate(s, 850);
  append(store, s, 10, 2, 1);
  CHECK_EQ(mark(store, s, 0, 849), mark_of(849, 0, 0));
  CHECK_EQ(mark(store, s, 0, 855), mark_of(855, 0, 1));
  store.truncate(s, 512);
  append(store, s, 10, 2, 2);
  CHECK_EQ(mark(store, s, 0, 515), mark_of(515, 0, 2));
  CHECK_EQ(mark(store, s, 0, 511), mark_of(511, 0, 0));
  append(store, s, 600, 2, 3);  // into the next chunk
  CHECK_EQ(store.restorable(s, 1023), 0);
}

TEST(a_pass_that_failed_leaves_nothing_behind) {
  for (const KvSeal seal : {KvSeal::kNone, KvSeal::kInt8}) {
    KvStore store = make_store({0, 1024}, 0, seal);
    const auto s = store.create();
    append(store, s, 250, 2);
    const KvStore::Append wanted{s, 600};
    store.apply(store.plan({&wanted, 1}));
    append(store, s, 3, 2, 1);  // the view covers this pass alone
    CHECK_EQ(store.length(s), 253);
    CHECK_EQ(store.bytes_in_use(), 2 * kPageBytes);
  }
}

TEST(ram_tier_recycles_and_zeroes) {
  const auto tier = make_ram_tier(3 * 4096);
  CHECK_EQ(tier->bytes_left(), 3 * 4096);
  auto* first = static_cast<unsigned char*>(tier->allocate(4096));
  first[10] = 7;
  tier->free(first, 4096);
  auto* again = static_cast<unsigned char*>(tier->allocate(4096));
  CHECK(again == first);
  CHECK_EQ(int{again[10]}, 0);
  void* second = tier->allocate(8192);
  CHECK(second != nullptr);
  CHECK(tier->allocate(4096) == nullptr);
  CHECK_EQ(tier->bytes_in_use(), 3 * 4096);
  tier->free(second, 8192);
  tier->free(again, 4096);
  CHECK_EQ(tier->bytes_left(), 3 * 4096);
  // A page that was kept for its size gives way to another size.
  void* whole = tier->allocate(3 * 4096);
  CHECK(whole != nullptr);
  tier->free(whole, 3 * 4096);
  CHECK_THROWS(ErrorCode::kInternal, tier->allocate(100));
}

TEST(ram_tier_counts_large_pages_alike) {
  constexpr int64_t kLarge = int64_t{5} << 20;
  const auto tier = make_ram_tier(kLarge + 4096);
  void* small = tier->allocate(4096);
  void* large = tier->allocate(kLarge);
  CHECK(small != nullptr && large != nullptr);
  CHECK_EQ(reinterpret_cast<size_t>(large) % kPageAlignment, size_t{0});
  CHECK_EQ(tier->bytes_left(), 0);
  tier->free(small, 4096);
  CHECK(tier->allocate(kLarge) == nullptr);
  tier->free(large, kLarge);
  CHECK_EQ(tier->bytes_in_use(), 0);
  large = tier->allocate(kLarge);
  CHECK_EQ(int{static_cast<char*>(large)[kLarge - 1]}, 0);
  tier->free(large, kLarge);
}

// Pages of several sizes come and go: none overlaps another, every one is zeroed, and the budget
// holds to the byte, however free pages lie between those in use.
TEST(ram_tier_serves_any_sizes_within_its_budget) {
  std::mt19937 random(7);
  for (const int64_t budget : {int64_t{3} << 20, int64_t{40} << 20}) {
    const auto tier = make_ram_tier(budget);
    constexpr int64_t kSizes[] = {4096, 12288, 131 * 4096, int64_t{5} << 20};
    struct Page {
      int64_t bytes;
      unsigned char mark;
    };
    std::map<unsigned char*, Page> pages;
    int64_t in_use = 0;
    for (int step = 0; step < 6000; ++step) {
      // Phases of growing and of shrinking.
      if (random() % 8 < (step / 500 % 2 == 0 ? 5u : 3u) || pages.empty()) {
        const int64_t bytes = kSizes[random() % 64 == 0 ? 3 : random() % 3];
        auto* const data = static_cast<unsigned char*>(tier->allocate(static_cast<size_t>(bytes)));
        CHECK_EQ(data != nullptr, bytes <= budget - in_use);
        if (data == nullptr) continue;
        in_use += bytes;
        const auto [place, is_new] =
            pages.insert({data, {bytes, static_cast<unsigned char>(1 + random() % 255)}});
        CHECK(is_new);
        CHECK_EQ(reinterpret_cast<size_t>(data) % kPageAlignment, size_t{0});
        const auto next = std::next(place);
        CHECK(next == pages.end() || data + bytes <= next->first);
        CHECK(place == pages.begin() ||
              std::prev(place)->first + std::prev(place)->second.bytes <= data);
        CHECK(std::all_of(data, data + bytes, [](unsigned char byte) { return byte == 0; }));
        data[0] = data[bytes - 1] = place->second.mark;
      } else {
        const auto page = std::next(pages.begin(), static_cast<int64_t>(random() % pages.size()));
        const auto [bytes, mark] = page->second;
        CHECK_EQ(int{page->first[0]}, int{mark});
        CHECK_EQ(int{page->first[bytes - 1]}, int{mark});
        std::memset(page->first, 255, static_cast<size_t>(bytes));
        tier->free(page->first, static_cast<size_t>(bytes));
        in_use -= bytes;
        pages.erase(page);
      }
      CHECK_EQ(tier->bytes_in_use(), in_use);
      CHECK_EQ(tier->bytes_left(), budget - in_use);
    }
  }
}

// What a process has in memory, from /proc/self/statm.
int64_t resident_bytes() {
  std::ifstream file("/proc/self/statm");
  int64_t all = 0, resident = 0;
  file >> all >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

TEST(ram_tier_takes_and_returns_memory_with_its_pages) {
  constexpr int64_t kBytes = 131 * 4096, kPages = 120, kSlack = int64_t{3} << 20;
  // Less is left than a page: pages of another size need what is free between those in use.
  const auto tier = make_ram_tier(kPages * kBytes + 4096);
  const int64_t before = resident_bytes();
  std::vector<void*> pages;
  for (int64_t i = 0; i < kPages; ++i) {
    pages.push_back(tier->allocate(kBytes));
    const int64_t wanted = (i + 1) * kBytes;
    CHECK(resident_bytes() - before <= wanted + wanted / 8 + kSlack);
  }
  CHECK(resident_bytes() - before >= kPages * kBytes - kSlack);
  for (int64_t i = 0; i < kPages; i += 2) tier->free(pages[i], kBytes);
  constexpr int64_t kOther = 4 * 4096, kOthers = kPages / 2 * kBytes / kOther;
  std::vector<void*> others;
  for (int64_t i = 0; i < kOthers; ++i) {
    others.push_back(tier->allocate(kOther));
    CHECK(others.back() != nullptr);
  }
  CHECK(resident_bytes() - before <= kPages * kBytes + kSlack);
  for (void* other : others) tier->free(other, kOther);
  for (int64_t i = 0; i < kPages; i += 2) pages[i] = tier->allocate(kBytes);
  for (void* page : pages) {
    CHECK(page != nullptr);
    CHECK_EQ(int{static_cast<char*>(page)[kBytes - 1]}, 0);
    tier->free(page, kBytes);
  }
  CHECK(resident_bytes() - before <= kPages * kBytes / 4 + kSlack);
}

// Many random steps against the plainest model: a map from position to mark per sequence.
void live_randomly(KvSeal seal) {
  std::mt19937 random(1);
  const std::vector<int64_t> chunks = {300, 0};
  KvStore store = make_store(chunks, 0, seal);
  std::map<KvStore::Sequence, std::vector<int64_t>> salts;  // salt of each position
  salts[store.create()];
  for (int64_t step = 0; step < 400; ++step) {
    auto chosen = std::next(salts.begin(), static_cast<int64_t>(random() % salts.size()));
    const auto sequence = chosen->first;
    switch (random() % 8) {
      case 0:
        if (salts.size() < 6) {
          const std::vector<int64_t> copy = chosen->second;
          salts[store.fork(sequence)] = copy;
        }
        break;
      case 1: {
        const int64_t length = store.restorable(sequence, static_cast<int64_t>(random() % 2000));
        store.truncate(sequence, length);
        chosen->second.resize(static_cast<size_t>(length));
        break;
      }
      case 2:
        if (salts.size() > 1) {
          store.release(sequence);
          salts.erase(chosen);
        }
        break;
      default: {
        const auto tokens = static_cast<int64_t>(1 + random() % 150);
        append(store, sequence, tokens, 2, step % 9);
        chosen->second.insert(chosen->second.end(), static_cast<size_t>(tokens), step % 9);
      }
    }
    int64_t wrong = 0;
    for (const auto& [s, expected] : salts) {
      wrong += store.length(s) != static_cast<int64_t>(expected.size());
      for (int64_t layer = 0; layer < 2; ++layer) {
        const KvView view = store.view(s, layer);
        wrong += view.first_position !=
                 (chunks[layer] ? store.length(s) / chunks[layer] * chunks[layer] : 0);
        for (int64_t p = view.first_position; p < store.length(s); ++p)
          wrong += mark(store, s, layer, p) != mark_of(p, layer, expected[p]);
      }
    }
    CHECK_EQ(wrong, 0);
  }
  while (!salts.empty()) {
    store.release(salts.begin()->first);
    salts.erase(salts.begin());
  }
  CHECK_EQ(pages_in_use(store), 0);
}
TEST(random_lives) { live_randomly(KvSeal::kNone); }
TEST(random_lives_sealed) { live_randomly(KvSeal::kInt8); }
