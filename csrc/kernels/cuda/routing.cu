// Which expert gets which rows: a counting sort by one block, so that nothing of it waits for the
// host; of few rows in the same kernel as the product with the router.
#include "kernels/cuda/norm.cuh"
#include "quant/panel.h"

namespace puna::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
static_assert(kThreads == kNormThreads);

// Whether logit `a` of expert i goes before `b` of expert j: of equal ones the lower index, and NaN
// comes last.
__device__ __forceinline__ bool before(float a, int i, float b, int j) {
  if (a > b || (b != b && a == a)) return true;
  return i < j && (a == b || (a != a && b != b));
}

// A warp finds the top_k of a row, by ascending index, into `best`: one after the other, each the
// first of those behind the one before.
__device__ void choose(const float* logits, int experts, int top_k, int32_t* best) {
  const int lane = threadIdx.x % kWarp;
  float last_logit = INFINITY;
  int last = -1;
  for (int k = 0; k < top_k; ++k) {
    float logit = 0;
    int expert = experts;  // none
    for (int e = lane; e < experts; e += kWarp)
      if ((k == 0 || before(last_logit, last, logits[e], e)) &&
          (expert == experts || before(logits[e], e, logit, expert))) {
        logit = logits[e];
        expert = e;
      }
#pragma unroll
    for (int mask = 1; mask < kWarp; mask *= 2) {
      const float other_logit = __shfl_xor_sync(kAllLanes, logit, mask);
      const int other = __shfl_xor_sync(kAllLanes, expert, mask);
      if (other != experts && (expert == experts || before(other_logit, other, logit, expert))) {
        logit = other_logit;
        expert = other;
      }
    }
    last_logit = logit;
    last = expert;
    if (lane != 0) continue;
    int place = k;  // ascending, by insertion
    for (; place > 0 && best[place - 1] > expert; --place) best[place] = best[place - 1];
    best[place] = expert;
  }
}

// Where a block keeps what its threads need of one another: of few rows in shared memory, which
// answers ten times as fast.
struct Places {
  int32_t* first;   // [experts + 1], in shared memory
  int32_t* chosen;  // [slots]: experts, in the order of rows
  const float* logits;
  int32_t* row;  // as in RoutingCall
  float* score;
};

// By a block, from the logits.
__device__ __forceinline__ void route(const RoutingCall& call, const Places& places) {
  const int slots = static_cast<int>(call.rows) * call.top_k;
  int32_t* const first = places.first;
  const int32_t* const chosen = places.chosen;
  for (int r = threadIdx.x / kWarp; r < static_cast<int>(call.rows); r += kWarps)
    choose(places.logits + static_cast<int64_t>(r) * call.experts, call.experts, call.top_k,
           places.chosen + r * call.top_k);
  __syncthreads();
  for (int e = threadIdx.x; e < call.experts; e += kThreads) {
    int32_t count = 0;
    for (int i = 0; i < slots; ++i) count += chosen[i] == e;
    first[e + 1] = count;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    first[0] = 0;
    int occupied = 0;
    for (int e = 0; e < call.experts; ++e) {
      if (first[e + 1] > 0) call.occupied[occupied++] = e;
      first[e + 1] += first[e];
    }
    const int places_there = call.experts < slots ? call.experts : slots;
    while (occupied < places_there) call.occupied[occupied++] = -1;
  }
  __syncthreads();
  for (int e = threadIdx.x; e <= call.experts; e += kThreads) {
    call.offsets[e] = first[e];
    if (e == call.experts) break;
    int32_t next = first[e];
    if (next == first[e + 1]) continue;
    for (int i = 0; i < slots; ++i) {
      if (chosen[i] != e) continue;
      const int32_t r = i / call.top_k;
      const double logit = places.logits[static_cast<int64_t>(r) * call.experts + e];
      const auto score = static_cast<float>(1.0 / (1.0 + exp(-logit)));
      places.row[next] = call.row[next] = r;
      places.score[next] = call.score[next] = score;
      ++next;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < slots; i += kThreads) {
    // The rows of an expert are ascending: its slot of this row is found by halving.
    const int32_t r = i / call.top_k, expert = chosen[i];
    int32_t low = first[expert], high = first[expert + 1];
    while (high - low > 1) {
      const int32_t middle = low + (high - low) / 2;
      (places.row[middle] <= r ? low : high) = middle;
    }
    call.slot[i] = low;
  }
  if (call.operand.data == nullptr) return;
  // Scores and rows are read by other threads than wrote them: all have passed a barrier since.
  const int spans = static_cast<int>((call.operand.stride + kOperandSpan - 1) / kOperandSpan);
  for (int i = threadIdx.x / kWarp; i < slots * spans; i += kWarps) {
    const int slot = i / spans, span = i % spans;
    const float* x = call.x.data + places.row[slot] * call.x.stride;
    const int column = span * kOperandSpan + threadIdx.x % kWarp * kLaneColumns;
    float values[kLaneColumns];
#pragma unroll
    for (int k = 0; k < kLaneColumns; ++k)
      values[k] = column + k < call.cols
                      ? places.score[slot] * load_number_shared_by_blocks(x + column + k)
                      : 0.0f;
    store_operand(call.operand, slot, span, values);
  }
}

__global__ void __launch_bounds__(kThreads, 1) route_kernel(const RoutingCall call, int few) {
  after_earlier_kernels();
  auto* const first = reinterpret_cast<int32_t*>(shared_memory());
  route(call, {first, few != 0 ? first + call.experts + 1 : call.slot, call.logits, call.row,
               call.score});
}

// --- with the router -----------------------------------------------------------------------------
// A warp takes 8 experts and a span of columns of one row. Its lanes have two experts each and
// every eighth column, as in products with fp32 weights, of which logits are to have the bits.

// Span `span` of a row, as normalised, to where the norm's results go; the last one with those of
// the operand that x has not.
__device__ __forceinline__ void store_span(const NormCall& call, int64_t r, int span,
                                           const float* row) {
  const auto cols = static_cast<int>(call.cols);
  const bool prepares = call.operand.data != nullptr;
  const bool is_last = (span + 1) * kOperandSpan >= cols;
  const int end =
      is_last && prepares ? static_cast<int>(call.operand.stride) : (span + 1) * kOperandSpan;
  for (; span * kOperandSpan < end; ++span) {
    const int first = span * kOperandSpan + threadIdx.x % kWarp * kLaneColumns;
    const Four four = load_four(row, first, cols);
    store_four(call.out.data + r * call.out.stride, first, cols, four);
    if (prepares) store_operand(call.operand, r, span, four.at);
  }
}

constexpr int kWarpExperts = 8, kLaneExperts = 2;
constexpr int kColumnsApart = kWarp * kLaneExperts / kWarpExperts;
constexpr int kTurns = kOperandSpan / kColumnsApart;

__global__ void __launch_bounds__(kThreads, 1) router_kernel(const RoutingCall call) {
  const Router& router = call.router;
  const int lane = threadIdx.x % kWarp, cols = static_cast<int>(call.cols);
  const int spans = (cols + kOperandSpan - 1) / kOperandSpan;
  const int groups = (call.experts + kWarpExperts - 1) / kWarpExperts;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t r = unit / (spans * groups);
  const int span = static_cast<int>(unit / groups % spans);
  const int expert = static_cast<int>(unit % groups) * kWarpExperts + lane % 4 * kLaneExperts;
  const int begin = span * kOperandSpan + lane / 4;
  const bool works = r < call.rows;
  float2 weights[kTurns];
  const auto* panel = static_cast<const char*>(router.weights) +
                      expert / static_cast<int>(kPanelRows) * router.panel_bytes;
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int column = begin + i * kColumnsApart;
    weights[i] = {0, 0};
    if (works && column < cols)
      weights[i] = *reinterpret_cast<const float2*>(
          panel + (static_cast<int64_t>(column) * kPanelRows + expert % kPanelRows) * 4);
  }
  const NormWeights norm_weights(call.norm);  // none if there is no norm
  after_earlier_kernels();
  // A whole warp.
  const auto multiply = [&](const float* x) {
    float2 sums = {0, 0};
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int column = begin + i * kColumnsApart;
      if (column >= cols) break;
      sums.x = fmaf(x[column], weights[i].x, sums.x);
      sums.y = fmaf(x[column], weights[i].y, sums.y);
    }
#pragma unroll
    for (int mask = 4; mask < kWarp; mask *= 2) {
      sums.x += __shfl_xor_sync(kAllLanes, sums.x, mask);
      sums.y += __shfl_xor_sync(kAllLanes, sums.y, mask);
    }
    float* part = router.parts + (r * spans + span) * call.experts + expert;
    if (lane < 4 && expert < call.experts) part[0] = sums.x;
    if (lane < 4 && expert + 1 < call.experts) part[1] = sums.y;
  };
  if (call.norm.rows == 0) {
    if (works) multiply(call.x.data + r * call.x.stride);
  } else {
    // Each block normalises the rows that its warps have, for itself.
    auto* const scratch = reinterpret_cast<float*>(shared_memory());
    float* const row = scratch + kNormWarps;
    const int64_t begin_unit = static_cast<int64_t>(blockIdx.x) * kWarps;
    for (int64_t of = begin_unit / (spans * groups);
         of < call.rows && of * spans * groups < begin_unit + kWarps; ++of) {
      normalise_row(call.norm, of, norm_weights, cols, scratch,
                    [&](int first, const Four& four) { store_four(row, first, cols, four); });
      __syncthreads();
      if (of != r) continue;
      multiply(row);
      if (unit % groups == 0) store_span(call.norm, r, span, row);
    }
  }
  auto* const first = reinterpret_cast<int32_t*>(shared_memory());
  if (!is_last(router.arrived, gridDim.x, first)) return;
  const int slots = static_cast<int>(call.rows) * call.top_k;
  const int logits = static_cast<int>(call.rows) * call.experts;
  int32_t* const chosen = first + call.experts + 1;
  auto* const score = reinterpret_cast<float*>(chosen + 2 * slots);
  float *const logit = score + slots, *const parts = logit + logits;
  for (int i = threadIdx.x; i < logits * spans; i += kThreads)
    parts[i] = load_number_shared_by_blocks(router.parts + i);
  __syncthreads();
  for (int i = threadIdx.x; i < logits; i += kThreads) {
    const float* part = parts + i / call.experts * spans * call.experts + i % call.experts;
    float sum = 0;
#pragma unroll 8
    for (int s = 0; s < spans; ++s) sum += part[s * call.experts];
    logit[i] = sum;
  }
  __syncthreads();
  route(call, {first, chosen, logit, chosen + slots, score});
}

}  // namespace

int launch_route(const RoutingCall& call, Stream stream) {
  constexpr int64_t kFew = 8192;
  const int64_t slots = call.rows * call.top_k, firsts = call.experts + 1;
  if (call.router.weights == nullptr) {
    const bool few = slots <= kFew;
    const int64_t words = firsts + (few ? slots : 0);
    return launch(route_kernel, dim3{1, 1, 1}, kThreads, static_cast<size_t>(4 * words), stream,
                  call, int{few});
  }
  const int64_t spans = (call.cols + kOperandSpan - 1) / kOperandSpan;
  const int64_t units = call.rows * spans * ((call.experts + kWarpExperts - 1) / kWarpExperts);
  const int64_t routing = firsts + 3 * slots + call.rows * call.experts * (1 + spans);
  const int64_t norm = call.norm.rows > 0 ? kNormWarps + call.cols : 0;
  return launch(router_kernel, dim3{static_cast<unsigned>((units + kWarps - 1) / kWarps), 1, 1},
                kThreads, static_cast<size_t>(4 * (routing > norm ? routing : norm)), stream, call);
}

}  // namespace puna::cuda
