// Bidirectional attention within each tile of an image. A task is one head of one tile: its keys
// and values go into pages of the lane's own, and then it is as text (attention_leaf.h).
#include <algorithm>
#include <cmath>
#include <cstring>

#include "backend/checks.h"
#include "backend/cpu/attention_leaf.h"
#include "backend/cpu/implementation.h"

namespace puna {
namespace {

// What a lane needs beside LaneScratch.
struct TileMemory {
  TileMemory(char* memory, const KvPageLayout& layout, int64_t page_count, int64_t rows)
      : layout(layout) {
    Carver carver(memory);
    l = carver.take<double>(rows);
    m = carver.take<float>(rows);
    pages = carver.take<char>(page_count * static_cast<int64_t>(layout.page_bytes()));
    used = carver.used();
  }
  char* page(int64_t index) const {
    return pages + index * static_cast<int64_t>(layout.page_bytes());
  }
  float* keys(int64_t token) const {
    return reinterpret_cast<float*>(page(token / kPageTokens) + layout.key_offset(0)) +
           layout.key_index(token % kPageTokens, 0);
  }
  float* values(int64_t token) const {
    return reinterpret_cast<float*>(page(token / kPageTokens) + layout.value_offset(0)) +
           layout.value_index(token % kPageTokens, 0);
  }

  const KvPageLayout& layout;
  int64_t used;
  double* l;  // of the running states, [rows]
  float* m;
  char* pages;
};

}  // namespace

void CpuBackend::vision_attention(Rows out, Rows qkv, int64_t tiles, int64_t tokens, int64_t heads,
                                  const float* cos, const float* sin) {
  check_vision_attention(out, qkv, tiles, tokens, heads, cos, sin);
  const int64_t n = qkv.cols / (3 * heads);
  const KvPageLayout layout{DType::kF32, 1, n};
  const int64_t pages = (tokens + kPageTokens - 1) / kPageTokens;
  const int64_t rows = std::min(kTaskRows, tokens);
  const int64_t scratch_bytes = LaneScratch::bytes(rows, n);
  const int64_t lane_bytes = scratch_bytes + TileMemory(nullptr, layout, pages, rows).used;
  auto* memory = lanes_.reserve<char>(pool_.lanes() * lane_bytes);
  const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(n)));

  TileCounter counter;
  pool_.run([&](Lane& lane) {
    char* mine = memory + lane.id() * lane_bytes;
    const LaneScratch scratch(mine, rows, n);
    const TileMemory tile(mine + scratch_bytes, layout, pages, rows);
    // The scratch may hold anything; what lies beyond the last token must be finite.
    std::memset(tile.page(pages - 1), 0, layout.page_bytes());

    const auto attend_page = [&](int64_t page, int64_t count) {
      const int64_t here = std::min(kPageTokens, tokens - page * kPageTokens);
      std::fill_n(scratch.visible, count, static_cast<int32_t>(here));
      AttendPage call = {};
      call.q = scratch.q;
      call.q_stride = n;
      call.visible = scratch.visible;
      call.k = tile.page(page) + layout.key_offset(0);
      call.v = tile.page(page) + layout.value_offset(0);
      call.rows = static_cast<int32_t>(count);
      call.head_dim = static_cast<int32_t>(n);
      call.tokens = static_cast<int32_t>(here);
      call.m = scratch.leaf.m;
      call.l = scratch.leaf.l;
      call.o = scratch.leaf.o;
      call.scores = scratch.scores;
      kernels_.attend_page_f32(call);
    };

    for (int64_t task; (task = counter.next()) < tiles * heads;) {
      const int64_t first_row = task / heads * tokens, head = task % heads;
      for (int64_t t = 0; t < tokens; ++t) {
        float* q = qkv.row(first_row + t) + head * n;
        float *k = q + heads * n, *v = k + heads * n;
        kernels_.rope(q, cos + t * (n / 2), sin + t * (n / 2), n);
        kernels_.rope(k, cos + t * (n / 2), sin + t * (n / 2), n);
        float* keys = tile.keys(t);
        for (int64_t c = 0; c < n; ++c) keys[c * kKeyBlockTokens] = k[c];
        std::copy_n(v, n, tile.values(t));
      }
      for (int64_t first = 0; first < tokens; first += rows) {
        const int64_t count = std::min(rows, tokens - first);
        for (int64_t i = 0; i < count; ++i)
          kernels_.scale(scratch.q + i * n, qkv.row(first_row + first + i) + head * n, scale, n);
        for (int64_t leaf = 0; leaf < pages; leaf += kLeafPages) {
          scratch.leaf.clear(count, n);
          for (int64_t page = leaf; page < std::min(pages, leaf + kLeafPages); ++page)
            attend_page(page, count);
          for (int64_t i = 0; i < count; ++i) {
            RunningRow row{tile.m[i], tile.l[i], out.row(first_row + first + i) + head * n};
            if (leaf == 0) row.clear(n);
            row.merge(scratch.leaf, i, n);
            if (leaf + kLeafPages >= pages) row.finish(n);
          }
        }
      }
    }
  });
}

}  // namespace puna
