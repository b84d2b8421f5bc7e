// Attention over one page of keys and values: attend_page_f32 and attend_page_bf16.
//
// A tile of rows goes through three passes: scores into the scratch (which each tile reuses, so
// that it stays in the first cache), their softmax in place, and the weighted sum of the values.
#pragma once

#include "kernels/cpu/tile-inl.h"

namespace puna {
namespace {

// Values pass in blocks of tokens that stay in the first cache (32 * 128 * 2 bytes = 8 KiB) while
// all groups of channels take their share, so that memory is read in order.
constexpr int64_t kValueBlock = 32;

// The first rows ask for memory this many tokens ahead: of 128 bfloat16 channels 8 KiB, which is
// more than comes in the 200 ns until the first of it does. Values follow the keys.
constexpr int64_t kTokensAhead = 32;

// At each step of a tile that takes kBytes of memory as the first to read it, asks for as much,
// into the second cache, that will be read later.
template <int64_t kBytes>
struct AskEachStep {
  const char* at;
  PUNA_INLINE_MEMBER void operator()() {
#pragma GCC unroll 32
    for (int64_t i = 0; i < kBytes; i += 64) __builtin_prefetch(at + i, 0, 2);
    at += kBytes;
  }
};
template <class Product, int Vectors, bool Reads>
PUNA_INLINE auto ask_each_step(const void* at) {
  if constexpr (Reads)
    return AskEachStep<Vectors * kLanes* static_cast<int64_t>(sizeof(typename Product::W))>{
        static_cast<const char*>(at)};
  else
    return NothingEachStep{};
}

// scores[r][t] = q[r] . k[t] for t < tokens, a multiple of kKeyBlock. Block by block, so that the
// keys are read strictly in order.
template <class Product, int Rows, bool Reads>
void score_rows(float* scores, int64_t scores_stride, const float* q, int64_t q_stride,
                const typename Product::W* k, int64_t tokens, int64_t head_dim) {
  constexpr int64_t kBlockVectors = kKeyBlock / kLanes;
  constexpr int kVectors = kBlockVectors < Product::kVectors ? kBlockVectors : Product::kVectors;
  for (int r = 0; r < Rows; ++r) {
    for (int64_t t = 0; t < tokens; ++t) scores[r * scores_stride + t] = 0.0f;
  }
  for (int64_t t = 0; t < tokens; t += kVectors * kLanes) {
    const int64_t in_block = t % kKeyBlock;
    const typename Product::W* block = k + (t - in_block) * head_dim + in_block;
    multiply_tile<Product, Rows, kVectors>(
        scores + t, scores_stride, q, q_stride, block, {kKeyBlock, kLanes}, head_dim,
        ask_each_step<Product, kVectors, Reads>(block + kTokensAhead * head_dim));
  }
}

// Tiles of values are flat and wide, half of the rows at a time: with 128 channels in AVX-512 one
// takes the whole width, and the values are read strictly in order. In AVX2, whose registers are
// few, a tile of all rows is better for bfloat16, which is widened once then.
template <class Product>
constexpr int kValueVectors =
    kLanes == 8 && sizeof(typename Product::W) == 2 ? Product::kVectors : 2 * Product::kVectors;

// out[r] += sum over t of weights[r][t] * v[t], for a few rows. Where Reads, each group of channels
// asks for its share of what lies at `next`, as large as v.
template <class Product, int Rows, bool Reads = false>
void add_values(float* out, const float* weights, int64_t weights_stride,
                const typename Product::W* v, int64_t tokens, int64_t head_dim,
                const typename Product::W* next = nullptr) {
  constexpr int kWide = kValueVectors<Product>;
  const WeightStrides strides = {head_dim, kLanes};
  int64_t c = 0;
  for (; c + kWide * kLanes <= head_dim; c += kWide * kLanes) {
    multiply_tile<Product, Rows, kWide>(out + c, head_dim, weights, weights_stride, v + c, strides,
                                        tokens,
                                        ask_each_step<Product, kWide, Reads>(next + c * tokens));
  }
  if constexpr (kWide > Product::kVectors) {
    for (; c + Product::kVectors * kLanes <= head_dim; c += Product::kVectors * kLanes) {
      multiply_tile<Product, Rows, Product::kVectors>(
          out + c, head_dim, weights, weights_stride, v + c, strides, tokens,
          ask_each_step<Product, Product::kVectors, Reads>(next + c * tokens));
    }
  }
  for (; c + kLanes <= head_dim; c += kLanes) {
    multiply_tile<Product, Rows, 1>(out + c, head_dim, weights, weights_stride, v + c, strides,
                                    tokens);
  }
  if (c < head_dim) {
    multiply_partial_tile<Product, Rows>(out + c, head_dim, weights, weights_stride, v + c,
                                         head_dim, tokens, head_dim - c);
  }
}

// Turns the scores of one row into weights, and brings its state to the new maximum.
// `visible` > 0; the scratch reaches to the next multiple of kKeyBlock.
void softmax_row(float* scores, int64_t visible, int64_t head_dim, float* m, float* l, float* out) {
  // Hidden scores of the last block become -infinity: exp makes them an exact zero.
  const int64_t padded = (visible + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
  for (int64_t t = visible; t < padded; ++t) scores[t] = -__builtin_inff();

  VF largest = set1(*m);
  for (int64_t t = 0; t < padded; t += kLanes) largest = max(largest, load(scores + t));
  const float highest = largest_lane(largest);
  const VF top = set1(highest);

  VF weights = set1(0.0f);
  for (int64_t t = 0; t < padded; t += kLanes) {
    const VF weight = exp(load(scores + t) - top);
    store(scores + t, weight);
    weights = weights + weight;
  }

  const VF decay = exp(set1(*m) - top);
  *m = highest;
  *l = *l * first_lane(decay) + sum(weights);
  int64_t c = 0;
  for (; c + kLanes <= head_dim; c += kLanes) store(out + c, load(out + c) * decay);
  if (c < head_dim) store_n(out + c, load_n(out + c, head_dim - c) * decay, head_dim - c);
}

// Rows [row, row + Rows) of the call.
template <class Product, int Rows, bool Reads>
void attend_rows(const AttendPage& page, int64_t row) {
  const int32_t* visible = page.visible + row;
  int64_t least = visible[0], most = visible[0];
  for (int r = 1; r < Rows; ++r) {
    least = visible[r] < least ? visible[r] : least;
    most = visible[r] > most ? visible[r] : most;
  }
  if (most <= 0) return;

  const auto* k = static_cast<const typename Product::W*>(page.k);
  const auto* v = static_cast<const typename Product::W*>(page.v);
  const int64_t head_dim = page.head_dim;
  const int64_t padded = (most + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
  float* scores = page.scores;  // [Rows][padded]
  float* out = page.o + row * head_dim;
  score_rows<Product, Rows, Reads>(scores, padded, page.q + row * page.q_stride, page.q_stride, k,
                                   padded, head_dim);
  for (int r = 0; r < Rows; ++r) {
    if (visible[r] <= 0) continue;
    softmax_row(scores + r * padded, visible[r], head_dim, page.m + row + r, page.l + row + r,
                out + r * head_dim);
  }
  for (int64_t t = 0; t < most; t += kValueBlock) {
    // First the tokens that all rows see, then the rest of each row: 0 * v would be harmless but
    // for the sign of a zero.
    const int64_t end = t + kValueBlock;
    const int64_t common = least < t ? t : (least < end ? least : end);
    const typename Product::W* block = v + t * head_dim;
    constexpr int kFirst = kValueVectors<Product> > Product::kVectors ? (Rows + 1) / 2 : Rows;
    const typename Product::W* next =
        t + kTokensAhead < most || page.next == nullptr
            ? block + kTokensAhead * head_dim
            : static_cast<const typename Product::W*>(page.next) + (t % kTokensAhead) * head_dim;
    add_values<Product, kFirst, Reads>(out, scores + t, padded, block, common - t, head_dim, next);
    if constexpr (Rows > kFirst) {
      add_values<Product, Rows - kFirst>(out + kFirst * head_dim, scores + kFirst * padded + t,
                                         padded, block, common - t, head_dim);
    }
    for (int r = 0; r < Rows; ++r) {
      const int64_t last = visible[r] < end ? visible[r] : end;
      if (last <= common) continue;
      add_values<Product, 1>(out + r * head_dim, scores + r * padded + common, padded,
                             v + common * head_dim, last - common, head_dim);
    }
  }
}

template <class Product, bool Reads, int Rows = Product::kRows>
void attend_up_to(int64_t rows, const AttendPage& page, int64_t row) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return attend_up_to<Product, Reads, Rows - 1>(rows, page, row);
  }
  attend_rows<Product, Rows, Reads>(page, row);
}

template <class Product>
void attend_page(const AttendPage& page) {
  constexpr int64_t kRows = Product::kRows;
  attend_up_to<Product, true>(page.rows < kRows ? page.rows : kRows, page, 0);
  for (int64_t row = kRows; row < page.rows; row += kRows) {
    const int64_t left = page.rows - row;
    attend_up_to<Product, false>(left < kRows ? left : kRows, page, row);
  }
}

[[maybe_unused]] void attend_page_f32(const AttendPage& page) { attend_page<F32Product>(page); }
[[maybe_unused]] void attend_page_bf16(const AttendPage& page) {
  attend_page<WidenedProduct>(page);
}

}  // namespace
}  // namespace puna
