// Which pages are read by queries whose attention is not exact (base/attention_mode.h).
//
// There are two rounds. Certified attention reads in the first what should do, by estimates of what
// pages weigh; the weight of what was read is exact then, and the second round reads what is still
// missing. Budget attention reads the sample in the second round.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/attention_plan.h"
#include "kernels/kernel_table.h"

namespace puna {

class PageChoice {
 public:
  static constexpr int kRounds = 2;

  // After plan.build(): the queries whose segments have a mode.
  void build(const AttentionInput& input, const AttentionPlan& plan, const KernelTable& kernels);
  bool any() const { return !items_.empty(); }
  // One KV head of one such query.
  int64_t items() const { return static_cast<int64_t>(items_.size()); }
  // Bytes that choose() and choose_more() need, aligned to 64.
  int64_t scratch_bytes() const;

  // Before the first round. Items may be chosen for by any lane.
  void choose(int64_t item, char* scratch);
  // Between the rounds, with m and l of the group's rows: what they have read.
  void choose_more(int64_t item, const float* m, const double* l, char* scratch);
  // After either: which pages of streams the round reads.
  void tell_streams(AttentionPlan& plan, int round);
  // A row's part of the second round, which is weighed so much heavier, has been read: a leaf's.
  float shift(int64_t query) const;
  void add_sampled(int64_t query, int64_t head, float m, float l);
  // After the second round, with m and l of all that was read.
  void report(int64_t item, const float* m, const double* l) const;
  void report_unread() const;  // of streams

  // Of the group's rows of an item: the first query head.
  int64_t query_of(int64_t item) const { return items_[item].query; }
  int64_t kv_head_of(int64_t item) const { return items_[item].kv_head; }

  // Whether a page before the query's own, or its own, is read in this round.
  bool reads(int64_t query, int64_t kv_head, int64_t page, int round) const {
    const int64_t first = first_item_[query];
    if (first < 0) return round == 0;
    const Item& item = items_[first + kv_head];
    const uint8_t mark = page < item.pages ? marks_[item.marks + page] : uint8_t{1};
    return (mark >> round & 1) != 0;
  }

 private:
  struct Item {
    int64_t query, kv_head;
    int64_t pages;  // before its own
    int64_t marks;  // where they begin: a byte a page, a bit for each round
    const AttentionMode* mode;
  };
  // Of one row of an item.
  struct Row {
    double skipped = 0;             // log of the most that pages left out weigh
    double first = 0, first_m = 0;  // weight after the first round, in units of exp(first_m)
    double squares = 0;             // of what the leaves of the sample weigh, in the same units
  };
  struct Scores;

  bool skippable(const Item& item, int64_t page) const;
  const uint8_t* page_data(const Item& item, int64_t page) const;  // null: comes through a stream
  // Of the item's head; null: not known before the page has come.
  const uint16_t* key_scales(const Item& item, int64_t page) const;
  void rank_page(const Item& item, int64_t page, const float* q, float* most, float* middle) const;
  // What the query's own page weighs.
  void attend_own(const Item& item, Scores& scores) const;
  void screen(const Item& item, Scores& scores) const;
  // Marks for `round`, in the order of what they can weigh, until the others weigh at most tau of
  // exp(totals[row]).
  void certify(const Item& item, int64_t index, Scores& scores, const double* totals, double tau,
               int round);
  void rank(const Item& item, Scores& scores);

  const AttentionInput* input_ = nullptr;
  const AttentionPlan* plan_ = nullptr;
  const KernelTable* kernels_ = nullptr;
  int64_t group_ = 0, most_pages_ = 0;
  std::vector<int64_t> first_item_;  // by query; -1: exact
  std::vector<Item> items_;
  std::vector<uint8_t> marks_;
  std::vector<Row> rows_;                     // [items][group]
  std::vector<std::vector<uint8_t>> unread_;  // [streams][pages]: 1 if nobody reads it
};

}  // namespace puna
