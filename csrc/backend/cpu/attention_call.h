// One call of attention, after keys and values have been written: what the lanes do together.
//
// Tasks (a KV head and some queries) are shared out among the lanes. Where there are too few of
// them, as in decoding, their leaves are shared out as well. Leaves come in windows: of as many as
// streams may hold, or as the lanes have states for. What is not exact takes two rounds over them
// (page_choice.h).
#pragma once

#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/attention_leaf.h"
#include "backend/cpu/attention_plan.h"
#include "backend/cpu/leaf_walk.h"
#include "backend/cpu/page_choice.h"
#include "kernels/kernel_table.h"
#include "platform/thread_pool.h"

namespace puna {

class AttentionCall {
 public:
  // `plan` and `choice` are built.
  AttentionCall(Rows out, const AttentionInput& input, const KernelTable& kernels,
                AttentionPlan& plan, PageChoice& choice, int lanes);

  // Memory that it needs, aligned to 64: for each lane, and for all.
  int64_t lane_bytes() const { return lane_bytes_; }
  int64_t shared_bytes() const { return shared_bytes_; }
  void use(char* lane_memory, char* shared_memory);

  // On all lanes, or on the calling thread alone.
  void run(ThreadPool& pool, bool alone);

 private:
  // A row of a task as it goes on from leaf to leaf.
  RunningRow running(const AttentionPlan::Task& task, int64_t row) const;
  // Of the rows of a query and KV head, the place of the first in m_ and l_.
  int64_t first_row(int64_t query, int64_t kv_head) const {
    return plan_.queries()[query].out_row * heads_ + kv_head * group_;
  }
  LeafState leaf_state(int64_t task, int64_t slot) const;
  int64_t carve(char* memory);

  char* lane_memory(const Lane& lane) const { return lane_memory_ + lane.id() * lane_bytes_; }

  // Which pages the round reads, by what the one before has read.
  void choose(ThreadPool& pool, bool alone, int round);
  // The leaves [first, end) of a window, by tasks or by leaves of them.
  void attend_tasks(TileCounter& counter, const LaneScratch& scratch, int64_t first, int64_t end,
                    int round);
  void attend_leaves(TileCounter& counter, const LaneScratch& scratch, int64_t first, int64_t end,
                     int round);
  void merge_leaves(const Lane& lane, int64_t first, int64_t end, int round);
  void merge(const AttentionPlan::Task& task, int64_t row, const LeafState& leaf, int round);

  const Rows out_;
  const int64_t head_dim_, heads_, group_;
  AttentionPlan& plan_;
  PageChoice& choice_;
  const LeafWalk walk_;
  const int rounds_;
  const int64_t tasks_;
  int64_t most_rows_ = 0;  // of a task
  bool split_ = false;     // tasks into leaves
  int64_t window_ = 0;     // leaves
  int64_t lane_bytes_ = 0, shared_bytes_ = 0;
  char* lane_memory_ = nullptr;
  double* l_ = nullptr;  // of the running states, [rows of out][heads]
  float* m_ = nullptr;
  char* leaves_ = nullptr;  // states, [tasks][window]
};

}  // namespace puna
