// Products with weights that are bfloat16.
#include "kernels/cuda/bf16_weights.cuh"
#include "kernels/cuda/few_product.cuh"

namespace puna::cuda {
namespace {

// A stage is of a span: pairs of columns of the half's rows, and two times kRowBytes of rows of x.
// Chunk c of 16 bytes of pair p lies at c ^ 2 * (p % 4): the lanes of one g load from four pairs.
struct BF16Weights {
  static constexpr bool kScaled = false;
  static constexpr int kRows = kHalf, kWarps = 4, kStages = 2, kResident = 4;
  static constexpr int kPairs = kSpan / 2, kHalfBytes = 4 * kHalf, kHalfChunks = kHalfBytes / 16;
  static constexpr int kRowsAt = kPairs * kHalfBytes;
  static __host__ __device__ int stage_bytes(int tokens) {
    return kRowsAt + 2 * tokens * kRowBytes;
  }
  using Part = float[kTilesEach][4];

  struct Lane {
    __device__ Lane(const ProductCall& call, const Share& share, int64_t row, int most_tokens)
        : lane(threadIdx.x % kWarp),
          tokens(share.count),
          rows_bytes(most_tokens * kRowBytes),
          limit(static_cast<int>((call.cols + 1) / 2 * 2)),
          row_bytes(static_cast<int>(2 * share.x.stride)),
          panel(share.weights + row / kPanel * call.panel_bytes + 4 * (row % kPanel)),
          rows(static_cast<const uint8_t*>(share.x.data) + 2 * share.first * share.x.stride) {}

    __device__ __forceinline__ void copy_weights(unsigned char* stage, int span) const {
      constexpr int kTurn = kWarp / kHalfChunks;  // pairs that are copied together
      const int pair = lane / kHalfChunks, chunk = lane % kHalfChunks;
      unsigned char* to = stage + pair * kHalfBytes + (chunk ^ 2 * (pair % 4)) * kChunk;
      const uint8_t* from =
          panel + static_cast<int64_t>(span * kPairs + pair) * kPairBytes + chunk * kChunk;
      const int left = limit - span * kSpan - 2 * pair;  // columns
      static_assert(kTurn % 4 == 0);
#pragma unroll
      for (int first = 0; first < kPairs; first += kTurn)
        copy_async(to + first * kHalfBytes, from + first * kPairBytes, 2 * first < left);
    }
    __device__ __forceinline__ void copy_activations(unsigned char* stage, int span) const {
#pragma unroll
      for (int part = 0; part < 2; ++part)
        copy_rows<kTileTokens, kWarp>(stage + kRowsAt + part * rows_bytes, lane, rows, tokens,
                                      row_bytes, 2 * kSpan * span + part * kRowBytes);
    }
    __device__ __forceinline__ void multiply(const unsigned char* stage, int span,
                                             Part& part) const {
      const int g = lane / 4, t = lane % 4;
      const int token = lane % 8 < tokens ? lane % 8 : tokens - 1;
#pragma unroll
      for (int pair = 0; pair < kSpan / kStepColumns / 2; ++pair) {
        uint32_t x[4];
        load_rows(x, stage + kRowsAt + pair / 2 * rows_bytes, token, pair % 2);
#pragma unroll
        for (int each = 0; each < 2; ++each) {
          const int step = 2 * pair + each;
          if (span * kSpan + step * kStepColumns >= limit) break;
          uint4 words[2];  // rows 4 g .. 4 g + 3 at pairs t and t + 4
#pragma unroll
          for (int i = 0; i < 2; ++i)
            words[i] = *reinterpret_cast<const uint4*>(
                stage + (step * kStepColumns / 2 + t + 4 * i) * kHalfBytes + (g ^ 2 * t) * kChunk);
          mma_bf16(part[0], {words[0].x, words[0].y, words[1].x, words[1].y}, x[2 * each],
                   x[2 * each + 1]);
          mma_bf16(part[1], {words[0].z, words[0].w, words[1].z, words[1].w}, x[2 * each],
                   x[2 * each + 1]);
        }
      }
    }
    __device__ __forceinline__ void store(float* to, const Part& part) const {
      store_half(to, part, lane / 4, lane % 4, tokens);
    }

    int lane, tokens;
    int rows_bytes;  // of half a stage's rows
    int limit, row_bytes;
    const uint8_t* panel;
    const uint8_t* rows;
  };
};

// A stage is half a span: of each panel 32 pairs of columns, and rows of x.
template <class ShapeOfTile>
struct BF16Tile {
  using Shape = ShapeOfTile;
  static constexpr int kStageColumns = kSpan / 2;
  static constexpr int kTokens = Shape::kTokens, kTokenTiles = Shape::kTokenTiles;
  static constexpr int kPairs = kStageColumns / 2;
  static constexpr int kRowsAt = Shape::kPanels * kPairs * kPairBytes;
  static constexpr int kStageBytes = kRowsAt + Shape::kTokens * kRowBytes;

  __device__ BF16Tile(const ProductCall& call, const Share& share, int64_t first_panel,
                      int first_half, int first_token)
      : rows(static_cast<const uint8_t*>(share.x.data) + 2 * share.first * share.x.stride),
        row_bytes(static_cast<int>(2 * share.x.stride)),
        count(share.count),
        panels(share.weights + first_panel * call.panel_bytes),
        panel_bytes(call.panel_bytes),
        there(static_cast<int>((call.rows + kPanel - 1) / kPanel - first_panel)),
        limit(static_cast<int>((call.cols + 1) / 2 * 2)),
        half(first_half),
        token(first_token) {}

  __device__ __forceinline__ void copy(unsigned char* stage, int column) const {
    copy_pairs<Shape::kPanels, kPairs, Shape::kThreads>(stage, panels, panel_bytes, there, column,
                                                        limit);
    copy_rows<kTokens, Shape::kThreads>(stage + kRowsAt, threadIdx.x, rows, count, row_bytes,
                                        2 * column);
  }

  __device__ __forceinline__ void add(const unsigned char* stage, int column) {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int pair = 0; pair < kStageSteps / 2; ++pair) {
      uint32_t x[kTokenTiles][4];
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n)
        load_rows(x[n], stage + kRowsAt, token + n * kTileTokens + threadIdx.x % 8, pair);
#pragma unroll
      for (int each = 0; each < 2; ++each) {
        const int step = 2 * pair + each;
        if (column + step * kStepColumns >= limit) break;
#pragma unroll
        for (int h = 0; h < Shape::kHalves; ++h) {
          const int panel = (half + h) / 2, chunk = (half + h) % 2 * (kHalf / 4) + g;
          uint4 words[2];  // rows 4 g .. 4 g + 3 at pairs t and t + 4
#pragma unroll
          for (int i = 0; i < 2; ++i)
            words[i] = *reinterpret_cast<const uint4*>(
                stage + (panel * kPairs + step * 8 + t + 4 * i) * kPairBytes +
                (chunk ^ 2 * t) * kChunk);
#pragma unroll
          for (int n = 0; n < kTokenTiles; ++n) {
            const uint32_t *low = x[n] + 2 * each, *high = low + 1;
            mma_bf16(part[h][0][n], {words[0].x, words[0].y, words[1].x, words[1].y}, *low, *high);
            mma_bf16(part[h][1][n], {words[0].z, words[0].w, words[1].z, words[1].w}, *low, *high);
          }
        }
      }
    }
    // The span ends with this stage.
    if ((column + kStageColumns) % kSpan == 0 || column + kStageColumns >= limit)
#pragma unroll
      for (int h = 0; h < Shape::kHalves; ++h)
#pragma unroll
        for (int j = 0; j < kTilesEach; ++j)
#pragma unroll
          for (int n = 0; n < kTokenTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              sums[h][j][n][i] += part[h][j][n][i];
              part[h][j][n][i] = 0;
            }
  }

  const uint8_t* const rows;  // of x
  const int row_bytes, count;
  const uint8_t* const panels;
  const int64_t panel_bytes;
  const int there;  // panels from the first one on
  const int limit;  // columns that there are
  const int half, token;
  float part[Shape::kHalves][kTilesEach][kTokenTiles][4] = {};
  float sums[Shape::kHalves][kTilesEach][kTokenTiles][4] = {};
};

}  // namespace

int launch_bf16_product(const ProductCall& call, Stream stream) {
  // Never by the number of rows: a tensor core may add up what warpgroups multiply in another way.
  if (by_warpgroups(call) && call.experts.offsets == nullptr && call.shared.count == 0)
    return launch_bf16_warpgroups(call, stream);
  const ProductSize size = size_of(call);
  const int error = size == kFewRows    ? launch_few_product<BF16Weights>(call, stream)
                    : size == kSomeRows ? launch_tiled_product<BF16Tile<SmallTile>>(call, stream)
                                        : launch_tiled_product<BF16Tile<LargeTile>>(call, stream);
  if (error != 0 || call.operand.data == nullptr) return error;
  OperandCall made = {};
  made.operand = call.operand;
  made.x = {call.out.data, call.out.stride};
  made.rows = call.count;
  made.cols = call.rows;
  return launch_prepare_operand(made, stream);
}

}  // namespace puna::cuda
