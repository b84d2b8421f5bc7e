// Attention over pages of keys and values; the reduction is described in attention_leaf.h.
#include <algorithm>
#include <cmath>

#include "backend/checks.h"
#include "backend/cpu/attention_leaf.h"
#include "backend/cpu/attention_plan.h"
#include "backend/cpu/implementation.h"
#include "backend/cpu/page_choice.h"
#include "backend/kv_seal.h"
#include "base/half.h"

namespace puna {
namespace {

// Leaves that several lanes work on at once, per lane, where there are too few tasks: their states
// need bounded memory.
constexpr int64_t kLaneLeaves = 8;
static_assert(KvStream::kHeld % kLeafPages == 0);
static_assert(kPageTokens == kSealedTokens && kKeyBlockTokens == kKeyBlock);
static_assert(kSealedMostDim == kSealedDim);

// What all lanes share.
struct CallMemory {
  CallMemory(char* memory, int64_t rows, int64_t leaf_bytes) {
    Carver carver(memory);
    l = carver.take<double>(rows);
    m = carver.take<float>(rows);
    leaves = carver.take<char>(leaf_bytes);
    used = carver.used();
  }

  int64_t used;
  double* l;  // of the running states, [rows of out][heads]
  float* m;
  char* leaves;  // states, [tasks][window]
};

// A leaf of a task: attend() walks its pages for the task's rows, which lie in the lane's scratch.
class LeafWalk {
 public:
  LeafWalk(const KernelTable& kernels, const AttentionInput& input, const AttentionPlan& plan,
           const PageChoice& choice)
      : kernels_(kernels), input_(input), plan_(plan), choice_(choice) {}

  // Row i * group + g is head g of the group at the task's query i.
  void load_queries(const AttentionPlan::Task& task, const LaneScratch& lane) const {
    const int64_t n = input_.layout.head_dim, group = input_.heads / input_.layout.kv_heads;
    for (int64_t i = 0; i < task.count; ++i) {
      const AttentionPlan::Query& query = plan_.queries()[task.first + i];
      std::copy_n(input_.qkv.row(query.row) + task.kv_head * group * n, group * n,
                  lane.q + i * group * n);
    }
  }

  // Whether any of the task's queries reads a page of the leaf.
  bool reads(const AttentionPlan::Task& task, int64_t leaf, int round) const {
    if (!choice_.any()) return round == 0;
    for (int64_t i = 0; i < task.count; ++i)
      for (int64_t index = leaf * kLeafPages; index < (leaf + 1) * kLeafPages; ++index)
        if (page(task, i, index, round).data != nullptr) return true;
    return false;
  }

  // Pages from `read_end` on will not be read by this lane after this leaf.
  void attend(const AttentionPlan::Task& task, const LaneScratch& lane, const LeafState& state,
              int64_t leaf, int64_t read_end, int round) const {
    const int64_t n = input_.layout.head_dim, group = input_.heads / input_.layout.kv_heads;
    state.clear(task.count * group, n);
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

 private:
  AttentionPlan::PageView page(const AttentionPlan::Task& task, int64_t i, int64_t index,
                               int round) const {
    if (choice_.any() && !choice_.reads(task.first + i, task.kv_head, index, round)) return {};
    return plan_.page(plan_.queries()[task.first + i], index);
  }

  void attend_open(const AttentionPlan::Task& task, const LaneScratch& lane, const LeafState& state,
                   const AttentionPlan::PageView& page, const AttentionPlan::PageView& next,
                   int64_t index, int64_t first, int64_t count) const {
    const KvPageLayout& layout = input_.layout;
    const int64_t n = layout.head_dim, group = input_.heads / layout.kv_heads;
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

  void attend_sealed(const AttentionPlan::Task& task, const LaneScratch& lane,
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
    call.value_scales =
        reinterpret_cast<const uint16_t*>(at(page, layout.value_scale_offset(head)));
    if (next.data != nullptr && next.sealed) {
      call.next_upper = at(next, layout.upper_offset(head));
      if (int8) call.next_lower = at(next, layout.lower_offset(head));
    }
    call.rows = static_cast<int32_t>(rows);
    call.head_dim = static_cast<int32_t>(n);
    call.m = state.m + row;
    call.l = state.l + row;
    call.o = state.o + row * n;
    call.scratch = lane.scores;
    (int8 ? kernels_.attend_sealed_int8 : kernels_.attend_sealed_int4)(call);
  }

  const KernelTable& kernels_;
  const AttentionInput& input_;
  const AttentionPlan& plan_;
  const PageChoice& choice_;
};

}  // namespace

// RoPE, QK norm, temperature and the softmax scale of one query head, in place.
void CpuBackend::turn_query(const AttentionInput& input, int64_t row, int64_t head) const {
  const int64_t n = input.layout.head_dim;
  float* q = input.qkv.row(row) + head * n;
  if (input.cos != nullptr)
    kernels_.rope(q, input.cos + row * (n / 2), input.sin + row * (n / 2), n);
  if (input.qk_norm) kernels_.rms_norm(q, q, nullptr, n, input.qk_norm_eps);
  const double temperature = input.temperature != nullptr ? input.temperature[row] : 1.0;
  kernels_.scale(q, q, static_cast<float>(temperature / std::sqrt(static_cast<double>(n))), n);
}

// Key and value of one row and KV head, into their page.
void CpuBackend::append(const AttentionInput& input, const AttentionSegment& segment, int64_t i,
                        int64_t kv_head) const {
  const KvPageLayout& layout = input.layout;
  const int64_t n = layout.head_dim, row = segment.first_row + i;
  float* key = input.qkv.row(row) + (input.heads + kv_head) * n;
  float* value = key + layout.kv_heads * n;
  if (input.cos != nullptr)
    kernels_.rope(key, input.cos + row * (n / 2), input.sin + row * (n / 2), n);
  if (input.qk_norm) kernels_.rms_norm(key, key, nullptr, n, input.qk_norm_eps);

  const int64_t token = segment.position + i - segment.first_position;
  auto* page = static_cast<char*>(segment.open[token / kPageTokens - segment.first_open]);
  void* keys = page + layout.key_offset(kv_head);
  void* values = page + layout.value_offset(kv_head);
  const int64_t at_key = layout.key_index(token % kPageTokens, 0);
  const int64_t at_value = layout.value_index(token % kPageTokens, 0);
  if (layout.dtype == DType::kF32) {
    for (int64_t c = 0; c < n; ++c)
      static_cast<float*>(keys)[at_key + c * kKeyBlockTokens] = key[c];
    std::copy_n(value, n, static_cast<float*>(values) + at_value);
  } else {
    for (int64_t c = 0; c < n; ++c)
      static_cast<uint16_t*>(keys)[at_key + c * kKeyBlockTokens] = bf16_of_float(key[c]);
    kernels_.bf16_from_f32(static_cast<uint16_t*>(values) + at_value, value, n);
  }
}

void CpuBackend::attention(Rows out, const AttentionInput& input) {
  check_attention(out, input);
  if (input.qkv.rows == 0) return;
  const KvPageLayout& layout = input.layout;
  const int64_t n = layout.head_dim, group = input.heads / layout.kv_heads;
  AttentionPlan& plan = attention_plan_;
  plan.build(input, std::max<int64_t>(1, kTaskRows / group));
  PageChoice& choice = page_choice_;
  choice.build(input, plan, kernels_);
  const auto queries = static_cast<int64_t>(plan.queries().size());
  const auto tasks = static_cast<int64_t>(plan.tasks().size());
  int64_t most_rows = 0;
  for (const AttentionPlan::Task& task : plan.tasks())
    most_rows = std::max(most_rows, task.count * group);

  // Fewer tasks than would occupy the lanes (decode): leaves are shared out as well. Leaves come in
  // windows, of as many as streams may hold or as lanes may have states of.
  const bool split = tasks < 2 * pool_.lanes() && plan.leaves() > 1;
  int64_t window = plan.leaves();
  if (plan.streams()) window = std::min(window, KvStream::kHeld / kLeafPages);
  if (split) window = std::min(window, kLaneLeaves * pool_.lanes());

  const int64_t lane_bytes = std::max(LaneScratch::bytes(most_rows, n),
                                      choice.any() ? choice.scratch_bytes() : int64_t{0});
  auto* lane_memory = lanes_.reserve<char>(pool_.lanes() * lane_bytes);
  const int64_t leaf_bytes = LeafState::bytes(most_rows, n);
  const int64_t states = split ? tasks * window : 0;
  const CallMemory size(nullptr, queries * input.heads, states * leaf_bytes);
  const CallMemory memory(leaves_.reserve<char>(size.used), queries * input.heads,
                          states * leaf_bytes);
  const auto leaf_state = [&](int64_t task, int64_t slot) {
    Carver place(memory.leaves + (task * window + slot) * leaf_bytes);
    return LeafState::take(place, most_rows, n);
  };
  const auto first_row = [&](int64_t query, int64_t kv_head) {  // of a group, in memory.m
    return plan.queries()[query].out_row * input.heads + kv_head * group;
  };
  const auto running = [&](const AttentionPlan::Task& task, int64_t row) -> RunningRow {
    const int64_t out_row = plan.queries()[task.first + row / group].out_row;
    const int64_t head = task.kv_head * group + row % group;
    const int64_t at = out_row * input.heads + head;
    return {memory.m[at], memory.l[at], out.row(out_row) + head * n};
  };

  const LeafWalk walk(kernels_, input, plan, choice);
  const int rounds = choice.any() ? PageChoice::kRounds : 1;
  TileCounter counter;
  // Which pages the round reads, and what the last one has read so far.
  const auto choose = [&](Lane& lane, char* scratch, int round) {
    if (lane.id() == 0) counter.reset();
    lane.barrier();
    for (int64_t item; (item = counter.next()) < choice.items();) {
      if (round == 0) {
        choice.choose(item, scratch);
        continue;
      }
      const int64_t first = first_row(choice.query_of(item), choice.kv_head_of(item));
      choice.choose_more(item, memory.m + first, memory.l + first, scratch);
    }
    lane.barrier();
  };
  const auto merge = [&](const AttentionPlan::Task& task, int64_t row, const LeafState& leaf,
                         int round) {
    RunningRow state = running(task, row);
    if (round == 0) return state.merge(leaf, row, n);
    const int64_t query = task.first + row / group;
    const float shift = choice.shift(query);
    state.merge(leaf, row, n, shift);
    choice.add_sampled(query, task.kv_head * group + row % group, leaf.m[row] + shift, leaf.l[row]);
  };
  const auto attend = [&](Lane& lane, const LaneScratch& scratch, int round) {
    for (int64_t first = 0; first < plan.leaves(); first += window) {
      const int64_t end = std::min(first + window, plan.leaves());
      if (lane.id() == 0) {
        // What comes through streams is read in the first round.
        if (round == 0) plan.fetch(first * kLeafPages, end * kLeafPages);
        counter.reset();
      }
      lane.barrier();

      if (!split) {
        for (int64_t tile; (tile = counter.next()) < tasks;) {
          const AttentionPlan::Task& task = plan.tasks()[tile];
          if (first >= task.leaves) continue;
          const int64_t last = std::min(end, task.leaves);
          walk.load_queries(task, scratch);
          for (int64_t leaf = first; leaf < last; ++leaf) {
            const bool reads = walk.reads(task, leaf, round);
            if (reads) walk.attend(task, scratch, scratch.leaf, leaf, last * kLeafPages, round);
            for (int64_t row = 0; row < task.count * group; ++row) {
              if (leaf == 0 && round == 0) running(task, row).clear(n);
              if (reads) merge(task, row, scratch.leaf, round);
              if (leaf == task.leaves - 1 && round == rounds - 1) running(task, row).finish(n);
            }
          }
        }
        lane.barrier();
        continue;
      }

      for (int64_t tile; (tile = counter.next()) < tasks * (end - first);) {
        // The tasks of a leaf are neighbours, and so are their heads in its pages.
        const AttentionPlan::Task& task = plan.tasks()[tile % tasks];
        const int64_t leaf = first + tile / tasks;
        if (leaf >= task.leaves || !walk.reads(task, leaf, round)) continue;
        walk.load_queries(task, scratch);
        walk.attend(task, scratch, leaf_state(tile % tasks, leaf - first), leaf,
                    (leaf + 1) * kLeafPages, round);
      }
      lane.barrier();
      const Part rows = lane.part(tasks * most_rows);
      for (int64_t item = rows.begin; item < rows.end; ++item) {
        const AttentionPlan::Task& task = plan.tasks()[item / most_rows];
        const int64_t row = item % most_rows;
        if (row >= task.count * group || first >= task.leaves) continue;
        if (first == 0 && round == 0) running(task, row).clear(n);
        for (int64_t leaf = first; leaf < std::min(end, task.leaves); ++leaf)
          if (walk.reads(task, leaf, round))
            merge(task, row, leaf_state(item / most_rows, leaf - first), round);
        if (end >= task.leaves && round == rounds - 1) running(task, row).finish(n);
      }
      lane.barrier();
    }
  };
  pool_.run([&](Lane& lane) {
    prepare_attention(lane, input);
    char* const own = lane_memory + lane.id() * lane_bytes;
    const LaneScratch scratch(own, most_rows, n);
    for (int round = 0; round < rounds; ++round) {
      if (choice.any()) choose(lane, own, round);
      attend(lane, scratch, round);
    }
  });
  plan.fetch(plan.leaves() * kLeafPages, plan.leaves() * kLeafPages);
  for (int64_t item = 0; item < choice.items(); ++item) {
    const int64_t first = first_row(choice.query_of(item), choice.kv_head_of(item));
    choice.report(item, memory.m + first, memory.l + first);
  }
}

// Queries are turned, keys and values go into their pages, and pages that are full now are sealed.
void CpuBackend::prepare_attention(Lane& lane, const AttentionInput& input) const {
  const AttentionPlan& plan = attention_plan_;
  const int64_t kv_heads = input.layout.kv_heads, rows = input.qkv.rows;
  // By head, then by row: what a lane writes into a page lies together.
  const int64_t turns = input.heads * static_cast<int64_t>(plan.queries().size());
  const Part part = lane.part(turns + kv_heads * rows);
  size_t at = 0;  // the segment of the row
  for (int64_t item = part.begin; item < part.end; ++item) {
    if (item < turns) {
      turn_query(input, plan.queries()[item / input.heads].row, item % input.heads);
      continue;
    }
    const int64_t head = (item - turns) / rows, row = (item - turns) % rows;
    if (row < input.segments[at].first_row) at = 0;
    while (row >= input.segments[at].first_row + input.segments[at].rows) ++at;
    append(input, input.segments[at], row - input.segments[at].first_row, head);
  }
  lane.barrier();
  if (plan.full_pages().empty()) return;
  const auto pages = static_cast<int64_t>(plan.full_pages().size());
  const Part shares = lane.part(pages * kv_heads);
  for (int64_t item = shares.begin; item < shares.end; ++item) {
    const AttentionPlan::FullPage& page = plan.full_pages()[item / kv_heads];
    seal_head(page.sealed, input.sealed, page.open, input.layout, item % kv_heads);
  }
  lane.barrier();
}

}  // namespace puna
