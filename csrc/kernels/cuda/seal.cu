// Sealing full pages: the bytes are those of backend/kv_seal.h, which says what they mean.
#include "kernels/cuda/launches.h"

namespace puna::cuda {
namespace {

constexpr int kPageTokens = 256, kKeyBlock = 16;  // backend/kv_layout.h
constexpr int kSealedLine = 128, kLineRows = 32;
constexpr int kThreads = 128;
constexpr uint16_t kNaN = 0x7fc0;

// The bfloat16 next to `value` that is not above it; for not below it, value >= 0.
__device__ __forceinline__ uint16_t bf16_below(float value) {
  const uint32_t bits = __float_as_uint(value);
  const bool grows = bits >> 31 != 0 && (bits & 0xffffu) != 0;
  return static_cast<uint16_t>((bits >> 16) + (grows ? 1 : 0));
}
__device__ __forceinline__ uint16_t bf16_above(float value) {
  const uint32_t bits = __float_as_uint(value);
  return static_cast<uint16_t>((bits >> 16) + ((bits & 0xffffu) != 0 ? 1 : 0));
}
__device__ __forceinline__ bool finite(float value) { return value - value == 0; }

// How values at(0), at(1), ... at(count - 1) are encoded.
struct Range {
  uint16_t scale, zero;
  float least, divisor, levels;
  bool spoilt;

  __device__ uint32_t code(float value) const {
    if (spoilt) return 0;
    const auto code = static_cast<int32_t>((value - least) / divisor + 0.5f);
    const auto most = static_cast<int32_t>(levels);
    return static_cast<uint32_t>(code < most ? code : most);
  }
};

template <class At>
__device__ Range range_of(int count, int bits, const At& at) {
  float least = at(0), most = least, poison = 0;
  for (int i = 0; i < count; ++i) {
    const float value = at(i);
    least = value < least ? value : least;
    most = most < value ? value : most;
    poison += value * 0.0f;  // NaN if one is not finite
  }
  Range range;
  range.zero = bf16_below(least);
  range.least = float_of_bf16(range.zero);
  range.levels = static_cast<float>((1 << bits) - 1);
  // In double, where it neither overflows nor rounds to less.
  const double step = (static_cast<double>(most) - range.least) / range.levels;
  auto above = static_cast<float>(step);
  if (above < step) above = nextafterf(above, INFINITY);
  range.scale = bf16_above(above);
  const float scale = float_of_bf16(range.scale);
  range.divisor = scale > 0 ? scale : 1.0f;
  range.spoilt = poison != 0 || !finite(most - range.least) || !finite(scale);
  if (range.spoilt) range.scale = range.zero = kNaN;
  return range;
}

// Elements of one head of an open page.
struct OpenHead {
  const char *keys, *values;
  int form, dim;

  __device__ float at(const char* data, int index) const {
    return form == kPageF32 ? reinterpret_cast<const float*>(data)[index]
                            : float_of_bf16(reinterpret_cast<const uint16_t*>(data)[index]);
  }
  __device__ float key(int t, int c) const {
    return at(keys, (t / kKeyBlock * dim + c) * kKeyBlock + t % kKeyBlock);
  }
  __device__ float value(int t, int c) const { return at(values, t * dim + c); }
};

// A thread takes channels c and c + 4, whose codes share bytes.
__device__ void seal_keys(uint8_t* page, const SealCall& call, const OpenHead& open, int head) {
  const SealedPages& to = call.sealed;
  const int padded = static_cast<int>(to.key_scale_bytes / 4);
  uint8_t* upper = page + head * to.plane_bytes;
  uint8_t* lower = page + to.lower + head * to.plane_bytes;
  auto* scales = reinterpret_cast<uint16_t*>(page + to.key_scales + head * to.key_scale_bytes);
  for (int pair = threadIdx.x; pair < padded / 2; pair += kThreads) {
    const int c[2] = {pair / 4 * 8 + pair % 4, pair / 4 * 8 + pair % 4 + 4};
    Range range[2];
    for (int i = 0; i < 2; ++i) {
      const bool there = c[i] < open.dim;
      if (there)
        range[i] = range_of(kPageTokens, to.bits, [&](int t) { return open.key(t, c[i]); });
      scales[c[i]] = there ? range[i].scale : 0;
      scales[padded + c[i]] = there ? range[i].zero : 0;
    }
    for (int t = 0; t < kPageTokens; ++t) {
      const int line = t / kLineRows * (padded / 8) + pair / 4;
      const int at = line * kSealedLine + t % kLineRows * 4 + pair % 4;
      uint32_t code[2];
      for (int i = 0; i < 2; ++i) code[i] = c[i] < open.dim ? range[i].code(open.key(t, c[i])) : 0;
      if (to.bits == 8) {
        upper[at] = static_cast<uint8_t>(code[0] >> 4 | (code[1] >> 4) << 4);
        lower[at] = static_cast<uint8_t>((code[0] & 15) | (code[1] & 15) << 4);
      } else {
        upper[at] = static_cast<uint8_t>(code[0] | code[1] << 4);
      }
    }
  }
}

// A thread takes a token, and of 4-bit codes also the token 4 further, whose codes share bytes.
__device__ void seal_values(uint8_t* page, const SealCall& call, const OpenHead& open, int head) {
  const SealedPages& to = call.sealed;
  const int padded = static_cast<int>(to.key_scale_bytes / 4);
  const int each = 8 / to.bits, line_tokens = 4 * each;
  uint8_t* codes = page + to.values + head * to.code_bytes;
  auto* scales = reinterpret_cast<uint16_t*>(page + to.value_scales + head * to.value_scale_bytes);
  for (int part = threadIdx.x; part < kPageTokens / each; part += kThreads) {
    const int first = part / 4 * line_tokens + part % 4;
    Range range[2];
    for (int i = 0; i < each; ++i) {
      const int t = first + 4 * i;
      range[i] = range_of(open.dim, to.bits, [&](int c) { return open.value(t, c); });
      scales[t] = range[i].scale;
      scales[kPageTokens + t] = range[i].zero;
    }
    for (int c = 0; c < padded; ++c) {
      const int line = c / kLineRows * (kPageTokens / line_tokens) + first / line_tokens;
      uint32_t byte = 0;
      for (int i = 0; c < open.dim && i < each; ++i)
        byte |= range[i].code(open.value(first + 4 * i, c)) << 4 * i;
      codes[line * kSealedLine + c % kLineRows * 4 + first % 4] = static_cast<uint8_t>(byte);
    }
  }
}

// A page's head; the last one also clears what fills the page's last block.
__global__ void __launch_bounds__(kThreads) seal_kernel(const SealCall call) {
  after_earlier_kernels();
  const SealedPage& at = call.pages[blockIdx.x];
  const int head = blockIdx.y;
  auto* page = static_cast<uint8_t*>(at.sealed);
  const char* keys = static_cast<const char*>(at.open) + head * call.open.head_bytes;
  const OpenHead open{keys, keys + call.open.part_bytes, call.open.form, call.heads.dim};
  seal_keys(page, call, open, head);
  seal_values(page, call, open, head);
  if (head + 1 < call.heads.key_value) return;
  const int64_t used =
      call.sealed.value_scales + call.heads.key_value * call.sealed.value_scale_bytes;
  for (int64_t i = used + threadIdx.x; i < call.sealed.page_bytes; i += kThreads) page[i] = 0;
}

}  // namespace

int launch_seal(const SealCall& call, Stream stream) {
  return launch(
      seal_kernel,
      dim3{static_cast<unsigned>(call.count), static_cast<unsigned>(call.heads.key_value), 1},
      kThreads, 0, stream, call);
}

}  // namespace puna::cuda
