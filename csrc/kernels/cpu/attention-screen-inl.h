// What a sealed page may weigh before it is read as a whole: screen_sealed_int8, screen_sealed_int4
// from the upper four bits of its keys, and rank_sealed from their scales alone.
#pragma once

#include "kernels/cpu/attention-sealed-inl.h"

namespace puna {
namespace {

// The four bits that are left out lie between 0 and 15; in their place stands the middle.
constexpr float kMiddle = 7.5f, kUpperStep = 16.0f;

// One query: words for the upper bits, and what the lower ones can do to its scores.
template <bool kLowerBits>
void screen_query(const SealedRows& all, int64_t r, ScreenedRow& screened) {
  const AttendSealed& page = all.page;
  const int64_t n = page.head_dim, padded = (n + kLineRows - 1) / kLineRows * kLineRows;
  const float* q = page.q + r * page.q_stride;
  float* numbers = all.scores + r * kSealedTokens;
  VF largest = set1(0.0f), offset = set1(0.0f), dropped = set1(0.0f), squares = set1(0.0f);
  const VF centre = set1(SealedInt4::kCentre), step = set1(kLowerBits ? kUpperStep : 1.0f);
  const VF middle = set1(kLowerBits ? kMiddle : 0.0f);
  for (int64_t c = 0; c < padded; c += VF::N) {
    const VF x = c + VF::N <= n ? load(q + c) : c < n ? load_n(q + c, n - c) : set1(0.0f);
    const VF scale = load_bf16(page.key_scales + c);
    const VF zero = load_bf16(page.key_scales + padded + c);
    const VF wide = scale * step, number = x * wide, lower = abs(x * scale);
    store(numbers + c, number);
    largest = max(largest, abs(number));
    offset = fma(x, fma(wide, centre, fma(scale, middle, zero)), offset);
    dropped = dropped + lower;
    squares = fma(lower, lower, squares);
  }
  SealedRow row = write_words<SealedInt4>(all.words + r * kSealedTokens, numbers, padded,
                                          largest_lane(largest));
  row.offset = sum(offset);
  all.rows[r] = row;
  screened.dropped = kLowerBits ? sum(dropped) * kMiddle : 0.0f;
  screened.squares = kLowerBits ? sum(squares) * (kMiddle * kMiddle) : 0.0f;
  // Words are off by half a step each, and codes reach 15.
  screened.rounding = row.step * (0.5f * 15.0f) * static_cast<float>(padded);
}

void screen_row(const SealedRows& all, int64_t r, ScreenedRow& screened) {
  const float* scores = all.scores + r * kSealedTokens;
  VF most = set1(-__builtin_inff());
  for (int64_t t = 0; t < kSealedTokens; t += VF::N) most = max(most, load(scores + t));
  const float top = largest_lane(most);
  VF total = set1(0.0f);
  for (int64_t t = 0; t < kSealedTokens; t += VF::N)
    total = total + exp(load(scores + t) - set1(top));
  // The scores of keys that were not finite are not either; what exp makes of them is lost.
  const float spoilt = all.rows[r].offset * 0.0f + all.rows[r].step * 0.0f;
  screened.top = top;
  screened.mass = sum(total) + spoilt;
}

template <bool kLowerBits>
void screen_sealed(const ScreenSealed& page) {
  constexpr int64_t kKeyBlocks = kSealedTokens / kLineRows, kAhead = 2;
  const int64_t key_lines = (page.head_dim + kLineRows - 1) / kLineRows * kLineRows / 8;
  const int64_t block_bytes = key_lines * kLineBytes;
  AttendSealed attended = {};
  attended.q = page.q;
  attended.q_stride = page.q_stride;
  attended.key_scales = page.key_scales;
  attended.rows = page.rows;
  attended.head_dim = page.head_dim;
  attended.scratch = page.scratch;
  const SealedRows all(attended);
  for (int64_t r = 0; r < page.rows; ++r) screen_query<kLowerBits>(all, r, page.screened[r]);
  for (int64_t block = 0; block < kKeyBlocks; ++block) {
    const int64_t later = block + kAhead;
    const bool next = later >= kKeyBlocks && page.next_upper != nullptr;
    const uint8_t* ahead = next ? page.next_upper + (later - kKeyBlocks) * block_bytes
                                : page.upper + later * block_bytes;
    multiply_rows<SealedInt4, ScoreTile>(all, block, key_lines, SealedFourBits{page.upper},
                                         Ahead{ahead, ahead + block_bytes / 2});
  }
  for (int64_t r = 0; r < page.rows; ++r) screen_row(all, r, page.screened[r]);
}

[[maybe_unused]] void screen_sealed_int8(const ScreenSealed& page) { screen_sealed<true>(page); }
[[maybe_unused]] void screen_sealed_int4(const ScreenSealed& page) { screen_sealed<false>(page); }

[[maybe_unused]] void rank_sealed(const RankSealed& page) {
  const int64_t n = page.head_dim, padded = (n + kLineRows - 1) / kLineRows * kLineRows;
  const VF levels = set1(page.levels), half = set1(0.5f);
  for (int64_t r = 0; r < page.rows; ++r) {
    const float* q = page.q + r * page.q_stride;
    VF most = set1(0.0f), middle = set1(0.0f);
    for (int64_t c = 0; c < n; c += VF::N) {
      const VF x = c + VF::N <= n ? load(q + c) : load_n(q + c, n - c);
      const VF zero = load_bf16(page.key_scales + padded + c);
      const VF largest = fma(load_bf16(page.key_scales + c), levels, zero);
      most = most + max(x * zero, x * largest);
      middle = fma(x, (zero + largest) * half, middle);
    }
    page.most[r] = sum(most);
    page.middle[r] = sum(middle);
  }
}

}  // namespace
}  // namespace puna
