// Attention over one sealed page: attend_sealed_int8 and attend_sealed_int4.
//
// All rows go through four passes: queries become whole numbers; scores; softmax, whose weights
// become whole numbers; and the weighted sums of the values. Codes pass in blocks (32 tokens of
// keys, 32 channels of values) that stay in the first cache while all rows take their share, so
// that memory is read once and in order.
#pragma once

#include "kernels/cpu/sealed-codes-inl.h"

namespace puna {
namespace {

constexpr int64_t kLineBytes = 128, kLineRows = 32;

// Whole numbers reach up to 127 * 256, so that two signed bytes could hold one as well.
constexpr float kMostWord = 32512.0f;
// A row whose largest number is smaller counts as zeros; 1 / 2^-100 is still far from infinity.
constexpr float kLeastLargest = 0x1p-100f;

// What a row's sums of whole numbers start from and how they are read: fma(sum, step, offset).
struct SealedRow {
  float step, offset, decay;
  int32_t start;
};

struct SealedRows {
  explicit SealedRows(const AttendSealed& page) : page(page) {
    char* memory = static_cast<char*>(page.scratch);
    scores = reinterpret_cast<float*>(memory);
    memory += page.rows * kSealedTokens * 4;
    words = reinterpret_cast<int16_t*>(memory);
    memory += page.rows * kSealedTokens * 2;
    rows = reinterpret_cast<SealedRow*>(memory);
  }

  const AttendSealed& page;
  float* scores;   // [rows][kSealedTokens]
  int16_t* words;  // [rows][kSealedTokens]: queries, then weights
  SealedRow* rows;
};

// What is asked for, into the second cache, while a block is read, so that it is there when its
// turn comes: two pieces of memory, each half of the block's size.
struct Ahead {
  const uint8_t *first, *second;

  template <int Lines>
  PUNA_INLINE_MEMBER void ask() {
    ask<Lines>(first);
    ask<Lines>(second);
  }
  template <int Lines>
  PUNA_INLINE_MEMBER static void ask(const uint8_t*& at) {
#pragma GCC unroll 2
    for (int i = 0; i < Lines; ++i) __builtin_prefetch(at + i * 64, 0, 2);
    at += Lines * 64;
  }
};

PUNA_INLINE void ask_for_all(const void* memory, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64)
    __builtin_prefetch(static_cast<const char*>(memory) + at, 0, 2);
}

// Turns numbers[count], of which `largest` is the magnitude of the largest, into words and returns
// how sums of them with codes are to be read, but for the offset.
template <class Format>
SealedRow write_words(int16_t* words, const float* numbers, int64_t count, float largest) {
  const bool zeros = largest < kLeastLargest, finite = largest - largest == 0;
  const float factor = zeros || !finite ? 0.0f : kMostWord / largest;
  const int32_t sum = store_words(words, numbers, count, factor);
  SealedRow row = {};
  row.step = zeros ? 0.0f : finite ? largest / kMostWord : __builtin_nanf("");
  // Unsigned: a number that is not finite turns into the least integer, and the sum may leave
  // int32; such a row shows in its step or in its offset.
  row.start = static_cast<int32_t>(0u - static_cast<uint32_t>(Format::kCentre) *
                                            static_cast<uint32_t>(sum));
  return row;
}

// Of the channels of keys, or the tokens of values: their scale, and what the middle of the codes
// stands for. Padding has 0 in both.
struct Levels {
  template <class Format>
  void read(Format, const uint16_t* scales, int64_t count) {
    for (int64_t i = 0; i < count; i += VF::N) {
      const VF x = load_bf16(scales + i), zero = load_bf16(scales + count + i);
      store(scale + i, x);
      store(middle + i, fma(x, set1(Format::kCentre), zero));
    }
  }

  alignas(64) float scale[kSealedTokens];
  alignas(64) float middle[kSealedTokens];
};
static_assert(kSealedDim <= kSealedTokens);

// Rows that go through the steps of a pass side by side: the end of one step waits for what the
// row's last operations give, which other rows' operations fill.
constexpr int64_t kAbreast = 8;

// Queries: words of q * scale, and the offset of q with the zero points and with the middle of the
// codes.
template <class Format>
void quantise_queries(const SealedRows& all, int64_t first, int64_t count, const Levels& keys) {
  const AttendSealed& page = all.page;
  const int64_t n = page.head_dim, padded = (n + kLineRows - 1) / kLineRows * kLineRows;
  float most[kAbreast], offsets[kAbreast];
  for (int64_t i = 0; i < count; ++i) {
    const float* q = page.q + (first + i) * page.q_stride;
    float* numbers = all.scores + (first + i) * kSealedTokens;
    VF largest = set1(0.0f), offset = set1(0.0f);
    for (int64_t c = 0; c < padded; c += VF::N) {
      const VF x = c + VF::N <= n ? load(q + c) : c < n ? load_n(q + c, n - c) : set1(0.0f);
      const VF number = x * load(keys.scale + c);
      store(numbers + c, number);
      largest = max(largest, abs(number));
      offset = fma(x, load(keys.middle + c), offset);
    }
    most[i] = largest_lane(largest);
    offsets[i] = sum(offset);
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = (first + i) * kSealedTokens;
    SealedRow row = write_words<Format>(all.words + at, all.scores + at, padded, most[i]);
    row.offset = offsets[i];
    all.rows[first + i] = row;
  }
}

// Turns the scores of rows into words of weight * scale, and brings m, l and what o is multiplied
// with to the new maximum.
template <class Format>
void weigh_rows(const SealedRows& all, int64_t first, int64_t count, const Levels& values,
                Ahead ahead, int64_t asks) {
  const AttendSealed& page = all.page;
  float tops[kAbreast], most[kAbreast];
  for (int64_t i = 0; i < count; ++i) {
    const float* scores = all.scores + (first + i) * kSealedTokens;
    VF top = set1(page.m[first + i]);
    for (int64_t t = 0; t < kSealedTokens; t += VF::N) top = max(top, load(scores + t));
    tops[i] = largest_lane(top);
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t r = first + i;
    float* numbers = all.scores + r * kSealedTokens;
    const VF top = set1(tops[i]);
    VF total = set1(0.0f), largest = set1(0.0f), offset = set1(0.0f);
    for (int64_t t = 0; t < kSealedTokens; t += VF::N) {
      if (--asks >= 0) ahead.ask<1>();
      const VF weight = exp(load(numbers + t) - top);
      const VF number = weight * load(values.scale + t);
      store(numbers + t, number);
      total = total + weight;
      largest = max(largest, number);
      offset = fma(weight, load(values.middle + t), offset);
    }
    SealedRow& row = all.rows[r];
    // The scores of keys that were not finite are not either; what exp makes of them is lost.
    const float spoilt = row.offset * 0.0f + row.step * 0.0f;
    row.decay = first_lane(exp(set1(page.m[r]) - top));
    row.offset = sum(offset);
    page.l[r] = page.l[r] * row.decay + sum(total) + spoilt;
    page.m[r] = tops[i];
    most[i] = largest_lane(largest);
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = (first + i) * kSealedTokens;
    SealedRow& row = all.rows[first + i];
    const SealedRow read =
        write_words<Format>(all.words + at, all.scores + at, kSealedTokens, most[i]);
    row.step = read.step;
    row.start = read.start;
  }
}

// Scores of Rows rows for a tile's tokens, of which `first` is the first.
template <class Format, int Rows>
struct ScoreTile {
  PUNA_INLINE_MEMBER static void finish(const SealedRows& all, int64_t row, int64_t first,
                                        const VF (&sums)[Rows][kSealedVectors]) {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const SealedRow& how = all.rows[row + r];
      float* scores = all.scores + (row + r) * kSealedTokens + first;
#pragma GCC unroll 32
      for (int v = 0; v < kSealedVectors; ++v)
        store(scores + v * VF::N, fma(sums[r][v], set1(how.step), set1(how.offset)));
    }
  }
};

// Outputs of Rows rows for a tile's channels, of which `first` is the first.
template <class Format, int Rows>
struct ValueTile {
  PUNA_INLINE_MEMBER static void finish(const SealedRows& all, int64_t row, int64_t first,
                                        const VF (&sums)[Rows][kSealedVectors]) {
    const int64_t n = all.page.head_dim;
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const SealedRow& how = all.rows[row + r];
      float* out = all.page.o + (row + r) * n;
#pragma GCC unroll 32
      for (int v = 0; v < kSealedVectors; ++v) {
        const int64_t c = first + v * VF::N, left = n - c;
        if (left <= 0) continue;
        const VF old = left >= VF::N ? load(out + c) : load_n(out + c, left);
        const VF moved = fma(old, set1(how.decay), set1(how.offset));
        const VF now = fma(sums[r][v], set1(how.step), moved);
        if (left >= VF::N) {
          store(out + c, now);
        } else {
          store_n(out + c, now, left);
        }
      }
    }
  }
};

// A block is multiplied in parts, whose sums fit the registers.
constexpr int kParts = kLineVectors / kSealedVectors;
static_assert(kParts <= 2);

// The sums of one block for rows [row, row + Rows), over `lines` lines of it. The first rows to
// read it ask for memory ahead: each part for its half.
template <class Format, class Source, template <class, int> class Tile, int Rows, bool Reads>
PUNA_INLINE void multiply_block(const SealedRows& all, int64_t row, int64_t block, int64_t lines,
                                const Source& source, Ahead ahead) {
  const int16_t* words = all.words + row * kSealedTokens;
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part) {
    const int64_t first = part * kSealedVectors * VF::N;  // of the 32 rows of a line
    CodeSums<Rows> sums;
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) sums.start(r, all.rows[row + r].start);
#pragma GCC unroll 1
    for (int64_t line = 0; line < lines; ++line) {
      if constexpr (Reads && kParts == 1) {
        ahead.ask<Source::kLines>();
      } else if constexpr (Reads) {
        Ahead::ask<Source::kLines>(part == 0 ? ahead.first : ahead.second);
      }
      sums.add(source, (block * lines + line) * kLineBytes + first * 4,
               words + line * Source::kFours * 4, kSealedTokens);
    }
    VF totals[Rows][kSealedVectors];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 32
      for (int v = 0; v < kSealedVectors; ++v) totals[r][v] = to_float(sums.total(r, v));
    }
    Tile<Format, Rows>::finish(all, row, block * kLineRows + first, totals);
  }
}

template <class Format, class Source, template <class, int> class Tile, bool Reads,
          int Rows = kSealedRows>
void multiply_block_up_to(int64_t rows, const SealedRows& all, int64_t row, int64_t block,
                          int64_t lines, const Source& source, Ahead ahead) {
  if constexpr (Rows > 1) {
    if (rows < Rows)
      return multiply_block_up_to<Format, Source, Tile, Reads, Rows - 1>(rows, all, row, block,
                                                                         lines, source, ahead);
  }
  multiply_block<Format, Source, Tile, Rows, Reads>(all, row, block, lines, source, ahead);
}

// One block for all rows.
template <class Format, template <class, int> class Tile, class Source>
void multiply_rows(const SealedRows& all, int64_t block, int64_t lines, const Source& source,
                   Ahead ahead) {
  const int64_t rows = all.page.rows;
  multiply_block_up_to<Format, Source, Tile, true>(rows < kSealedRows ? rows : kSealedRows, all, 0,
                                                   block, lines, source, ahead);
  for (int64_t row = kSealedRows; row < rows; row += kSealedRows) {
    const int64_t left = rows - row;
    multiply_block_up_to<Format, Source, Tile, false>(left < kSealedRows ? left : kSealedRows, all,
                                                      row, block, lines, source, ahead);
  }
}

template <class Format>
void attend_sealed(const AttendSealed& page) {
  constexpr bool kBoth = Format::kPlanes == 2;
  constexpr int64_t kKeyBlocks = kSealedTokens / kLineRows;
  const int64_t value_blocks = (page.head_dim + kLineRows - 1) / kLineRows;
  // Of one block.
  const int64_t key_lines = value_blocks * kLineRows / 8;
  const int64_t value_lines = kSealedTokens / Format::kTokens;
  const int64_t plane_bytes = key_lines * kLineBytes, key_bytes = plane_bytes * Format::kPlanes;
  const int64_t value_bytes = value_lines * kLineBytes;
  // With 128 channels, kKeysAhead blocks of keys are as large as one of values.
  constexpr int64_t kKeysAhead = 2;
  const auto halves = [](const uint8_t* start, int64_t bytes) {
    return Ahead{start, start + bytes / 2};
  };

  const SealedRows all(page);
  const auto abreast = [&](int64_t first) {
    const int64_t left = page.rows - first;
    return left < kAbreast ? left : kAbreast;
  };
  ask_for_all(page.value_scales, kSealedTokens * 4);
  Levels levels;
  levels.read(Format(), page.key_scales, value_blocks * kLineRows);
  for (int64_t r = 0; r < page.rows; r += kAbreast)
    quantise_queries<Format>(all, r, abreast(r), levels);
  for (int64_t block = 0; block < kKeyBlocks; ++block) {
    const int64_t later = block + kKeysAhead;
    const Ahead ahead =
        later >= kKeyBlocks ? halves(page.values + (later - kKeyBlocks) * key_bytes, key_bytes)
        : kBoth ? Ahead{page.upper + later * plane_bytes, page.lower + later * plane_bytes}
                : halves(page.upper + later * plane_bytes, plane_bytes);
    multiply_rows<Format, ScoreTile>(all, block, key_lines,
                                     typename Format::Keys{page.upper, page.lower}, ahead);
  }
  // Memory goes on reading meanwhile: the second block of values, one more than is under way
  // otherwise.
  levels.read(Format(), page.value_scales, kSealedTokens);
  for (int64_t r = 0; r < page.rows; r += kAbreast)
    weigh_rows<Format>(all, r, abreast(r), levels, halves(page.values + value_bytes, value_bytes),
                       r == 0 ? value_bytes / 128 : 0);
  if (page.next_key_scales != nullptr)
    ask_for_all(page.next_key_scales, value_blocks * kLineRows * 4);
  for (int64_t block = 0; block < value_blocks; ++block) {
    const bool last = block >= value_blocks - 2 && page.next_upper != nullptr;
    const Ahead ahead = !last   ? halves(page.values + (block + 2) * value_bytes, value_bytes)
                        : kBoth ? Ahead{page.next_upper, page.next_lower}
                                : halves(page.next_upper, value_bytes);
    multiply_rows<Format, ValueTile>(all, block, value_lines, typename Format::Values{page.values},
                                     ahead);
  }
}

[[maybe_unused]] void attend_sealed_int8(const AttendSealed& page) {
  attend_sealed<SealedInt8>(page);
}
[[maybe_unused]] void attend_sealed_int4(const AttendSealed& page) {
  attend_sealed<SealedInt4>(page);
}

}  // namespace
}  // namespace puna
