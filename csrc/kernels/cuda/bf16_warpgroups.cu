// Products of bfloat16 by warpgroups: a block computes two panels of weights, one for each of two
// warpgroups, for up to 256 rows of x in parts of 64.
//
// A span's weights, the left operand, go to registers once, for all parts. The products of a part
// are carried out while the sums of the one before are added up. Shared memory is a ring of pieces,
// each the rows of a part in a span, and as many spans' weights: what a piece leaves is asked for
// again at once, so that copies, which take as long as anything, never pause. One matrix for all
// rows: there are no experts.
#include "kernels/cuda/bf16_weights.cuh"
#include "kernels/cuda/warpgroup_product.cuh"

namespace puna::cuda {
namespace {

constexpr int kSpanPairs = kSpan / 2, kSpanSteps = kSpan / kStepColumns;
constexpr int kSpanHalves = 2 * kSpan / kRowBytes;  // of a row of x
constexpr int kHalfBytes = kWarpgroupColumns * kRowBytes;

template <int kPartsOfBlock>
struct BF16Ring {
  static constexpr int kParts = kPartsOfBlock, kTokens = kParts * kWarpgroupColumns;
  static constexpr int kPanels = WarpgroupShape::kPanels, kThreads = WarpgroupShape::kThreads;
  static constexpr int kWeightBytes = kPanels * kSpanPairs * kPairBytes;
  static constexpr int kPieceBytes = kSpanHalves * kHalfBytes;
  static constexpr int kSpans = kMostWarpgroupShared / (kWeightBytes + kParts * kPieceBytes);
  static constexpr int kPieces = kSpans * kParts;
  static constexpr int kBytes = kSpans * kWeightBytes + kPieces * kPieceBytes;
  // Of two pieces the products are on their way.
  static constexpr int kAhead = kPieces - 2;
  static_assert(kSpans >= 2 && kParts % 2 == 0 && kWeightBytes % kSharedAlignment == 0);

  static __device__ __forceinline__ unsigned char* weights(int span) {
    return shared_memory() + span % kSpans * kWeightBytes;
  }
  static __device__ __forceinline__ unsigned char* piece(int span, int part) {
    return shared_memory() + kSpans * kWeightBytes + (span % kSpans * kParts + part) * kPieceBytes;
  }
};

// What a block copies: its weights and its rows of x.
template <class Ring>
struct BF16Copies {
  __device__ BF16Copies(const ProductCall& call, int64_t first_token, int tokens,
                        int64_t first_panel)
      : rows(static_cast<const uint8_t*>(call.x.data) + 2 * first_token * call.x.stride),
        row_bytes(static_cast<int>(2 * call.x.stride)),
        count(tokens),
        panels(static_cast<const uint8_t*>(call.weights) + first_panel * call.panel_bytes),
        panel_bytes(call.panel_bytes),
        there(static_cast<int>((call.rows + kPanel - 1) / kPanel - first_panel)),
        limit(static_cast<int>((call.cols + 1) / 2 * 2)),
        spans((limit + kSpan - 1) / kSpan) {}

  // The rows of a part, and before those of the first one the weights.
  __device__ __forceinline__ void request(int span, int part) const {
    if (span < spans) {
      if (part == 0)
        copy_pairs<Ring::kPanels, kSpanPairs, Ring::kThreads>(
            Ring::weights(span), panels, panel_bytes, there, span * kSpan, limit);
      const int first = part * kWarpgroupColumns;
#pragma unroll
      for (int half = 0; half < kSpanHalves; ++half)
        copy_rows<kWarpgroupColumns, Ring::kThreads>(Ring::piece(span, part) + half * kHalfBytes,
                                                     threadIdx.x, rows + int64_t{first} * row_bytes,
                                                     count - first, row_bytes,
                                                     2 * kSpan * span + half * kRowBytes);
    }
    commit_copies();
  }

  const uint8_t* const rows;
  const int row_bytes, count;
  const uint8_t* const panels;
  const int64_t panel_bytes;
  const int there;  // panels from the first one on
  const int limit;  // columns that there are
  const int spans;
};

#if PUNA_WARPGROUPS
// Warp w of a warpgroup has rows 16 w .. 16 w + 15 of its panel, a lane two neighbours of these:
// the lanes that load together then meet every bank of the memory once.
__device__ __forceinline__ int row_of_panel() {
  return threadIdx.x % kWarpgroup / kWarp * 16 + threadIdx.x % kWarp / 4 * 2;
}

// The left operands of a span.
__device__ __forceinline__ void load_span(uint32_t (&to)[kSpanSteps][4],
                                          const unsigned char* weights) {
  const int row = row_of_panel(), t = threadIdx.x % 4;
  const unsigned char* from =
      weights + (static_cast<int>(threadIdx.x) / kWarpgroup * kSpanPairs + t) * kPairBytes +
      (row / 4 ^ 2 * t) * kChunk + row % 4 * 4;
#pragma unroll
  for (int step = 0; step < kSpanSteps; ++step)
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // pairs t and t + 4
      const auto two =
          *reinterpret_cast<const uint2*>(from + (step * kStepColumns / 2 + 4 * i) * kPairBytes);
      to[step][2 * i] = two.x;
      to[step][2 * i + 1] = two.y;
    }
}

// Results of `count` tokens of a part, from `first_token` on, to where they belong, by way of the
// warp's own shared memory: a lane then has four neighbouring rows of the 16 from `first` on, for
// one token in eight.
constexpr int kTurnedStride = 20;  // floats of a token's 16 rows: no bank is met twice
constexpr int kTurnedFloats = kWarpgroupColumns * kTurnedStride;
__device__ __forceinline__ void store_part(const ProductCall& call, int64_t first_token, int count,
                                           float* turned, const float (&sums)[kWarpgroupSums],
                                           int64_t first) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int n = 0; n < kWarpgroupColumns / 8; ++n)
#pragma unroll
    for (int column = 0; column < 2; ++column)
      *reinterpret_cast<float2*>(turned + (8 * n + lane % 4 * 2 + column) * kTurnedStride +
                                 lane / 4 * 2) = {sums[4 * n + column], sums[4 * n + 2 + column]};
  __syncwarp();
  const int64_t row = first + lane % 4 * 4;
  float bias[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    bias[i] = call.bias != nullptr && row + i < call.rows ? call.bias[row + i] : 0.0f;
#pragma unroll 1
  for (int token = lane / 4; token < kWarpgroupColumns; token += 8) {
    if (token >= count) break;
    const float4 four =
        *reinterpret_cast<const float4*>(turned + token * kTurnedStride + lane % 4 * 4);
    const float sum[4] = {four.x, four.y, four.z, four.w};
    float* to = call.out.data + (first_token + token) * call.out.stride + row;
    const bool whole =
        row + 4 <= call.rows && reinterpret_cast<uintptr_t>(to) % sizeof(float4) == 0;
    float4 before = {};
    if (call.accumulate && whole) before = *reinterpret_cast<const float4*>(to);
    const float was[4] = {before.x, before.y, before.z, before.w};
    float result[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool apart = call.accumulate && !whole && row + i < call.rows;
      result[i] = finished(call, sum[i], bias[i], apart ? to[i] : was[i], call.accumulate != 0);
    }
    if (whole && !call.passing) {
      *reinterpret_cast<float4*>(to) = {result[0], result[1], result[2], result[3]};
    } else if (!call.passing) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (row + i < call.rows) to[i] = result[i];
    }
    if (call.operand.data != nullptr)
      *reinterpret_cast<uint2*>(static_cast<uint16_t*>(call.operand.data) +
                                (first_token + token) * call.operand.stride + row) = {
          bf16_pair(result[0], result[1]), bf16_pair(result[2], result[3])};
  }
  __syncwarp();
}
#endif

template <class Ring>
__global__ void __launch_bounds__(Ring::kThreads, 1)
    bf16_warpgroups_kernel(const ProductCall call) {
#if PUNA_WARPGROUPS
  constexpr int kParts = Ring::kParts, kAhead = Ring::kAhead;
  after_earlier_kernels();
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * Ring::kTokens;
  const int64_t left = call.count - first_token;
  const int count = static_cast<int>(left < Ring::kTokens ? left : Ring::kTokens);
  const int64_t first_panel = static_cast<int64_t>(blockIdx.y) * Ring::kPanels;
  const BF16Copies<Ring> copies(call, first_token, count, first_panel);
#pragma unroll
  for (int piece = 0; piece < kAhead; ++piece) copies.request(piece / kParts, piece % kParts);

  float sums[kParts][kWarpgroupSums] = {}, dots[2][kWarpgroupSums];
  uint32_t weights[kSpanSteps][4];
  const auto add = [&](int part) {
#pragma unroll
    for (int i = 0; i < kWarpgroupSums; ++i) sums[part][i] += dots[part % 2][i];
  };
  // Also of a panel that is not there: products must not depend on a thread's index.
  for (int span = 0; span < copies.spans; ++span) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      wait_for_copies<kAhead - 1>();
      fence_shared_operands();
      __syncthreads();  // the piece is there, and the last but one is not needed any more
      copies.request(span + (part + kAhead) / kParts, (part + kAhead) % kParts);
      if (part == 0) {
        if (span > 0) {
          wait_for_products<0>(dots[1]);
          add(kParts - 1);
        }
        load_span(weights, Ring::weights(span));
      }
      fence_products();
      const unsigned char* rows = Ring::piece(span, part);
#pragma unroll
      for (int step = 0; step < kSpanSteps; ++step) {
        constexpr int kEach = kSpanSteps / kSpanHalves;
        const SharedOperand operand =
            shared_operand(rows + step / kEach * kHalfBytes).after(step % kEach);
        if (step == 0)
          warpgroup_mma_bf16<false>(dots[part % 2], weights[step], operand);
        else
          warpgroup_mma_bf16<true>(dots[part % 2], weights[step], operand);
      }
      commit_products();
      if (part > 0) {
        wait_for_products<1>(dots[(part - 1) % 2]);
        add(part - 1);
      }
    }
  }
  wait_for_products<0>(dots[1]);
  add(kParts - 1);
  wait_for_copies<0>();

  // In the place of weights, which all threads have in registers since the last part but one.
  static_assert(Ring::kThreads / kWarp * kTurnedFloats * 4 <= Ring::kSpans * Ring::kWeightBytes);
  auto* turned = reinterpret_cast<float*>(shared_memory()) + threadIdx.x / kWarp * kTurnedFloats;
  const int64_t first = first_panel * kPanel + threadIdx.x / kWarp * 16;  // of the warp's rows
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int token = part * kWarpgroupColumns;
    store_part(call, first_token + token, count - token, turned, sums[part], first);
  }
#endif
}

template <class Ring>
dim3 grid_of(const ProductCall& call) {
  constexpr int64_t kRows = Ring::kPanels * kPanel;
  return {static_cast<unsigned>(tiles_of<Ring::kTokens>(call.count)),
          static_cast<unsigned>((call.rows + kRows - 1) / kRows), 1};
}
// How often every multiprocessor has a block.
template <class Ring>
int64_t waves_of(const ProductCall& call) {
  const dim3 grid = grid_of<Ring>(call);
  const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y, places = multiprocessors();
  return (blocks + places - 1) / places;
}
template <class Ring>
int launch_ring(const ProductCall& call, Stream stream) {
  return launch(bf16_warpgroups_kernel<Ring>, grid_of<Ring>(call), Ring::kThreads, Ring::kBytes,
                stream, call);
}

}  // namespace

int launch_bf16_warpgroups(const ProductCall& call, Stream stream) {
  // A block of half as many tokens takes half the products and two thirds of the copies; it is
  // worth it where large ones would leave multiprocessors idle. Elements are summed up alike.
  using Large = BF16Ring<4>;
  using Small = BF16Ring<2>;
  return 2 * waves_of<Small>(call) < 3 * waves_of<Large>(call) ? launch_ring<Small>(call, stream)
                                                               : launch_ring<Large>(call, stream);
}

}  // namespace puna::cuda
