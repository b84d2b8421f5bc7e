// Attention over pages of keys and values: these are written here, and then attended to as
// attention_call.h says. The reduction is described in attention_leaf.h.
#include <algorithm>
#include <cmath>

#include "backend/checks.h"
#include "backend/cpu/attention_call.h"
#include "backend/cpu/implementation.h"
#include "backend/kv_seal.h"
#include "base/half.h"

namespace puna {

static_assert(kPageTokens == kSealedTokens && kKeyBlockTokens == kKeyBlock);
static_assert(kSealedMostDim == kSealedDim);

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
  const int64_t group = input.heads / input.layout.kv_heads;
  attention_plan_.build(input, std::max<int64_t>(1, kTaskRows / group));
  page_choice_.build(input, attention_plan_, kernels_);
  AttentionCall call(out, input, kernels_, attention_plan_, page_choice_, pool_.lanes());
  call.use(lanes_.reserve<char>(pool_.lanes() * call.lane_bytes()),
           leaves_.reserve<char>(call.shared_bytes()));
  const bool alone = small(attention_plan_.seen() * input.heads * 2 * input.layout.head_dim);
  prepare_attention(input, alone);
  call.run(pool_, alone);
}

// Queries are turned, keys and values go into their pages, and pages that are full now are sealed.
void CpuBackend::prepare_attention(const AttentionInput& input, bool alone) {
  const AttentionPlan& plan = attention_plan_;
  const int64_t kv_heads = input.layout.kv_heads, rows = input.qkv.rows;
  // By head, then by row: what a lane writes into a page lies together.
  const int64_t turns = input.heads * static_cast<int64_t>(plan.queries().size());
  pool_.run(
      [&](const Lane& lane) {
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
      },
      alone);
  if (plan.full_pages().empty()) return;
  const auto pages = static_cast<int64_t>(plan.full_pages().size());
  pool_.run(
      [&](const Lane& lane) {
        const Part part = lane.part(pages * kv_heads);
        for (int64_t item = part.begin; item < part.end; ++item) {
          const AttentionPlan::FullPage& page = plan.full_pages()[item / kv_heads];
          seal_head(page.sealed, input.sealed, page.open, input.layout, item % kv_heads);
        }
      },
      alone);
}

}  // namespace puna
