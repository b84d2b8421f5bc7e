// Products of one row with quantised weights, which is what decoding is made of. The weights'
// arrival is what it should take; so what a multiprocessor has to do for each byte must be little.
//
// A product of the tensor cores has eight columns of x, and there is one row. So a unit of two
// spans of columns is computed at a time, and its groups, which have a scale each, are the columns:
// of a step's eight columns only that of its group is not zero. Each lane then has sums of other
// groups, and applies the scales of these alone. A block computes half a panel; all of x is in
// shared memory, and weights come through a ring of stages for each warp, a unit each.
#include "kernels/cuda/product.cuh"
#include "kernels/cuda/quantized_weights.cuh"

namespace puna::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kUnitSpans = 2, kUnit = kUnitSpans * kSpan, kUnitSteps = kUnit / 32;

// Which column of the tensor cores' product has which group: lane t has columns 2 t and 2 t + 1,
// and those of span s are lanes 2 s and, of formats with four groups and more, 2 s + 1, in order.
// Eight groups take two sets of sums: a lane's first two groups are of the first.
template <class Format>
struct Columns {
  using Of = Steps<Format>;
  static constexpr int kGroups = kSpan / Of::kGroup;  // of a span
  static constexpr int kLanes = kGroups >= 4 ? 2 : 1;
  static constexpr int kOwn = kGroups / kLanes;  // groups of a lane
  static constexpr int kSets = kOwn > 2 ? kOwn / 2 : 1;
  // Steps whose group is a column's, one after the other.
  static constexpr int kOwnSteps = kOwn > 2 ? kOwn / 2 : Of::kStepsEach;

  // Of group `each` of step `step` of a unit.
  static __device__ constexpr int column(int step, int each) {
    const int span = step * Of::kColumns / kSpan, group = step * Of::kColumns % kSpan / Of::kGroup;
    return 4 * span + group / kOwn * 2 + (group + each) % 2;
  }
  static __device__ constexpr int set(int step) {
    return step * Of::kColumns % kSpan / Of::kGroup % kOwn / 2;
  }
  // The first step of column `column`.
  static __device__ int first_step(int column) {
    constexpr int kSpanSteps = kSpan / Of::kColumns;
    const int lane = column % 4 / 2, group = kOwn > 2 ? lane * kOwn : column % 4;
    return column / 4 * kSpanSteps + group * Of::kGroup / Of::kColumns % kSpanSteps;
  }
};

// Shared memory of a block: the ring; x; the spans' sums, of kHalf rows each; the sums of x by
// group, and its scales. Columns that x has not belong to groups that it has not, whose sums, of
// whatever lies there, nobody takes.
template <class Format>
struct Memory {
  using Stage = StagedWeights<Format, kUnit>;
  static constexpr int kStages = Format::kBits > 4 ? 2 : 3;  // 55 KB of a block or more
  static constexpr int kRing = kWarps * kStages * Stage::kBytes;
  static constexpr int kGroups = Columns<Format>::kGroups;
  static __host__ __device__ int units(int limit) { return (limit + kUnit - 1) / kUnit; }
  static __host__ __device__ int bytes(int limit) {
    return kRing + units(limit) * (kUnit + kUnitSpans * (kHalf + 1 + kGroups) * 4);
  }

  __device__ explicit Memory(int limit)
      : x(shared_memory() + kRing),
        parts(reinterpret_cast<float*>(x + units(limit) * kUnit)),
        sums(reinterpret_cast<int32_t*>(parts + units(limit) * kUnitSpans * kHalf)),
        scales(reinterpret_cast<float*>(sums + units(limit) * kUnitSpans * kGroups)) {}

  unsigned char* x;
  float* parts;
  int32_t* sums;
  float* scales;
};

// The sums of a unit's spans to memory.parts, by a warp.
template <class Format>
__device__ __forceinline__ void multiply_unit(const Memory<Format>& memory,
                                              const unsigned char* stage, int unit, int limit) {
  using Of = Steps<Format>;
  using Column = Columns<Format>;
  using Stage = StagedWeights<Format, kUnit>;
  constexpr int kGroups = Column::kGroups, kOwn = Column::kOwn;
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;

  // The lane's groups, of whose columns it gets the sums.
  const int span = t / 2, first_group = span * kGroups + (Column::kLanes > 1 ? t % 2 * kOwn : 0);
  int32_t sums[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
    sums[i] = memory.sums[unit * kUnitSpans * kGroups + first_group + i];
  int32_t dots[Column::kSets][kTilesEach][4];
#pragma unroll
  for (int set = 0; set < Column::kSets; ++set)
#pragma unroll
    for (int j = 0; j < kTilesEach; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        dots[set][j][i] = start_of_sums<Format>(sums[(2 * set + i % 2) % kOwn]);

  // What column g has of x: the halves of its steps, of which it may use one.
  uint32_t own[Column::kOwnSteps][2];
  const unsigned char* x = memory.x + unit * kUnit + Column::first_step(g) * Of::kColumns + 4 * t;
#pragma unroll
  for (int i = 0; i < Column::kOwnSteps; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      own[i][half] = *reinterpret_cast<const uint32_t*>(x + i * Of::kColumns + half * 16);
#pragma unroll
  for (int step = 0; step < kUnitSteps; ++step) {
    Codes codes;
    Stage::load_codes(codes, stage, step);
#pragma unroll
    for (int each = 0; each < Of::kGroupsEach; ++each) {
      const bool mine = g == Column::column(step, each);
      const uint32_t low = mine ? own[step % Column::kOwnSteps][0] : 0;
      const uint32_t high = mine ? own[step % Column::kOwnSteps][1] : 0;
#pragma unroll
      for (int j = 0; j < kTilesEach; ++j) {
        auto& sum = dots[Column::set(step)][j];
        multiply_step<Format>(sum, codes, j, each, low, high, sum);
      }
    }
  }

  float scales[kOwn][4], offsets[kOwn][4] = {};
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int column = (first_group + i) * Of::kGroup;
    Stage::load_factors(scales[i], offsets[i], stage, column / Of::kBlock,
                        column % Of::kBlock / Of::kGroup);
  }
  const int groups = (limit - unit * kUnit) / Of::kGroup - first_group;  // from the lane's on
  float values[kOwn][4];
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
#pragma unroll
    for (int r = 0; r < 4; ++r) values[i][r] = float_of_sums(dots[i / 2][r / 2][r % 2 * 2 + i % 2]);
  const auto add_groups = [&](float (&part)[4]) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      if (i < groups)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          part[r] = fold<Format>(part[r], values[i][r], scales[i][r], offsets[i][r], sums[i]);
  };
  float part[4] = {};
  add_groups(part);
  if constexpr (Column::kLanes > 1) {
    // The second lane of a span goes on where the first has come to.
#pragma unroll
    for (float& sum : part) sum = __shfl_xor_sync(kAllLanes, sum, 1);
    add_groups(part);
  }
  if (t % 2 == Column::kLanes - 1)
    *reinterpret_cast<float4*>(memory.parts + (unit * kUnitSpans + span) * kHalf + 4 * g) = {
        part[0], part[1], part[2], part[3]};
}

template <class Format>
__global__ void __launch_bounds__(kThreads, 3) one_row_kernel(const ProductCall call) {
  using Stage = StagedWeights<Format, kUnit>;
  constexpr int kStages = Memory<Format>::kStages;
  const int tile = static_cast<int>(blockIdx.y);
  const bool known = matrix_is_known<1>(call, tile);
  if (!known) after_earlier_kernels();
  Share share;
  if (!find_share<1>(call, tile, &share)) return;

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kHalf;
  const int half = static_cast<int>(row % kPanel / kHalf);
  const uint8_t* panel = share.weights + row / kPanel * call.panel_bytes;
  const int limit = static_cast<int>(share.x.stride), units = Memory<Format>::units(limit);
  const auto spans = static_cast<int>(share.x.spans);
  const Memory<Format> memory(limit);
  unsigned char* const ring = shared_memory() + warp * kStages * Stage::kBytes;
  const auto request_weights = [&] {
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      const int unit = warp + i * kWarps;
      if (unit < units) Stage::copy(ring + i * Stage::kBytes, panel, half, unit * kUnit, limit);
      commit_copies();
    }
  };
  const auto request_row = [&] {
    const auto* x = static_cast<const uint8_t*>(share.x.data) + share.first * limit;
    const int32_t* sums = share.x.sums + share.first * share.x.groups;
    const float* scales = share.x.scales + share.first * spans;
    for (int i = threadIdx.x; i < limit / kChunk; i += kThreads)
      copy_async<kChunk>(memory.x + i * kChunk, x + i * kChunk);
    for (int i = threadIdx.x; i < static_cast<int>(share.x.groups); i += kThreads)
      copy_async<4>(memory.sums + i, sums + i);
    for (int i = threadIdx.x; i < spans; i += kThreads)
      copy_async<4>(memory.scales + i, scales + i);
    commit_copies();
  };
  // What the ring has no room for, to the second cache: of both halves a block takes a half.
  const auto fetch_others = [&] {
    constexpr int64_t kUnitBytes = kUnit / Format::kBlock * Stage::Layout::kBytes;
    const int64_t begin = int64_t{kStages * kWarps} * kUnitBytes;
    const int64_t each = (call.panel_bytes - begin) / 2, first = begin + half * each;
    for (int64_t at = threadIdx.x * kCacheLine; at < each; at += kThreads * kCacheLine)
      fetch_to_cache(panel + first + at);
  };
  // Weights that are known come before earlier kernels have ended, most of which leave the memory
  // with little to do; they are there when x is.
  if (known) {
    request_weights();
    fetch_others();
    after_earlier_kernels();
    request_row();
  } else {
    request_row();
    request_weights();
  }
  const bool finishes = warp == 0 && row + lane < call.rows;
  float* const out = share.out.data + share.first * share.out.stride + row + lane;
  const float before = finishes && share.accumulate ? *out : 0.0f;
  const float bias = finishes && call.bias != nullptr ? call.bias[row + lane] : 0.0f;
  if (known)
    wait_for_copies<0>();
  else
    wait_for_copies<kStages>();
  __syncthreads();

  unsigned char* stage = ring;
  for (int unit = warp; unit < units; unit += kWarps) {
    wait_for_copies<kStages - 1>();
    __syncwarp();  // what the other lanes have copied
    multiply_unit(memory, stage, unit, limit);
    __syncwarp();  // the stage has been read
    const int next = unit + kStages * kWarps;
    if (next < units) Stage::copy(stage, panel, half, next * kUnit, limit);
    commit_copies();
    stage = stage == ring + (kStages - 1) * Stage::kBytes ? ring : stage + Stage::kBytes;
  }
  wait_for_copies<0>();
  __syncthreads();
  if (!finishes) return;
  float sum = 0;
#pragma unroll 8
  for (int span = 0; span < spans; ++span)
    sum = fmaf(memory.parts[span * kHalf + lane], memory.scales[span], sum);
  *out = finished(call, sum, bias, before, share.accumulate);
}

template <class Format>
int launch_one_row(const ProductCall& call, Stream stream) {
  const dim3 grid{static_cast<unsigned>((call.rows + kHalf - 1) / kHalf), most_tiles<1>(call), 1};
  const auto bytes = static_cast<size_t>(Memory<Format>::bytes(static_cast<int>(call.x.stride)));
  return launch(one_row_kernel<Format>, grid, kThreads, bytes, stream, call);
}

struct OfFormat {
  int (*bytes)(int limit);
  int (*launch)(const ProductCall&, Stream);
};
constexpr OfFormat kFormats[] = {
#define PUNA_FORMAT(Traits, name) {&Memory<Traits>::bytes, &launch_one_row<Traits>},
#include "quant/formats.inc"
#undef PUNA_FORMAT
};

}  // namespace

// One row for each matrix, of which there is room for all in shared memory.
bool is_for_one_row(const ProductCall& call) {
  constexpr int64_t kMostColumns = int64_t{1} << 20;  // of which the bytes are an int
  return call.count == 1 && call.shared.count <= 1 && call.x.stride <= kMostColumns &&
         kFormats[call.format].bytes(static_cast<int>(call.x.stride)) <= kMostShared;
}

int launch_quantized_one_row(const ProductCall& call, Stream stream) {
  return kFormats[call.format].launch(call, stream);
}

}  // namespace puna::cuda
