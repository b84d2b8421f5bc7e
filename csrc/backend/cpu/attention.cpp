// Attention over pages of keys and values.
//
// The reduction. Tokens are counted from the first one a layer still holds. The 8 pages (2048
// tokens) from a multiple of 2048 on form a leaf: attend_page walks them in order from a fresh
// state (m, l, o), all fp32. Leaves are merged in order into a running state (m fp32, l fp64, o
// fp32):
//   m' = max(m, m_leaf); l' = l * exp(m - m') + l_leaf * exp(m_leaf - m'); o' likewise; out = o /
//   l.
// A single running fp32 sum over millions of tokens would stop growing; sums of 2048 and their
// fp64 total do not. What is added to what depends on positions only: not on lanes, on the query
// rows beside, or on the cuts of the prompt.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "backend/checks.h"
#include "backend/cpu/implementation.h"
#include "base/half.h"

namespace puna {
namespace {

constexpr int64_t kLeafPages = 8;
// Query rows (of all heads in a group) handled together, so that a page is read once for all of
// them; their states and scores stay in L2.
constexpr int64_t kTaskRows = 160;

int64_t pages_for(int64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }
int64_t leaves_for(int64_t tokens) { return (pages_for(tokens) + kLeafPages - 1) / kLeafPages; }

// A leaf's softmax state of some rows.
struct LeafState {
  float* m;  // [rows]
  float* l;  // [rows]
  float* o;  // [rows][head_dim]
};

struct RunningState {
  float* m;
  double* l;
  float* o;
};

// Hands out consecutive cache-line aligned arrays of a piece of memory; from a null pointer it only
// adds up their size.
class Carver {
 public:
  explicit Carver(char* memory) : memory_(memory) {}
  template <class T>
  T* take(int64_t count) {
    T* array = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return array;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

LeafState take_leaf(Carver& carver, int64_t rows, int64_t head_dim) {
  LeafState leaf;
  leaf.m = carver.take<float>(rows);
  leaf.l = carver.take<float>(rows);
  leaf.o = carver.take<float>(rows * head_dim);
  return leaf;
}

RunningState take_running(Carver& carver, int64_t rows, int64_t head_dim) {
  RunningState running;
  running.m = carver.take<float>(rows);
  running.l = carver.take<double>(rows);
  running.o = carver.take<float>(rows * head_dim);
  return running;
}

// What a lane needs for `rows` query rows.
struct LaneScratch {
  LaneScratch(char* memory, int64_t rows, int64_t head_dim) : carver(memory) {
    q = carver.take<float>(rows * head_dim);
    seen = carver.take<int64_t>(rows);
    visible = carver.take<int32_t>(rows);
    scores = carver.take<float>(rows * kPageTokens);
    leaf = take_leaf(carver, rows, head_dim);
    running = take_running(carver, rows, head_dim);
  }

  Carver carver;
  float* q;          // [rows][head_dim], scaled
  int64_t* seen;     // [rows]: tokens of the pages that the row attends to
  int32_t* visible;  // [rows]: of them, in the page at hand
  float* scores;
  LeafState leaf;
  RunningState running;
};

// The keys and values of one head.
struct HeadPages {
  void (*attend)(const AttendPage&);
  void* const* pages;
  size_t key_offset, value_offset;  // within a page
};

void attend_leaf(const HeadPages& head, const LaneScratch& lane, int64_t rows, int64_t head_dim,
                 int64_t leaf, const LeafState& state) {
  std::fill_n(state.m, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(state.l, rows, 0.0f);
  std::fill_n(state.o, rows * head_dim, 0.0f);
  const int64_t most = *std::max_element(lane.seen, lane.seen + rows);
  const int64_t end = std::min(pages_for(most), (leaf + 1) * kLeafPages);
  for (int64_t page = leaf * kLeafPages; page < end; ++page) {
    const auto* data = static_cast<const char*>(head.pages[page]);
    const int64_t before = page * kPageTokens;
    for (int64_t r = 0; r < rows; ++r)
      lane.visible[r] =
          static_cast<int32_t>(std::clamp<int64_t>(lane.seen[r] - before, 0, kPageTokens));
    AttendPage call;
    call.q = lane.q;
    call.q_stride = head_dim;
    call.visible = lane.visible;
    call.k = data + head.key_offset;
    call.v = data + head.value_offset;
    call.rows = static_cast<int32_t>(rows);
    call.head_dim = static_cast<int32_t>(head_dim);
    call.tokens = static_cast<int32_t>(std::min(kPageTokens, most - before));
    call.m = state.m;
    call.l = state.l;
    call.o = state.o;
    call.scores = lane.scores;
    head.attend(call);
  }
}

void clear(const RunningState& state, int64_t rows, int64_t head_dim) {
  std::fill_n(state.m, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(state.l, rows, 0.0);
  std::fill_n(state.o, rows * head_dim, 0.0f);
}

void merge(const RunningState& running, const LeafState& leaf, int64_t rows, int64_t head_dim) {
  for (int64_t r = 0; r < rows; ++r) {
    if (leaf.l[r] == 0) continue;  // the row sees nothing of this leaf
    const float m = std::max(running.m[r], leaf.m[r]);
    const double old_factor = std::exp(static_cast<double>(running.m[r]) - m);
    const double new_factor = std::exp(static_cast<double>(leaf.m[r]) - m);
    running.m[r] = m;
    running.l[r] = running.l[r] * old_factor + leaf.l[r] * new_factor;
    float* o = running.o + r * head_dim;
    const float* x = leaf.o + r * head_dim;
    const auto a = static_cast<float>(old_factor), b = static_cast<float>(new_factor);
    for (int64_t c = 0; c < head_dim; ++c) o[c] = o[c] * a + x[c] * b;
  }
}

void write_row(float* out, const RunningState& state, int64_t r, int64_t head_dim) {
  const double inverse = 1.0 / state.l[r];
  for (int64_t c = 0; c < head_dim; ++c)
    out[c] = static_cast<float>(state.o[r * head_dim + c] * inverse);
}

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
  auto* page = static_cast<char*>(segment.open[token / kPageTokens]);
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
  if (out.rows == 0) return;
  const KvPageLayout& layout = input.layout;
  const int64_t n = layout.head_dim, group = input.heads / layout.kv_heads;
  const int64_t task_queries = std::max<int64_t>(1, kTaskRows / group);

  // The last rows see most: they come first, so that lanes end together.
  tasks_.clear();
  int64_t most_leaves = 0, most_rows = 0;
  for (const AttentionSegment& segment : input.segments) {
    most_leaves =
        std::max(most_leaves, leaves_for(segment.position + segment.rows - segment.first_position));
    most_rows = std::max(most_rows, std::min(task_queries, segment.rows) * group);
    for (int64_t end = segment.rows; end > 0; end -= std::min(end, task_queries))
      for (int64_t head = 0; head < layout.kv_heads; ++head) {
        const int64_t count = std::min(end, task_queries);
        tasks_.push_back({&segment, head, end - count, count});
      }
  }
  const auto tasks = static_cast<int64_t>(tasks_.size());
  // Fewer tasks than would occupy the lanes (decode): leaves are shared out as well, a wave of them
  // at a time, so that their states need bounded memory.
  const bool split_leaves = tasks < 2 * pool_.lanes() && most_leaves > 1;
  const int64_t wave = split_leaves ? std::min<int64_t>(most_leaves, 8 * pool_.lanes()) : 0;

  const int64_t lane_bytes = LaneScratch(nullptr, most_rows, n).carver.used();
  auto* lane_memory = lanes_.reserve<char>(pool_.lanes() * lane_bytes);
  Carver leaf_size(nullptr), running_size(nullptr);
  take_leaf(leaf_size, most_rows, n);
  take_running(running_size, most_rows, n);
  auto* leaf_memory = leaves_.reserve<char>(
      split_leaves ? tasks * (wave * leaf_size.used() + running_size.used()) : 0);
  char* running_memory = leaf_memory + (split_leaves ? tasks * wave * leaf_size.used() : 0);
  const auto leaf_state = [&](int64_t task, int64_t slot) {
    Carver carver(leaf_memory + (task * wave + slot) * leaf_size.used());
    return take_leaf(carver, most_rows, n);
  };
  const auto running_state = [&](int64_t task) {
    Carver carver(running_memory + task * running_size.used());
    return take_running(carver, most_rows, n);
  };

  const auto head_pages = [&](const AttentionTask& task) {
    return HeadPages{
        layout.dtype == DType::kF32 ? kernels_.attend_page_f32 : kernels_.attend_page_bf16,
        task.segment->open.data(), layout.key_offset(task.kv_head),
        layout.value_offset(task.kv_head)};
  };
  // Row i * group + g is head g of the group at the task's query i.
  const auto load_queries = [&](const AttentionTask& task, const LaneScratch& lane) {
    const AttentionSegment& segment = *task.segment;
    for (int64_t i = 0; i < task.count; ++i) {
      const float* q = input.qkv.row(segment.first_row + task.first + i) + task.kv_head * group * n;
      std::copy_n(q, group * n, lane.q + i * group * n);
      std::fill_n(lane.seen + i * group, group,
                  segment.position + task.first + i - segment.first_position + 1);
    }
  };
  const auto task_leaves = [&](const AttentionTask& task) {
    const AttentionSegment& segment = *task.segment;
    return leaves_for(segment.position + task.first + task.count - segment.first_position);
  };
  const auto write = [&](const AttentionTask& task, const RunningState& state) {
    for (int64_t i = 0; i < task.count; ++i)
      for (int64_t g = 0; g < group; ++g)
        write_row(
            out.row(task.segment->first_row + task.first + i) + (task.kv_head * group + g) * n,
            state, i * group + g, n);
  };

  TileCounter counter;
  pool_.run([&](Lane& lane) {
    // By head, then by row: what a lane writes into a page lies together.
    const Part part = lane.part((input.heads + layout.kv_heads) * out.rows);
    size_t at = 0;  // the segment of the row
    for (int64_t item = part.begin; item < part.end; ++item) {
      const int64_t head = item / out.rows, row = item % out.rows;
      if (head < input.heads) {
        turn_query(input, row, head);
        continue;
      }
      if (row < input.segments[at].first_row) at = 0;
      while (row >= input.segments[at].first_row + input.segments[at].rows) ++at;
      append(input, input.segments[at], row - input.segments[at].first_row, head - input.heads);
    }
    lane.barrier();

    const LaneScratch scratch(lane_memory + lane.id() * lane_bytes, most_rows, n);
    if (!split_leaves) {
      for (int64_t tile; (tile = counter.next()) < tasks;) {
        const AttentionTask& task = tasks_[tile];
        const int64_t rows = task.count * group;
        load_queries(task, scratch);
        clear(scratch.running, rows, n);
        for (int64_t leaf = 0; leaf < task_leaves(task); ++leaf) {
          attend_leaf(head_pages(task), scratch, rows, n, leaf, scratch.leaf);
          merge(scratch.running, scratch.leaf, rows, n);
        }
        write(task, scratch.running);
      }
      return;
    }

    for (int64_t task = lane.id(); task < tasks; task += lane.count())
      clear(running_state(task), tasks_[task].count * group, n);
    for (int64_t first = 0; first < most_leaves; first += wave) {
      const Part tiles = lane.part(tasks * wave);
      for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
        const AttentionTask& task = tasks_[tile / wave];
        const int64_t leaf = first + tile % wave;
        if (leaf >= task_leaves(task)) continue;
        load_queries(task, scratch);
        attend_leaf(head_pages(task), scratch, task.count * group, n, leaf,
                    leaf_state(tile / wave, tile % wave));
      }
      lane.barrier();
      for (int64_t task = lane.id(); task < tasks; task += lane.count()) {
        const int64_t rows = tasks_[task].count * group;
        const int64_t last = std::min(first + wave, task_leaves(tasks_[task]));
        for (int64_t leaf = first; leaf < last; ++leaf)
          merge(running_state(task), leaf_state(task, leaf - first), rows, n);
        if (first + wave >= most_leaves) write(tasks_[task], running_state(task));
      }
      lane.barrier();
    }
  });
}

// A task is one head of one tile: its keys and values go into pages of the lane's own.
void CpuBackend::vision_attention(Rows out, Rows qkv, int64_t tiles, int64_t tokens, int64_t heads,
                                  const float* cos, const float* sin) {
  check_vision_attention(out, qkv, tiles, tokens, heads, cos, sin);
  const int64_t n = qkv.cols / (3 * heads);
  const KvPageLayout layout{DType::kF32, 1, n};
  const int64_t pages = pages_for(tokens), rows = std::min(kTaskRows, tokens);
  const int64_t scratch_bytes = LaneScratch(nullptr, rows, n).carver.used();
  Carver size(nullptr);
  size.take<void*>(pages);
  size.take<char>(pages * static_cast<int64_t>(layout.page_bytes()));
  const int64_t lane_bytes = scratch_bytes + size.used();
  auto* memory = lanes_.reserve<char>(pool_.lanes() * lane_bytes);
  const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(n)));

  TileCounter counter;
  pool_.run([&](Lane& lane) {
    char* mine = memory + lane.id() * lane_bytes;
    const LaneScratch scratch(mine, rows, n);
    Carver carver(mine + scratch_bytes);
    auto* table = carver.take<void*>(pages);
    auto* page_memory = carver.take<char>(pages * static_cast<int64_t>(layout.page_bytes()));
    for (int64_t page = 0; page < pages; ++page)
      table[page] = page_memory + page * static_cast<int64_t>(layout.page_bytes());
    // The scratch may hold anything; what lies beyond the last token must be finite.
    std::memset(table[pages - 1], 0, layout.page_bytes());
    const HeadPages head_pages{kernels_.attend_page_f32, table, layout.key_offset(0),
                               layout.value_offset(0)};

    for (int64_t task; (task = counter.next()) < tiles * heads;) {
      const int64_t first_row = task / heads * tokens, head = task % heads;
      for (int64_t t = 0; t < tokens; ++t) {
        float* q = qkv.row(first_row + t) + head * n;
        float *k = q + heads * n, *v = k + heads * n;
        kernels_.rope(q, cos + t * (n / 2), sin + t * (n / 2), n);
        kernels_.rope(k, cos + t * (n / 2), sin + t * (n / 2), n);
        auto* page = static_cast<char*>(table[t / kPageTokens]);
        auto* keys = reinterpret_cast<float*>(page + layout.key_offset(0));
        auto* values = reinterpret_cast<float*>(page + layout.value_offset(0));
        for (int64_t c = 0; c < n; ++c) keys[layout.key_index(t % kPageTokens, c)] = k[c];
        std::copy_n(v, n, values + layout.value_index(t % kPageTokens, 0));
      }
      for (int64_t first = 0; first < tokens; first += rows) {
        const int64_t count = std::min(rows, tokens - first);
        for (int64_t i = 0; i < count; ++i)
          kernels_.scale(scratch.q + i * n, qkv.row(first_row + first + i) + head * n, scale, n);
        std::fill_n(scratch.seen, count, tokens);
        clear(scratch.running, count, n);
        for (int64_t leaf = 0; leaf < leaves_for(tokens); ++leaf) {
          attend_leaf(head_pages, scratch, count, n, leaf, scratch.leaf);
          merge(scratch.running, scratch.leaf, count, n);
        }
        for (int64_t i = 0; i < count; ++i)
          write_row(out.row(first_row + first + i) + head * n, scratch.running, i, n);
      }
    }
  });
}

}  // namespace puna
