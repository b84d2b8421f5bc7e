#include "backend/cpu/attention_call.h"

#include <algorithm>

namespace puna {
namespace {

// Leaves that several lanes work on at once, per lane, where there are too few tasks: their states
// need bounded memory.
constexpr int64_t kLaneLeaves = 8;
static_assert(KvStream::kHeld % kLeafPages == 0);

}  // namespace

AttentionCall::AttentionCall(Rows out, const AttentionInput& input, const KernelTable& kernels,
                             AttentionPlan& plan, PageChoice& choice, int lanes)
    : out_(out),
      head_dim_(input.layout.head_dim),
      heads_(input.heads),
      group_(input.heads / input.layout.kv_heads),
      plan_(plan),
      choice_(choice),
      walk_(kernels, input, plan, choice),
      rounds_(choice.any() ? PageChoice::kRounds : 1),
      tasks_(static_cast<int64_t>(plan.tasks().size())) {
  for (const AttentionPlan::Task& task : plan.tasks())
    most_rows_ = std::max(most_rows_, task.count * group_);
  split_ = tasks_ < 2 * lanes && plan.leaves() > 1;
  window_ = plan.leaves();
  if (plan.streams()) window_ = std::min(window_, KvStream::kHeld / kLeafPages);
  if (split_) window_ = std::min(window_, kLaneLeaves * lanes);
  lane_bytes_ = std::max(LaneScratch::bytes(most_rows_, head_dim_),
                         choice.any() ? choice.scratch_bytes() : int64_t{0});
  shared_bytes_ = carve(nullptr);
}

int64_t AttentionCall::carve(char* memory) {
  const int64_t rows = static_cast<int64_t>(plan_.queries().size()) * heads_;
  Carver carver(memory);
  l_ = carver.take<double>(rows);
  m_ = carver.take<float>(rows);
  leaves_ = carver.take<char>(split_ ? tasks_ * window_ * LeafState::bytes(most_rows_, head_dim_)
                                     : int64_t{0});
  return carver.used();
}

void AttentionCall::use(char* lane_memory, char* shared_memory) {
  lane_memory_ = lane_memory;
  carve(shared_memory);
}

LeafState AttentionCall::leaf_state(int64_t task, int64_t slot) const {
  Carver place(leaves_ + (task * window_ + slot) * LeafState::bytes(most_rows_, head_dim_));
  return LeafState::take(place, most_rows_, head_dim_);
}

RunningRow AttentionCall::running(const AttentionPlan::Task& task, int64_t row) const {
  const int64_t query = task.first + row / group_;
  const int64_t head = task.kv_head * group_ + row % group_;
  const int64_t at = first_row(query, task.kv_head) + row % group_;
  return {m_[at], l_[at], out_.row(plan_.queries()[query].out_row) + head * head_dim_};
}

void AttentionCall::run(ThreadPool& pool, bool alone) {
  for (int round = 0; round < rounds_; ++round) {
    if (choice_.any()) choose(pool, alone, round);
    for (int64_t first = 0; first < plan_.leaves(); first += window_) {
      const int64_t end = std::min(first + window_, plan_.leaves());
      plan_.fetch(first * kLeafPages, end * kLeafPages);
      TileCounter counter;
      pool.run(
          [&](const Lane& lane) {
            const LaneScratch scratch(lane_memory(lane), most_rows_, head_dim_);
            if (split_)
              attend_leaves(counter, scratch, first, end, round);
            else
              attend_tasks(counter, scratch, first, end, round);
          },
          alone);
      if (!split_) continue;
      pool.run([&](const Lane& lane) { merge_leaves(lane, first, end, round); }, alone);
    }
  }
  plan_.let_go();
  for (int64_t item = 0; item < choice_.items(); ++item) {
    const int64_t first = first_row(choice_.query_of(item), choice_.kv_head_of(item));
    choice_.report(item, m_ + first, l_ + first);
  }
  choice_.report_unread();
}

void AttentionCall::choose(ThreadPool& pool, bool alone, int round) {
  TileCounter counter;
  pool.run(
      [&](const Lane& lane) {
        for (int64_t item; (item = counter.next()) < choice_.items();) {
          if (round == 0) {
            choice_.choose(item, lane_memory(lane));
            continue;
          }
          const int64_t first = first_row(choice_.query_of(item), choice_.kv_head_of(item));
          choice_.choose_more(item, m_ + first, l_ + first, lane_memory(lane));
        }
      },
      alone);
  choice_.tell_streams(plan_, round);
}

void AttentionCall::attend_tasks(TileCounter& counter, const LaneScratch& scratch, int64_t first,
                                 int64_t end, int round) {
  for (int64_t tile; (tile = counter.next()) < tasks_;) {
    const AttentionPlan::Task& task = plan_.tasks()[tile];
    if (first >= task.leaves) continue;
    const int64_t last = std::min(end, task.leaves);
    walk_.load_queries(task, scratch);
    for (int64_t leaf = first; leaf < last; ++leaf) {
      const bool reads = walk_.reads(task, leaf, round);
      if (reads) walk_.attend(task, scratch, scratch.leaf, leaf, last * kLeafPages, round);
      for (int64_t row = 0; row < task.count * group_; ++row) {
        if (leaf == 0 && round == 0) running(task, row).clear(head_dim_);
        if (reads) merge(task, row, scratch.leaf, round);
        if (leaf == task.leaves - 1 && round == rounds_ - 1) running(task, row).finish(head_dim_);
      }
    }
  }
}

void AttentionCall::attend_leaves(TileCounter& counter, const LaneScratch& scratch, int64_t first,
                                  int64_t end, int round) {
  for (int64_t tile; (tile = counter.next()) < tasks_ * (end - first);) {
    // The tasks of a leaf are neighbours, and so are their heads in its pages.
    const AttentionPlan::Task& task = plan_.tasks()[tile % tasks_];
    const int64_t leaf = first + tile / tasks_;
    if (leaf >= task.leaves || !walk_.reads(task, leaf, round)) continue;
    walk_.load_queries(task, scratch);
    walk_.attend(task, scratch, leaf_state(tile % tasks_, leaf - first), leaf,
                 (leaf + 1) * kLeafPages, round);
  }
}

void AttentionCall::merge_leaves(const Lane& lane, int64_t first, int64_t end, int round) {
  const Part rows = lane.part(tasks_ * most_rows_);
  for (int64_t item = rows.begin; item < rows.end; ++item) {
    const AttentionPlan::Task& task = plan_.tasks()[item / most_rows_];
    const int64_t row = item % most_rows_;
    if (row >= task.count * group_ || first >= task.leaves) continue;
    if (first == 0 && round == 0) running(task, row).clear(head_dim_);
    for (int64_t leaf = first; leaf < std::min(end, task.leaves); ++leaf)
      if (walk_.reads(task, leaf, round))
        merge(task, row, leaf_state(item / most_rows_, leaf - first), round);
    if (end >= task.leaves && round == rounds_ - 1) running(task, row).finish(head_dim_);
  }
}

void AttentionCall::merge(const AttentionPlan::Task& task, int64_t row, const LeafState& leaf,
                          int round) {
  RunningRow state = running(task, row);
  if (round == 0) return state.merge(leaf, row, head_dim_);
  const int64_t query = task.first + row / group_;
  const float shift = choice_.shift(query);
  state.merge(leaf, row, head_dim_, shift);
  choice_.add_sampled(query, task.kv_head * group_ + row % group_, leaf.m[row] + shift,
                      leaf.l[row]);
}

}  // namespace puna
