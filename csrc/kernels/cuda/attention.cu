// Attention over pages of the KV cache: each page is attended to by itself, from a fresh state, and
// the states of the pages are added up in order. What is added to what depends on positions alone,
// so neither the cut of a prompt nor the rows beside change a bit. Here it is in fp32, for any
// pages; tensor_attention.cu is for those that it says.
#include "kernels/cuda/launches.h"
#include "kernels/cuda/plain_attention.cuh"

namespace puna::cuda {
namespace {

// The page as attend_page reads it; its scales, which all threads need, go to shared memory.
template <int kBits>
__device__ __forceinline__ Sealed<kBits> sealed_page(const AttendCall& call, const void* page,
                                                     int head, const PlainMemory& memory) {
  const SealedPages& at = call.closed;
  const auto* bytes = static_cast<const uint8_t*>(page);
  const int padded = padded_of(at);
  const auto widen = [&](float* to, int64_t offset, int count) {
    const auto* from = reinterpret_cast<const uint16_t*>(bytes + offset);
    for (int i = threadIdx.x; i < count; i += kPlainThreads) to[i] = float_of_bf16(from[i]);
  };
  widen(memory.key_scales, at.key_scales + head * at.key_scale_bytes, 2 * padded);
  widen(memory.value_scales, at.value_scales + head * at.value_scale_bytes, 2 * kPageTokens);
  return {bytes + head * at.plane_bytes,
          bytes + at.lower + head * at.plane_bytes,
          bytes + at.values + head * at.code_bytes,
          memory.key_scales,
          memory.value_scales,
          padded};
}

// Pairs of one query, one page.
__global__ void __launch_bounds__(kPlainThreads, 4) attend_plain_kernel(const AttendCall call) {
  after_earlier_kernels();
  const AttentionTile& tile = call.tiles[blockIdx.z];
  const int64_t page = call.first_page + blockIdx.x;
  if (page > tile.before) return;
  const int dim = call.heads.dim, kv_head = blockIdx.y;
  const PlainMemory memory(dim, padded_of(call.closed));
  load_queries(memory, tile.pairs, dim,
               [&](int i, int c) { return pair_of(call, tile, kv_head, i).query[c] * kLog2E; });

  const bool own = page == tile.before;
  const void* data = own ? tile.own : call.pages[tile.first_page + page];
  const int tokens = own ? pair_of(call, tile, kv_head, 0).seen : kPageTokens;
  const int form = own ? call.open.form : call.closed.form;
  const States states(call, blockIdx.z, kv_head);
  const auto attend = [&](const auto& keys_and_values) {
    __syncthreads();
    attend_page(keys_and_values, memory, tile.pairs, dim, tokens, states.of(0, page),
                states.pair_stride);
  };
  const char* keys = static_cast<const char*>(data) + kv_head * call.open.head_bytes;
  const char* values = keys + call.open.part_bytes;
  if (form == kPageF32)
    attend(Open<float>{reinterpret_cast<const float*>(keys), reinterpret_cast<const float*>(values),
                       dim});
  else if (form == kPageBF16)
    attend(Open<uint16_t>{reinterpret_cast<const uint16_t*>(keys),
                          reinterpret_cast<const uint16_t*>(values), dim});
  else if (form == kPageInt8)
    attend(sealed_page<8>(call, data, kv_head, memory));
  else
    attend(sealed_page<4>(call, data, kv_head, memory));
  finish_pages(call, tile, kv_head, page, states, memory.slot);
}

}  // namespace

int launch_attend(const AttendCall& call, Stream stream) {
  if (call.kind != kAttendPlain) return launch_tensor_attention(call, stream);
  const dim3 grid{static_cast<unsigned>(call.page_count),
                  static_cast<unsigned>(call.heads.key_value), static_cast<unsigned>(call.count)};
  return launch(attend_plain_kernel, grid, kPlainThreads,
                plain_shared(call.heads.dim, padded_of(call.closed)), stream, call);
}

}  // namespace puna::cuda
