// Tiles of products of many rows with quantised weights.
#pragma once

#include "kernels/cuda/quantized_weights.cuh"
#include "kernels/cuda/tiled_product.cuh"

namespace puna::cuda {

// A stage is a span: of each panel its blocks as they lie in memory (of a block of two spans the
// scales and half of the codes), rows of x, their scales, and their sums by group.
template <class Format, class ShapeOfTile>
struct QuantizedStages {
  using Shape = ShapeOfTile;
  using Of = Steps<Format>;
  using Layout = typename Of::Layout;
  static constexpr int kStageColumns = kSpan;
  static constexpr int kTokens = Shape::kTokens;
  static constexpr int kGroups = kSpan / Of::kGroup;  // of a stage
  static constexpr int kBlocks = Of::kBlock < kSpan ? kSpan / Of::kBlock : 1;
  static constexpr int kBlockSteps = (Of::kBlock < kSpan ? Of::kBlock : kSpan) / Of::kColumns;
  static constexpr int kBlockBytes = Layout::kCodes + kBlockSteps * Of::kStepBytes;
  static constexpr int kPanelBytes = kBlocks * kBlockBytes;
  static constexpr int kWeightBytes = Shape::kPanels * kPanelBytes;
  static constexpr int kRowsAt = rounded_up(kWeightBytes, Shape::kAlignment);
  static constexpr int kScalesAt = kRowsAt + Shape::kTokens * kRowBytes;
  static constexpr int kSumsAt = kScalesAt + kTokens * 4;
  static constexpr int kStageBytes = rounded_up(kSumsAt + kGroups * kTokens * 4, Shape::kAlignment);
  static constexpr int kTurns = (kWeightBytes / kChunk + Shape::kThreads - 1) / Shape::kThreads;

  // 16 bytes of a stage's weights that a thread copies.
  struct WeightChunk {
    int from, place;
    int column;  // of the stage: it is copied if that is there
    bool is_code;
  };

  __device__ QuantizedStages(const ProductCall& call, const Share& share, int64_t first_panel)
      : rows(static_cast<const uint8_t*>(share.x.data) + share.first * share.x.stride),
        row_scales(share.x.scales + share.first * share.x.spans),
        row_sums(share.x.sums + share.first * share.x.groups),
        count(share.count),
        spans(static_cast<int>(share.x.spans)),
        groups(static_cast<int>(share.x.groups)),
        panels(share.weights + first_panel * call.panel_bytes),
        panel_bytes(call.panel_bytes),
        there(static_cast<int>((call.rows + kPanel - 1) / kPanel - first_panel)),
        limit(static_cast<int>(share.x.stride)) {
    constexpr int kBlockChunks = kBlockBytes / kChunk, kHeader = Layout::kCodes / kChunk;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int i = turn * Shape::kThreads + threadIdx.x;
      const int panel = i / (kPanelBytes / kChunk), chunk = i % (kPanelBytes / kChunk);
      const int block = chunk / kBlockChunks, within = chunk % kBlockChunks;
      const int code = within - kHeader;  // chunks from the first one of codes on
      WeightChunk& to = chunks[turn];
      to.from = static_cast<int>(panel * panel_bytes + block * Layout::kBytes) + within * kChunk;
      to.place = panel * kPanelBytes + block * kBlockBytes +
                 (code >= 0 ? kHeader + Of::place(code) : within) * kChunk;
      to.column = i >= kWeightBytes / kChunk || panel >= there ? INT32_MAX / 2 : block * Of::kBlock;
      to.is_code = code >= 0;
    }
  }

  __device__ __forceinline__ void copy(unsigned char* stage, int column) const {
    const uint8_t* blocks = panels + static_cast<int64_t>(column / Of::kBlock) * Layout::kBytes;
    const int codes =  // of the block, before
        Of::kBlock > kSpan ? column % Of::kBlock / Of::kColumns * Of::kStepBytes : 0;
#pragma unroll
    for (const WeightChunk& chunk : chunks)
      if (column + chunk.column < limit)
        copy_async<kChunk>(stage + chunk.place, blocks + chunk.from + (chunk.is_code ? codes : 0));
    copy_rows<kTokens, Shape::kThreads>(stage + kRowsAt, threadIdx.x, rows, count, limit, column);
    const int first_group = column / Of::kGroup, group = first_group + threadIdx.x % kGroups;
    if (group < groups) {
      constexpr int kTurn = Shape::kThreads / kGroups;  // rows that are copied together
#pragma unroll
      for (int first = 0; first < kTokens; first += kTurn)
        if (const int at = first + threadIdx.x / kGroups; at < count)
          copy_async<4>(stage + kSumsAt + ((group - first_group) * kTokens + at) * 4,
                        row_sums + int64_t{at} * groups + group);
    }
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < count)
      copy_async<4>(stage + kScalesAt + thread * 4,
                    row_scales + int64_t{thread} * spans + column / kSpan);
  }

  const uint8_t* const rows;  // of x, with their scales and sums
  const float* const row_scales;
  const int32_t* const row_sums;
  const int count, spans, groups;
  const uint8_t* const panels;
  const int64_t panel_bytes;
  const int there;  // panels from the first one on
  const int limit;  // columns of x
  WeightChunk chunks[kTurns];
};

// A warp's work on them.
template <class Format, class ShapeOfTile>
struct QuantizedTile : QuantizedStages<Format, ShapeOfTile> {
  using Stages = QuantizedStages<Format, ShapeOfTile>;
  using Stages::kBlockBytes, Stages::kGroups, Stages::kPanelBytes, Stages::kRowsAt,
      Stages::kScalesAt, Stages::kSumsAt, Stages::kTokens, Stages::limit;
  using typename Stages::Layout, typename Stages::Of, typename Stages::Shape;
  static constexpr int kTokenTiles = Shape::kTokenTiles;

  // The sums of activations of a lane's tokens in a group.
  struct Sums {
    int32_t of[kTokenTiles][2];
  };

  __device__ QuantizedTile(const ProductCall& call, const Share& share, int64_t first_panel,
                           int first_half, int first_token)
      : Stages(call, share, first_panel), half(first_half), token(first_token) {}

  __device__ __forceinline__ void add(const unsigned char* stage, int column) {
    const int t = threadIdx.x % 4;
    uint32_t x[kTokenTiles][2][4];  // of pairs of steps
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n)
#pragma unroll
      for (int pair = 0; pair < 2; ++pair)
        load_rows(x[n][pair], stage + kRowsAt, token + n * kTileTokens + threadIdx.x % 8, pair);
    Sums first_sums;
    load_sums(first_sums, stage, 0);
    // A tile of 16 rows at a time, for the sake of registers.
#pragma unroll
    for (int h = 0; h < Shape::kHalves; ++h)
#pragma unroll
      for (int j = 0; j < kTilesEach; ++j) {
        Part part = {};
#pragma unroll
        for (int piece = 0; piece < kSpan / Of::kPieceColumns; ++piece) {
          if (piece > 0 && column + piece * Of::kPieceColumns >= limit) break;
          add_piece(part, stage, half + h, j, piece, column, x, first_sums);
        }
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          const float2 scale = *reinterpret_cast<const float2*>(
              stage + kScalesAt + (token + n * kTileTokens + 2 * t) * 4);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            sums[h][j][n][i] = fmaf(part[n][i], i % 2 == 0 ? scale.x : scale.y, sums[h][j][n][i]);
        }
      }
  }

  using Part = float[kTokenTiles][4];
  __device__ __forceinline__ void add_piece(Part& part, const unsigned char* stage, int at, int j,
                                            int piece, int column,
                                            const uint32_t (&x)[kTokenTiles][2][4],
                                            const Sums& first_sums) const {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    const int first = piece * Of::kPieceColumns;  // column of the stage
    const int row = at % 2 * kHalf + 4 * g;
    const unsigned char* block = stage + at / 2 * kPanelBytes + first / Of::kBlock * kBlockBytes;
#pragma unroll
    for (int each = 0; each < Of::kGroupsEach; ++each) {
      const int group = first / Of::kGroup + each;
      Sums own_sums;
      if (kGroups > 1) load_sums(own_sums, stage, group);
      const Sums& activations = kGroups > 1 ? own_sums : first_sums;
      int32_t dots[kTokenTiles][4];
#pragma unroll
      for (int step = 0; step < Of::kStepsEach; ++step) {
        const unsigned char* slab = block + Layout::kCodes +
                                    (first % Of::kBlock / Of::kColumns + step) * Of::kStepBytes +
                                    row / 16 * Layout::kSlab;
        LaneCodes<Format::kBits> loaded;
        loaded.load(
            [&](int plane) {  // the tile's rows of four
              const auto two = *reinterpret_cast<const uint2*>(
                  slab + Of::place(4 * plane + g % 4) * kChunk + j * (kChunk / 2));
              return j == 0 ? uint4{two.x, two.y, 0, 0} : uint4{0, 0, two.x, two.y};
            },
            t);
        Codes codes;
        unpack<Format>(codes, loaded, t);
        const int number = first / Of::kColumns + step;  // of the stage's steps
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          const int32_t low = start_of_sums<Format>(activations.of[n][0]);
          const int32_t high = start_of_sums<Format>(activations.of[n][1]);
          int32_t start[4] = {low, high, low, high};
          const uint32_t* operand = x[n][number / 2] + number % 2 * 2;
          const int32_t (&before)[4] = step == 0 ? start : dots[n];
          multiply_step<Format>(dots[n], codes, j, each, operand[0], operand[1], before);
        }
      }
      const int own = (column % Of::kBlock + first % Of::kBlock) / Of::kGroup + each;
      float scales[4], offsets[4] = {};
      const unsigned char* numbers = block + Layout::kSub + row;
      load_scales<Format, kPanel>(scales, block + Layout::kScale + 2 * row, numbers, own);
      if constexpr (Format::kOffset)
        load_scales<Format, kPanel>(offsets, block + Layout::kOffsets + 2 * row, numbers,
                                    static_cast<int>(Layout::kGroups) + own);
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          part[n][i] = fold<Format>(part[n][i], dots[n][i], scales[2 * j + i / 2],
                                    offsets[2 * j + i / 2], activations.of[n][i % 2]);
    }
  }

  __device__ __forceinline__ void load_sums(Sums& to, const unsigned char* stage, int group) const {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const int at = group * kTokens + token + n * kTileTokens + threadIdx.x % 4 * 2;
      const auto two = *reinterpret_cast<const uint2*>(stage + kSumsAt + at * 4);
      to.of[n][0] = static_cast<int32_t>(two.x);
      to.of[n][1] = static_cast<int32_t>(two.y);
    }
  }

  const int half, token;
  float sums[Shape::kHalves][kTilesEach][kTokenTiles][4] = {};
};

}  // namespace puna::cuda
