// The whole contract between the engine and an instruction set: one struct of function pointers.
//
// An instruction set is one file, kernels/cpu/isa/<name>.cpp, that exports one KernelTable. A slot
// it leaves null is filled by resolve() from the next lower instruction set; scalar fills every
// slot. Kernels take raw pointers, allocate nothing, know no threads, and use no STL.
//
// Determinism. Every result element is computed by the same sequence of operations whatever the
// other elements of the call are: row m of a product does not depend on `rows` or on the block of
// columns it is computed in, and a query does not depend on the queries beside it. So prefill,
// decode and any cut of a prompt agree bit for bit. (Instruction sets may differ from each other in
// rounding.)
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "quant/traits.h"

namespace puna {

// Weights are packed once, at load, into panels of kPanelRows output rows (quant/panel.h):
//   float32   panel[cols][kPanelRows]                 float
//   bfloat16  panel[ceil(cols / 2)][kPanelRows][2]    uint16_t, pairs (k, k + 1) of one row; an odd
//                                                     last column is paired with zero
//   the quantised formats of quant/formats.inc

// Keys of one attention page and head are stored in blocks of kKeyBlock tokens,
// [head_dim][kKeyBlock], values as [token][head_dim]; see backend/kv_layout.h.
constexpr int64_t kKeyBlock = 16;

// Panels that share one copy of the activations in a product with many rows.
constexpr int64_t kStripPanels = 4;

// Online-softmax attention of `rows` queries over one page of keys and values of one head.
// Row r sees the first visible[r] tokens of the page (0 = none: its state is left as it is).
// For each row, with s_t = q . k_t over the seen tokens:
//   m' = max(m, max_t s_t); l' = l * exp(m - m') + sum_t exp(s_t - m');
//   o' = o * exp(m - m') + sum_t exp(s_t - m') * v_t
// A state starts as m = -infinity, l = 0, o = 0. Memory of the page beyond the seen tokens is
// readable and finite; it contributes exactly nothing.
struct AttendPage {
  const float* q;  // [rows][q_stride], the first head_dim of each; already scaled
  int64_t q_stride;
  const int32_t* visible;  // [rows]
  const void* k;           // [ceil(tokens / kKeyBlock)][head_dim][kKeyBlock]
  const void* v;           // [tokens][head_dim]
  const void* next;        // keys that will be read after this page, or null
  int32_t rows, head_dim, tokens;
  float* m;       // [rows]
  float* l;       // [rows]
  float* o;       // [rows][head_dim], contiguous
  float* scores;  // scratch, [rows][round_up(tokens, kKeyBlock)]
};

// Attention over one head of a sealed page, all of whose kSealedTokens tokens every row sees; the
// layout is KvSealedLayout of backend/kv_layout.h. The rest is as in AttendPage, with these
// products:
//   scores  q * key scale, as whole numbers of at most 16 bits of one step per row and page, times
//           (code - half of the codes' range), summed exactly in int32; then one fp32 multiply-add
//           with the step and the part of the zero points, which is summed in fp32
//   values  the same with (weight of the token) * value scale
// The sums of whole numbers are the same on every instruction set.
struct AttendSealed {
  const float* q;  // [rows][q_stride], the first head_dim of each; already scaled
  int64_t q_stride;
  const uint8_t* upper;          // upper bits of the keys' codes
  const uint8_t* lower;          // lower bits; 8-bit codes only
  const uint8_t* values;         // codes
  const uint16_t* key_scales;    // bfloat16: scales, then zero points, of channels
  const uint16_t* value_scales;  // of tokens
  const uint8_t* next_upper;     // keys that will be read after this page, or null
  const uint8_t* next_lower;
  const uint16_t* next_key_scales;
  int32_t rows, head_dim;  // head_dim <= kSealedDim
  float* m;                // [rows]
  float* l;                // [rows]
  float* o;                // [rows][head_dim], contiguous
  void* scratch;           // rows * kSealedScratch bytes, aligned to 64
};
constexpr int64_t kSealedTokens = 256;
// More channels could overflow int32.
constexpr int64_t kSealedDim = 256;
// A row's scores, the whole numbers it is multiplied with, and some numbers more.
constexpr int64_t kSealedScratch = kSealedTokens * 6 + 64;

// What the keys of one sealed page may weigh for some rows, from the upper four bits of their codes
// alone. Of 8-bit codes the lower bits count as 7.5, their middle: a score is off by the sum over
// the channels of q * scale * (bits - 7.5), and by the rounding of queries to words. 4-bit codes
// have no lower bits.
struct ScreenedRow {
  float top;       // the largest score, as the upper bits tell it
  float mass;      // sum over the tokens of exp(score - top)
  float dropped;   // the most that the lower bits can change a score by, 7.5 sum |q * scale|
  float squares;   // 7.5^2 sum (q * scale)^2
  float rounding;  // the most that the words can
};
struct ScreenSealed {
  const float* q;  // [rows][q_stride], as for AttendSealed
  int64_t q_stride;
  const uint8_t* upper;
  const uint16_t* key_scales;
  const uint8_t* next_upper;  // of the page that will be screened next, or null
  int32_t rows, head_dim;
  ScreenedRow* screened;  // [rows]
  void* scratch;          // rows * kSealedScratch bytes, aligned to 64
};
// Ranks of a sealed page from the ranges of its channels alone: the score of a key that had the
// best end of every range for the row, and of one in the middle of all.
struct RankSealed {
  const float* q;  // [rows][q_stride]
  int64_t q_stride;
  const uint16_t* key_scales;
  float levels;  // the largest code
  int32_t rows, head_dim;
  float *most, *middle;  // [rows]
};

// Columns of a row of quantised activations that share a scale (the last ones of a row may be
// fewer). A multiple of every format's group, whose sums are added up before they are scaled. A
// scale for each group of 32 would be one more multiplication for every 8 dot products of four.
constexpr int64_t kActivationGroup = 128;

// Activations for a product with quantised weights: codes -127 .. 127.
struct QuantizedRows {
  const int8_t* codes;  // [rows][cols], cols rounded up to whole blocks of the weights' format
  const float* scales;  // [rows][spans], one for kActivationGroup columns
  const int32_t* sums;  // [rows][groups]: of the codes of one group of the weights' format
  int64_t cols, spans, groups;  // strides of the above
};

constexpr int kQuantizedKernels = 0
#define PUNA_FORMAT(Traits, name) +1
#include "quant/formats.inc"
#undef PUNA_FORMAT
    ;

struct KernelTable {
  const char* isa;      // "scalar", "avx2", ...
  bool (*supported)();  // may run here and now: the processor has it and the system saves its state

  // What gemm_f32 computes, for one panel (width <= kPanelRows) of quantised weights, by place in
  // quant/formats.inc. For each kActivationGroup columns, in order, with their groups in order and
  // all rounding as in fp32:
  //   part = 0, and for each group
  //     dot  = sum over the group of code_x * (value(code_w) - kZero)        exact, in int32
  //     part = fma(dot, scale_w, part)
  //     part = fma(offset_w, sum_x, part)                                    if kOffset
  //   acc  = fma(part, scale_x, acc)
  // so that every instruction set gives the same bits.
  using GemmQuantized = void (*)(float* out, int64_t out_stride, const QuantizedRows& x,
                                 const void* panel, const float* bias, int64_t rows, int64_t width);
  GemmQuantized gemm_quantized[kQuantizedKernels] = {};

  // out[rows][out_stride] = x[rows][x_stride] * weights^T for as many consecutive panels as hold
  // `width` output columns; only those are written. fp32 accumulation, sequential in k; `bias`
  // ([width], or null) is added once, after the sum. With many rows a call is fastest at
  // kStripPanels panels.
  void (*gemm_f32)(float* out, int64_t out_stride, const float* x, int64_t x_stride,
                   const float* weights, const float* bias, int64_t rows, int64_t cols,
                   int64_t width) = nullptr;
  // The same for bfloat16 weights and activations. x is padded with zero to an even number of
  // columns.
  void (*gemm_bf16)(float* out, int64_t out_stride, const uint16_t* x, int64_t x_stride,
                    const uint16_t* weights, const float* bias, int64_t rows, int64_t cols,
                    int64_t width) = nullptr;

  // The same for fp32 activations and one panel (width <= kPanelRows) of fp8 weights (quant/fp8.h):
  // the sum over k, in order, of fma(x, value(code) * 2^-8, sum), then sum * (scale * 2^8), then
  // the bias. Every instruction set gives the same bits.
  void (*gemm_fp8)(float* out, int64_t out_stride, const float* x, int64_t x_stride,
                   const void* panel, const float* bias, int64_t rows, int64_t cols,
                   int64_t width) = nullptr;

  // Quantises one row: the scale of kActivationGroup columns is their largest magnitude / 127,
  // codes are rounded to nearest, ties to even. Where the largest magnitude is below 2^-100 all
  // count as zeros: scale and codes 0. With a value that is not finite the scale is NaN and the
  // codes are any. Sums are of `group` codes. `padded` is `cols` rounded up to whole blocks; codes
  // past `cols` are 0.
  void (*quantize_row)(int8_t* codes, float* scales, int32_t* sums, const float* x, int64_t cols,
                       int64_t padded, int64_t group) = nullptr;

  void (*attend_page_f32)(const AttendPage&) = nullptr;
  void (*attend_page_bf16)(const AttendPage&) = nullptr;
  void (*attend_sealed_int8)(const AttendSealed&) = nullptr;
  void (*attend_sealed_int4)(const AttendSealed&) = nullptr;
  void (*screen_sealed_int8)(const ScreenSealed&) = nullptr;
  void (*screen_sealed_int4)(const ScreenSealed&) = nullptr;
  void (*rank_sealed)(const RankSealed&) = nullptr;

  // y = x * w / sqrt(mean(x^2) + eps); w may be null (then 1).
  void (*rms_norm)(float* y, const float* x, const float* w, int64_t n, float eps) = nullptr;
  // y = (x - mean) / sqrt(var + eps) * w + b
  void (*layer_norm)(float* y, const float* x, const float* w, const float* b, int64_t n,
                     float eps) = nullptr;
  // y = silu(gate) * up. With fused multiply-adds every instruction set gives the same bits, and so
  // do the kernels of CUDA.
  void (*silu_mul)(float* y, const float* gate, const float* up, int64_t n) = nullptr;
  // y = 0.5 x (1 + erf(x / sqrt 2)): the exact form, not the tanh one
  void (*gelu)(float* y, const float* x, int64_t n) = nullptr;
  // x = exp(x - max x), whose sum is returned: the softmax of a row before it is divided. n > 0.
  float (*exp_row)(float* x, int64_t n) = nullptr;
  // y += x
  void (*add)(float* y, const float* x, int64_t n) = nullptr;
  // y = a * x
  void (*scale)(float* y, const float* x, float a, int64_t n) = nullptr;
  // Interleaved pairs (2i, 2i+1) of x[n] turned by the angle whose cos and sin are given, [n / 2].
  void (*rope)(float* x, const float* cos, const float* sin, int64_t n) = nullptr;
  void (*bf16_from_f32)(uint16_t* y, const float* x,
                        int64_t n) = nullptr;  // to nearest, ties to even
  void (*f32_from_bf16)(float* y, const uint16_t* x, int64_t n) = nullptr;

  // For measuring the ceilings of the machine: both return a value that depends on all the work.
  // Reads `bytes` (a multiple of 256) once, in order.
  uint64_t (*read_bytes)(const void* data, int64_t bytes) = nullptr;
  // Runs `iterations` rounds of independent register-only multiply-accumulates in the form that
  // gemm_bf16 / gemm_f32 / gemm_quantized of 4-bit codes use; *operations receives the multiplies
  // and adds done.
  float (*peak_bf16)(int64_t iterations, int64_t* operations) = nullptr;
  float (*peak_f32)(int64_t iterations, int64_t* operations) = nullptr;
  float (*peak_int8)(int64_t iterations, int64_t* operations) = nullptr;
};

}  // namespace puna
