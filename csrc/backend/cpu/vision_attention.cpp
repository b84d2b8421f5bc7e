// Bidirectional attention within each tile of an image. A task is one head of one tile: two
// products by the kernels of products, with the lane's own copies of keys and values as packed
// weights, and a softmax of whole rows between them. A tile has few tokens (577), so a row of
// scores is short.
#include <algorithm>
#include <cmath>

#include "backend/checks.h"
#include "backend/cpu/attention_leaf.h"
#include "backend/cpu/implementation.h"

namespace puna {
namespace {

// Rows of scores at once: 192 * 577 fp32 are 443 KiB, which stay in the second cache.
constexpr int64_t kScoreRows = 192;

// How operands of the products are written, and which kernel multiplies them. Weights are in panels
// of kPanelRows outputs, see kernel_table.h.
struct F32Operands {
  using Element = float;
  static constexpr int64_t kDepth = 1;  // columns that lie together in a panel
  static void write(const KernelTable&, float* to, const float* from, int64_t count) {
    if (to != from) std::copy_n(from, count, to);
  }
  static auto product(const KernelTable& kernels) { return kernels.gemm_f32; }
};
struct BF16Operands {
  using Element = uint16_t;
  static constexpr int64_t kDepth = 2;
  static void write(const KernelTable& kernels, uint16_t* to, const float* from, int64_t count) {
    kernels.bf16_from_f32(to, from, count);
  }
  static auto product(const KernelTable& kernels) { return kernels.gemm_bf16; }
};

int64_t rounded_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// What a lane needs for one head.
template <class Operands>
struct HeadMemory {
  using Element = typename Operands::Element;

  HeadMemory(char* memory, int64_t tokens, int64_t n)
      : channels(rounded_up(n, Operands::kDepth)), columns(rounded_up(tokens, Operands::kDepth)) {
    const int64_t rows = std::min(kScoreRows, tokens);
    Carver carver(memory);
    row = carver.take<float>(n);
    rounded = carver.take<Element>(n);
    queries = carver.take<Element>(tokens * channels);
    keys = carver.take<Element>(rounded_up(tokens, kPanelRows) * channels);
    values = carver.take<Element>(rounded_up(n, kPanelRows) * columns);
    scores = carver.take<float>(rows * tokens);
    weights = carver.take<Element>(rows * columns);
    sums = carver.take<float>(rows);
    used = carver.used();
  }

  // Where output `row` has column `col` in panels of `cols` columns.
  static int64_t in_panels(int64_t row, int64_t col, int64_t cols) {
    constexpr int64_t kDepth = Operands::kDepth;
    return (row / kPanelRows * cols + col / kDepth * kDepth) * kPanelRows +
           row % kPanelRows * kDepth + col % kDepth;
  }

  int64_t channels, columns;  // of a head, and of a row of weights: what a product reads of each
  int64_t used;
  float* row;        // [n], a query or key
  Element* rounded;  // [n]
  Element* queries;  // [tokens][channels], scaled
  Element* keys;     // panels: an output a token, `channels` columns
  Element* values;   // panels: an output a channel, `columns` columns
  float* scores;     // [rows][tokens]
  Element* weights;  // [rows][columns]: the softmax before it is divided by `sums`
  float* sums;       // [rows]
};

// out, q, k, v: columns of one head of all tokens of a tile. q and k are turned in place.
template <class Operands>
void attend_head(const KernelTable& kernels, const HeadMemory<Operands>& memory, Rows out, Rows q,
                 Rows k, Rows v, const float* cos, const float* sin) {
  const int64_t tokens = q.rows, n = q.cols;
  const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(n)));
  const auto product = Operands::product(kernels);
  for (int64_t t = 0; t < tokens; ++t) {
    kernels.rope(q.row(t), cos + t * (n / 2), sin + t * (n / 2), n);
    kernels.rope(k.row(t), cos + t * (n / 2), sin + t * (n / 2), n);
    kernels.scale(memory.row, q.row(t), scale, n);
    Operands::write(kernels, memory.queries + t * memory.channels, memory.row, n);
    Operands::write(kernels, memory.rounded, k.row(t), n);
    for (int64_t c = 0; c < n; ++c)
      memory.keys[memory.in_panels(t, c, memory.channels)] = memory.rounded[c];
    Operands::write(kernels, memory.rounded, v.row(t), n);
    for (int64_t c = 0; c < n; ++c)
      memory.values[memory.in_panels(c, t, memory.columns)] = memory.rounded[c];
  }
  for (int64_t first = 0; first < tokens; first += kScoreRows) {
    const int64_t rows = std::min(kScoreRows, tokens - first);
    product(memory.scores, tokens, memory.queries + first * memory.channels, memory.channels,
            memory.keys, nullptr, rows, n, tokens);
    for (int64_t i = 0; i < rows; ++i) {
      float* scores = memory.scores + i * tokens;
      memory.sums[i] = kernels.exp_row(scores, tokens);
      Operands::write(kernels, memory.weights + i * memory.columns, scores, tokens);
    }
    product(out.row(first), out.stride, memory.weights, memory.columns, memory.values, nullptr,
            rows, tokens, n);
    for (int64_t i = 0; i < rows; ++i)
      kernels.scale(out.row(first + i), out.row(first + i), 1.0f / memory.sums[i], n);
  }
}

}  // namespace

template <class Operands>
void CpuBackend::attend_tiles(Rows out, Rows qkv, int64_t tiles, int64_t tokens, int64_t heads,
                              const float* cos, const float* sin) {
  const int64_t n = qkv.cols / (3 * heads);
  const int64_t lane_bytes = HeadMemory<Operands>(nullptr, tokens, n).used;
  auto* memory = lanes_.reserve<char>(pool_.lanes() * lane_bytes);
  TileCounter counter;
  pool_.run([&](Lane& lane) {
    char* mine = memory + lane.id() * lane_bytes;
    // What a product reads past the last token or channel must be zero; nothing else is written
    // there.
    std::memset(mine, 0, static_cast<size_t>(lane_bytes));
    const HeadMemory<Operands> head_memory(mine, tokens, n);
    for (int64_t task; (task = counter.next()) < tiles * heads;) {
      const int64_t first_row = task / heads * tokens, head = task % heads;
      const auto columns = [&](Rows rows, int64_t column) {
        return Rows(rows.row(first_row) + column, tokens, n, rows.stride);
      };
      attend_head(kernels_, head_memory, columns(out, head * n), columns(qkv, head * n),
                  columns(qkv, (heads + head) * n), columns(qkv, (2 * heads + head) * n), cos, sin);
    }
  });
}

void CpuBackend::vision_attention(Rows out, Rows qkv, int64_t tiles, int64_t tokens, int64_t heads,
                                  const float* cos, const float* sin, DType operands) {
  check_vision_attention(out, qkv, tiles, tokens, heads, cos, sin, operands);
  if (operands == DType::kBF16)
    attend_tiles<BF16Operands>(out, qkv, tiles, tokens, heads, cos, sin);
  else
    attend_tiles<F32Operands>(out, qkv, tiles, tokens, heads, cos, sin);
}

}  // namespace puna
