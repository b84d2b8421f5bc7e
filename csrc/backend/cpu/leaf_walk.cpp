#include "backend/cpu/leaf_walk.h"

#include <algorithm>

namespace puna {

void LeafWalk::load_queries(const AttentionPlan::Task& task, const LaneScratch& lane) const {
  const int64_t width = group() * input_.layout.head_dim;
  for (int64_t i = 0; i < task.count; ++i) {
    const AttentionPlan::Query& query = plan_.queries()[task.first + i];
    std::copy_n(input_.qkv.row(query.row) + task.kv_head * width, width, lane.q + i * width);
  }
}

bool LeafWalk::reads(const AttentionPlan::Task& task, int64_t leaf, int round) const {
  if (!choice_.any()) return round == 0;
  for (int64_t i = 0; i < task.count; ++i)
    for (int64_t index = leaf * kLeafPages; index < (leaf + 1) * kLeafPages; ++index)
      if (page(task, i, index, round).data != nullptr) return true;
  return false;
}

void LeafWalk::attend(const AttentionPlan::Task& task, const LaneScratch& lane,
                      const LeafState& state, int64_t leaf, int64_t read_end, int round) const {
  const int64_t group = this->group();
  state.clear(task.count * group, input_.layout.head_dim);
  const int64_t end = (leaf + 1) * kLeafPages;
  for (int64_t index = leaf * kLeafPages; index < end; ++index)
    // Runs of queries that see the same page.
    for (int64_t i = 0; i < task.count;) {
      const AttentionPlan::PageView seen = page(task, i, index, round);
      int64_t count = 1;
      while (i + count < task.count && page(task, i + count, index, round) == seen) ++count;
      const AttentionPlan::PageView next =
          index + 1 < read_end ? page(task, i, index + 1, round) : AttentionPlan::PageView();
      if (seen.data != nullptr && seen.sealed)
        attend_sealed(task, lane, state, seen, next, i * group, count * group);
      else if (seen.data != nullptr)
        attend_open(task, lane, state, seen, next, index, i, count);
      i += count;
    }
}

AttentionPlan::PageView LeafWalk::page(const AttentionPlan::Task& task, int64_t i, int64_t index,
                                       int round) const {
  if (choice_.any() && !choice_.reads(task.first + i, task.kv_head, index, round)) return {};
  return plan_.page(plan_.queries()[task.first + i], index);
}

void LeafWalk::attend_open(const AttentionPlan::Task& task, const LaneScratch& lane,
                           const LeafState& state, const AttentionPlan::PageView& page,
                           const AttentionPlan::PageView& next, int64_t index, int64_t first,
                           int64_t count) const {
  const KvPageLayout& layout = input_.layout;
  const int64_t n = layout.head_dim, group = this->group();
  int32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t seen = plan_.page(plan_.queries()[task.first + first + i], index).tokens;
    std::fill_n(lane.visible + i * group, group, seen);
    most = std::max(most, seen);
  }
  const int64_t row = first * group;
  AttendPage call;
  call.q = lane.q + row * n;
  call.q_stride = n;
  call.visible = lane.visible;
  call.k = page.data + layout.key_offset(task.kv_head);
  call.v = page.data + layout.value_offset(task.kv_head);
  call.next =
      next.data == nullptr || next.sealed ? nullptr : next.data + layout.key_offset(task.kv_head);
  call.rows = static_cast<int32_t>(count * group);
  call.head_dim = static_cast<int32_t>(n);
  call.tokens = most;
  call.m = state.m + row;
  call.l = state.l + row;
  call.o = state.o + row * n;
  call.scores = lane.scores;
  (layout.dtype == DType::kF32 ? kernels_.attend_page_f32 : kernels_.attend_page_bf16)(call);
}

void LeafWalk::attend_sealed(const AttentionPlan::Task& task, const LaneScratch& lane,
                             const LeafState& state, const AttentionPlan::PageView& page,
                             const AttentionPlan::PageView& next, int64_t row, int64_t rows) const {
  const KvSealedLayout& layout = input_.sealed;
  const bool int8 = layout.format == KvSeal::kInt8;
  const int64_t n = layout.head_dim, head = task.kv_head;
  const auto at = [](const AttentionPlan::PageView& view, size_t offset) {
    return reinterpret_cast<const uint8_t*>(view.data) + offset;
  };
  AttendSealed call = {};
  call.q = lane.q + row * n;
  call.q_stride = n;
  call.upper = at(page, layout.upper_offset(head));
  if (int8) call.lower = at(page, layout.lower_offset(head));
  call.values = at(page, layout.value_offset(head));
  call.key_scales = reinterpret_cast<const uint16_t*>(at(page, layout.key_scale_offset(head)));
  call.value_scales = reinterpret_cast<const uint16_t*>(at(page, layout.value_scale_offset(head)));
  if (next.data != nullptr && next.sealed) {
    call.next_upper = at(next, layout.upper_offset(head));
    if (int8) call.next_lower = at(next, layout.lower_offset(head));
    call.next_key_scales =
        reinterpret_cast<const uint16_t*>(at(next, layout.key_scale_offset(head)));
  }
  call.rows = static_cast<int32_t>(rows);
  call.head_dim = static_cast<int32_t>(n);
  call.m = state.m + row;
  call.l = state.l + row;
  call.o = state.o + row * n;
  call.scratch = lane.scores;
  (int8 ? kernels_.attend_sealed_int8 : kernels_.attend_sealed_int4)(call);
}

}  // namespace puna
