// One leaf of a task: its pages are walked in order, from a fresh state.
#pragma once

#include <cstdint>

#include "backend/backend.h"
#include "backend/cpu/attention_leaf.h"
#include "backend/cpu/attention_plan.h"
#include "backend/cpu/page_choice.h"
#include "kernels/kernel_table.h"

namespace puna {

class LeafWalk {
 public:
  LeafWalk(const KernelTable& kernels, const AttentionInput& input, const AttentionPlan& plan,
           const PageChoice& choice)
      : kernels_(kernels), input_(input), plan_(plan), choice_(choice) {}

  // Into the lane's scratch, where attend() finds them: row i * group + g is head g of the group at
  // the task's query i.
  void load_queries(const AttentionPlan::Task& task, const LaneScratch& lane) const;
  // Whether any of the task's queries reads a page of the leaf.
  bool reads(const AttentionPlan::Task& task, int64_t leaf, int round) const;
  // Pages from `read_end` on will not be read by this lane after this leaf.
  void attend(const AttentionPlan::Task& task, const LaneScratch& lane, const LeafState& state,
              int64_t leaf, int64_t read_end, int round) const;

 private:
  int64_t group() const { return input_.heads / input_.layout.kv_heads; }
  AttentionPlan::PageView page(const AttentionPlan::Task& task, int64_t i, int64_t index,
                               int round) const;
  // Queries [first, first + count) of the task, which see this page.
  void attend_open(const AttentionPlan::Task& task, const LaneScratch& lane, const LeafState& state,
                   const AttentionPlan::PageView& page, const AttentionPlan::PageView& next,
                   int64_t index, int64_t first, int64_t count) const;
  // Rows of the leaf's state.
  void attend_sealed(const AttentionPlan::Task& task, const LaneScratch& lane,
                     const LeafState& state, const AttentionPlan::PageView& page,
                     const AttentionPlan::PageView& next, int64_t row, int64_t rows) const;

  const KernelTable& kernels_;
  const AttentionInput& input_;
  const AttentionPlan& plan_;
  const PageChoice& choice_;
};

}  // namespace puna
