#include "text/bpe.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <limits>

#include "base/error.h"
#include "text/table_file.h"

namespace puna {

namespace {

// Up to here a scan for the lowest rank is faster than a heap.
constexpr size_t kScanLength = 48;

uint64_t key_of(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

constexpr MergeTable::Merge kNoMerge{std::numeric_limits<uint32_t>::max(), -1};

void merge_by_scan(const MergeTable& merges, std::vector<int32_t>& symbols,
                   std::vector<int32_t>& out) {
  size_t count = symbols.size();
  MergeTable::Merge next[kScanLength];  // merge of symbol i with symbol i + 1
  const auto look = [&](size_t i) {
    const MergeTable::Merge* merge =
        i + 1 < count ? merges.find(symbols[i], symbols[i + 1]) : nullptr;
    next[i] = merge ? *merge : kNoMerge;
  };
  for (size_t i = 0; i < count; ++i) look(i);
  while (count > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < count; ++i) {
      if (next[i].rank < next[best].rank) best = i;
    }
    if (next[best].rank == kNoMerge.rank) break;
    symbols[best] = next[best].id;
    std::move(symbols.begin() + static_cast<int64_t>(best) + 2,
              symbols.begin() + static_cast<int64_t>(count),
              symbols.begin() + static_cast<int64_t>(best) + 1);
    std::move(next + best + 2, next + count, next + best + 1);
    --count;
    look(best);
    if (best > 0) look(best - 1);
  }
  out.insert(out.end(), symbols.begin(), symbols.begin() + static_cast<int64_t>(count));
}

// A heap of (rank << 32 | index of the left symbol), so that the lowest rank comes first and at
// ties the leftmost. Entries are not removed when a neighbour changes: one is stale unless its rank
// is that of the pair which stands there now.
void merge_by_heap(const MergeTable& merges, std::vector<int32_t>& symbols,
                   std::vector<int32_t>& out) {
  const auto count = static_cast<uint32_t>(symbols.size());
  std::vector<uint32_t> previous(count), following(count);
  std::vector<MergeTable::Merge> next(count);  // merge of a symbol with the one that follows it
  std::vector<uint64_t> heap;
  heap.reserve(count);
  const auto look = [&](uint32_t i) {
    const uint32_t j = following[i];
    const MergeTable::Merge* merge = j < count ? merges.find(symbols[i], symbols[j]) : nullptr;
    next[i] = merge ? *merge : kNoMerge;
    if (merge) heap.push_back(static_cast<uint64_t>(merge->rank) << 32 | i);
    return merge != nullptr;
  };
  for (uint32_t i = 0; i < count; ++i) {
    previous[i] = i - 1;  // of 0: not used
    following[i] = i + 1;
    look(i);
  }
  std::make_heap(heap.begin(), heap.end(), std::greater<>());
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    const uint64_t best = heap.back();
    heap.pop_back();
    const auto i = static_cast<uint32_t>(best);
    if (next[i].rank != best >> 32) continue;
    const uint32_t j = following[i];
    symbols[i] = next[i].id;
    next[j] = kNoMerge;  // its entries are stale from here on
    following[i] = following[j];
    if (following[i] < count) previous[following[i]] = i;
    if (look(i)) std::push_heap(heap.begin(), heap.end(), std::greater<>());
    if (i > 0 && look(previous[i])) std::push_heap(heap.begin(), heap.end(), std::greater<>());
  }
  for (uint32_t i = 0; i < count; i = following[i]) out.push_back(symbols[i]);
}

}  // namespace

size_t MergeTable::place(uint64_t key) const {
  const size_t mask = slots_.size() - 1;
  size_t slot = ShortKey::mixed(key ^ ShortKey::kSalt[0], ShortKey::kSalt[1]) & mask;
  size_t searched = 0;
  for (; slots_[slot].key != kEmpty && slots_[slot].key != key; slot = (slot + 1) & mask) {
    if (++searched > Vocabulary::kLongestSearch) Vocabulary::refuse_collisions("merges");
  }
  return slot;
}

void MergeTable::require_short_searches() const {
  size_t run = 0;
  for (const Slot& slot : slots_) {
    run = slot.key == kEmpty ? 0 : run + 1;
    if (run > Vocabulary::kLongestSearch) Vocabulary::refuse_collisions("merges");
  }
}

void MergeTable::reserve(size_t count) {
  size_t size = 64;
  while (size < count * 2) size *= 2;
  if (size <= slots_.size()) return;
  std::vector<Slot> old(size);
  old.swap(slots_);
  for (const Slot& slot : old) {
    if (slot.key != kEmpty) slots_[place(slot.key)] = slot;
  }
}

void MergeTable::add(int32_t left, int32_t right, Merge merge) {
  if ((used_ + 1) * 2 > slots_.size()) reserve(std::max<size_t>(64, used_ * 2));
  const size_t at = place(key_of(left, right));
  Slot& slot = slots_[at];
  if (slot.key != kEmpty) return;
  slot = {key_of(left, right), merge};
  if (++used_ > kMostMerges) {
    fail(ErrorCode::kModelFormat, "[tokenizer] there are more than ", kMostMerges, " merges");
  }
}

const MergeTable::Merge* MergeTable::find(int32_t left, int32_t right) const {
  if (slots_.empty()) return nullptr;
  const Slot& slot = slots_[place(key_of(left, right))];
  return slot.key == kEmpty ? nullptr : &slot.merge;
}

void MergeTable::save(TableWriter& out) const { out.table(slots_); }

bool MergeTable::load(TableReader& in, size_t ids) {
  if (!in.table(slots_)) return false;
  used_ = 0;
  for (const Slot& slot : slots_) {
    if (slot.key == kEmpty) continue;
    ++used_;
    // The highest rank is that of no merge at all.
    if (static_cast<uint32_t>(slot.merge.id) >= ids || slot.merge.rank == kNoMerge.rank)
      return false;
  }
  // A place is found by a mask, and enough are empty for every search to end.
  return slots_.empty() || (std::has_single_bit(slots_.size()) && 2 * used_ <= slots_.size());
}

void add_merges_of_ranks(const Vocabulary& vocabulary, MergeTable& merges) {
  merges.reserve(vocabulary.size() * 2);
  for (size_t id = 0; id < vocabulary.size(); ++id) {
    const auto rank = static_cast<uint32_t>(id);
    const std::string_view whole = vocabulary.ordinary(id);
    for (size_t cut = 1; cut < whole.size(); ++cut) {
      const int32_t left = vocabulary.find(whole.substr(0, cut));
      if (left == Vocabulary::kNone) continue;
      const int32_t right = vocabulary.find(whole.substr(cut));
      if (right != Vocabulary::kNone) merges.add(left, right, {rank, static_cast<int32_t>(id)});
    }
  }
  merges.require_short_searches();
}

void merge_pairs(const MergeTable& merges, std::vector<int32_t>& symbols,
                 std::vector<int32_t>& out) {
  if (symbols.size() > std::numeric_limits<uint32_t>::max()) {
    fail(ErrorCode::kInvalidRequest, "[tokenizer] a word of ", symbols.size(),
         " bytes is longer than 4 GiB");
  }
  if (symbols.size() <= kScanLength) {
    merge_by_scan(merges, symbols, out);
  } else {
    merge_by_heap(merges, symbols, out);
  }
}

}  // namespace puna
