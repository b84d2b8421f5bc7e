// Everything the kernels need beyond CUDA's own language, each with a body for the device and one
// for the emulator of the tests: all PTX is here, and kernels compile from the same source for
// both. The emulator's bodies say what an instruction does.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "emulator/cuda.h"
#endif

namespace puna::cuda {

using Stream = void*;  // cudaStream_t

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

// Blocks of the next kernel may come to a multiprocessor while blocks of this one still run: on
// devices whose code has after_earlier_kernels(). Set for the calling thread.
inline thread_local bool launches_overlap = false;

// Code for devices with products of warpgroups (below). Only the very architecture has them, not
// its successors, so there is code for it alone ("90a").
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PUNA_WARPGROUPS 1
#else
#define PUNA_WARPGROUPS 0
#endif
constexpr int kWarpgroup = 4 * kWarp;
// Whether the current device runs such code. Set for the calling thread.
inline thread_local bool has_warpgroups = false;

// Starts a kernel; returns the error of the launch, 0 for none. An empty grid is no launch.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
           Stream stream, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
#ifdef __CUDACC__
  constexpr size_t kUsualShared = 48 << 10;  // more must be asked for
  if (shared_bytes > kUsualShared) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return static_cast<int>(error);
    // As many blocks as there is memory for, at the cost of the first cache.
    cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                         cudaSharedmemCarveoutMaxShared);
  }
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3{static_cast<unsigned>(threads), 1, 1};
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &overlap;
  config.numAttrs = launches_overlap ? 1 : 0;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
#else
  (void)stream;
  emulator::Machine::instance().run(grid, {static_cast<unsigned>(threads)}, shared_bytes, [&] {
    kernel(arguments...);
    emulator::Machine::instance().check_waited_for_earlier_launches();
  });
  return 0;
#endif
}

// Of the current device.
inline int multiprocessors() {
#ifdef __CUDACC__
  int device = 0, count = 1;
  if (cudaGetDevice(&device) == cudaSuccess)
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
#else
  return 1;
#endif
}

// Every thread of every kernel calls this before it reads what earlier kernels wrote, or writes
// what they read. Weights, which no kernel writes, may be asked for before.
__device__ __forceinline__ void after_earlier_kernels() {
#ifndef __CUDACC__
  emulator::Machine::instance().wait_for_earlier_launches();
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");  // the next one may come, and waits here
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The block's shared memory, aligned to what repeats of a swizzled operand (below).
constexpr int kSharedAlignment = 1024;
__device__ __forceinline__ unsigned char* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(kSharedAlignment) unsigned char memory[];
  return memory;
#else
  return emulator::Machine::instance().shared();
#endif
}

// --- bit patterns --------------------------------------------------------------------------------
__device__ __forceinline__ float float_of_bf16(uint32_t low_half) {
  return __uint_as_float(low_half << 16);
}
// To nearest, ties to even; NaN stays a quiet NaN.
__device__ __forceinline__ uint32_t bf16_of_float(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bits >> 16 | 0x40u;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
  return bf16_of_float(low) | bf16_of_float(high) << 16;
}
// The same in one instruction, whose NaN is always the same.
__device__ __forceinline__ uint32_t rounded_bf16_pair(float low, float high) {
#ifdef __CUDACC__
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return bf16_pair(low, high);
#endif
}
// a * b + c of both halves, each rounded once.
__device__ __forceinline__ uint32_t fma_bf16_pair(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDACC__
  uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
#else
  const auto half = [&](int shift) {
    const auto of = [&](uint32_t x) { return double{float_of_bf16(x >> shift & 0xffffu)}; };
    return bf16_of_float(static_cast<float>(of(a) * of(b) + of(c)));
  };
  return half(0) | half(16) << 16;
#endif
}
// The same, and 0 where it is less than that.
__device__ __forceinline__ uint32_t fma_relu_bf16_pair(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDACC__
  uint32_t result;
  asm("fma.rn.relu.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
#else
  const uint32_t sums = fma_bf16_pair(a, b, c);
  return sums & ((sums >> 15 & 0x00010001u) * 0xffffu ^ 0xffffffffu);
#endif
}
__device__ __forceinline__ uint32_t masked_or(uint32_t word, uint32_t mask, uint32_t bits) {
#ifdef __CUDACC__
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
#else
  return (word & mask) | bits;
#endif
}
// The bits of `a` where the mask has ones, and else those of `b`.
__device__ __forceinline__ uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(result) : "r"(mask), "r"(a), "r"(b));
  return result;
#else
  return (mask & a) | (~mask & b);
#endif
}
__device__ __forceinline__ float float_of_f16(uint16_t value) {
#ifdef __CUDACC__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
  return result;
#else
  return puna::float_of_f16(value);
#endif
}

// 2 to the power of x, within 2^-22 of it; powers below 2^-126 are 0.
__device__ __forceinline__ float power_of_2(float x) {
#ifdef __CUDACC__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return x < -126 ? 0.0f : std::exp2(x);
#endif
}

// --- loads ---------------------------------------------------------------------------------------
// 16 bytes by an instruction: these differ only in what the caches make of them.
#ifdef __CUDACC__
#define PUNA_LOAD_WORDS(instruction, value, from)                           \
  asm volatile(instruction " {%0, %1, %2, %3}, [%4];"                       \
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) \
               : "l"(from))
#else
#define PUNA_LOAD_WORDS(instruction, value, from)                                     \
  emulator::Machine::instance().check_aligned(instruction, from, int{sizeof(value)}); \
  memcpy(&(value), from, sizeof(value))
#endif
// What no kernel writes and is read once: it goes past the first cache.
__device__ __forceinline__ uint4 load_streaming(const void* from) {
  uint4 value;
  PUNA_LOAD_WORDS("ld.global.nc.L1::no_allocate.v4.u32", value, from);
  return value;
}
// What no block of the same kernel writes; a kernel before it may, which has not ended when this
// one starts (so that it is not .nc: constant from then on).
__device__ __forceinline__ uint4 load_words(const void* from) {
  uint4 value;
  PUNA_LOAD_WORDS("ld.global.v4.u32", value, from);
  return value;
}
// 4 bytes likewise.
__device__ __forceinline__ uint32_t load_word(const void* from) {
  uint32_t value;
#ifdef __CUDACC__
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(value) : "l"(from));
#else
  emulator::Machine::instance().check_aligned("load_word", from, int{sizeof(value)});
  memcpy(&value, from, sizeof(value));
#endif
  return value;
}
// What other blocks of the same kernel may have written.
__device__ __forceinline__ uint4 load_shared_by_blocks(const void* from) {
  uint4 value;
  PUNA_LOAD_WORDS("ld.global.cg.v4.u32", value, from);
  return value;
}
#undef PUNA_LOAD_WORDS
// Brings the kCacheLine bytes there to the second cache, and waits for nothing.
constexpr int kCacheLine = 128;
__device__ __forceinline__ void fetch_to_cache(const void* from) {
#ifdef __CUDACC__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
#else
  static_cast<void>(*static_cast<const volatile char*>(from));
#endif
}
// A number of what other blocks of the same kernel may have written.
#ifdef __CUDACC__
#define PUNA_NUMBER_SHARED_BY_BLOCKS(T, type, letter)                                \
  __device__ __forceinline__ T load_number_shared_by_blocks(const T* from) {         \
    T value;                                                                         \
    asm volatile("ld.global.cg." type " %0, [%1];" : "=" letter(value) : "l"(from)); \
    return value;                                                                    \
  }
#else
#define PUNA_NUMBER_SHARED_BY_BLOCKS(T, type, letter) \
  inline T load_number_shared_by_blocks(const T* from) { return *from; }
#endif
PUNA_NUMBER_SHARED_BY_BLOCKS(float, "f32", "f")
PUNA_NUMBER_SHARED_BY_BLOCKS(double, "f64", "d")
PUNA_NUMBER_SHARED_BY_BLOCKS(uint64_t, "u64", "l")
#undef PUNA_NUMBER_SHARED_BY_BLOCKS

// Adds to a number that other threads add to, and gives it another value: both return what it was.
__device__ __forceinline__ int32_t add_to_shared(int32_t* number, int32_t more) {
#ifdef __CUDACC__
  return atomicAdd(number, more);
#else
  const int32_t before = *number;
  *number += more;
  return before;
#endif
}
__device__ __forceinline__ int32_t exchange_shared(int32_t* number, int32_t value) {
#ifdef __CUDACC__
  return atomicExch(number, value);
#else
  const int32_t before = *number;
  *number = value;
  return before;
#endif
}

// Adds 1; what this thread wrote, or knows to be written, is there for whoever sees the new count.
// (One instruction: __threadfence() on both sides takes sequential consistency, which is slower.)
__device__ __forceinline__ int32_t add_after_writes(int32_t* count) {
#ifdef __CUDACC__
  int32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(count)
               : "memory");
  return before;
#else
  return (*count)++;
#endif
}

// --- copies to shared memory ---------------------------------------------------------------------
// They land when they are waited for, by the thread that made them. 16 bytes; zeros unless `there`.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(there ? 16 : 0)
               : "memory");
#else
  emulator::Machine::instance().copy_async(to, there ? from : nullptr, 16);
#endif
}
// The same of 4, 8 or 16 bytes, aligned to as many.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
#ifdef __CUDACC__
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(from), "n"(kBytes)
                 : "memory");
#else
  emulator::Machine::instance().copy_async(to, from, kBytes);
#endif
}
__device__ __forceinline__ void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::Machine::instance().commit_copies();
#endif
}
// All but the last `kLeft` groups of copies have landed.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#else
  emulator::Machine::instance().wait_copies(kLeft);
#endif
}

// --- matrices of 8 x 8 in shared memory ----------------------------------------------------------
// Four matrices of 16-bit elements; lane 8 i + r says where row r of matrix i is, 16 bytes. With
// g = lane / 4 and t = lane % 4, a lane gets elements 2 t and 2 t + 1 of row g of each, or, of the
// transposed ones, of column g.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
#ifdef __CUDACC__
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
#else
  struct Result {
    uint32_t of[4];
  };
  emulator::Machine::instance().check_shared("load_matrices", row, 16);
  const Result result = emulator::Machine::instance().with_warp<const void*, Result>(
      "load_matrices", row, [](const auto& rows, auto& out) {
        for (int matrix = 0; matrix < 4; ++matrix) {
          uint16_t element[8][8];
          for (int r = 0; r < 8; ++r) memcpy(element[r], rows[8 * matrix + r], 16);
          for (int lane = 0; lane < kWarp; ++lane) {
            const int g = lane / 4, t = lane % 4;
            const auto at = [&](int i) {
              return uint32_t{kTransposed ? element[2 * t + i][g] : element[g][2 * t + i]};
            };
            out[lane].of[matrix] = at(0) | at(1) << 16;
          }
        }
      });
  for (int i = 0; i < 4; ++i) to[i] = result.of[i];
#endif
}

// --- products of warps ---------------------------------------------------------------------------
// c += A B for A 16 x K and B K x 8. With g = lane / 4 and t = lane % 4, a lane holds
//   a   rows g (a[0], a[2]) and g + 8 (a[1], a[3]); columns from (4 bytes) t on, a[2] and a[3] from
//       the second half of K on
//   b   column g; rows from (4 bytes) t on, b1 from the second half of K on
//   c   rows g (c[0], c[1]) and g + 8 (c[2], c[3]), columns 2 t and 2 t + 1
#ifndef __CUDACC__
template <int kDepth, class Accumulator, class Element>
void emulated_mma(const char* name, Accumulator (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                  uint32_t b1, Element element) {
  struct Operands {
    uint32_t a[4], b[2];
    Accumulator c[4];
  };
  struct Result {
    Accumulator c[4];
  };
  constexpr int kEach = kDepth / 8;  // elements of a register
  const Operands operands{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  const Result result = emulator::Machine::instance().with_warp<Operands, Result>(
      name, operands, [&](const auto& in, auto& out) {
        Accumulator left[16][kDepth], right[kDepth][8];
        for (int lane = 0; lane < kWarp; ++lane)
          for (int half = 0; half < 2; ++half)
            for (int i = 0; i < kEach; ++i) {
              const int k = half * kDepth / 2 + lane % 4 * kEach + i;
              left[lane / 4][k] = element(in[lane].a[2 * half], i, true);
              left[lane / 4 + 8][k] = element(in[lane].a[2 * half + 1], i, true);
              right[k][lane / 4] = element(in[lane].b[half], i, false);
            }
        for (int lane = 0; lane < kWarp; ++lane)
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            Accumulator sum = in[lane].c[i];
            for (int k = 0; k < kDepth; ++k) sum += left[row][k] * right[k][column];
            out[lane].c[i] = sum;
          }
      });
  for (int i = 0; i < 4; ++i) c[i] = result.c[i];
}
#endif

#ifndef __CUDACC__
constexpr auto bf16_operand = [](uint32_t word, int i, bool) {
  return float_of_bf16(word >> 16 * i & 0xffffu);
};
#endif

// K = 16 of bfloat16, sums in fp32.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  emulated_mma<16>("mma_bf16", c, a, b0, b1, bf16_operand);
#endif
}

#ifndef __CUDACC__
constexpr auto byte_operand = [](uint32_t word, int i, bool left) {
  const uint32_t byte = word >> 8 * i & 255u;
  return left ? static_cast<int32_t>(byte) : static_cast<int8_t>(byte);
};
#endif

// K = 32 of bytes, A without and B with sign; exact. sums = c + A B.
__device__ __forceinline__ void mma_u8s8(int32_t (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1, const int32_t (&c)[4]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};"
      : "=r"(sums[0]), "=r"(sums[1]), "=r"(sums[2]), "=r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]),
        "r"(c[2]), "r"(c[3]));
#else
  for (int i = 0; i < 4; ++i) sums[i] = c[i];
  emulated_mma<32>("mma_u8s8", sums, a, b0, b1, byte_operand);
#endif
}

// The same for K = 16: a0, a1 and b alone.
__device__ __forceinline__ void mma_u8s8_half(int32_t (&sums)[4], uint32_t a0, uint32_t a1,
                                              uint32_t b, const int32_t (&c)[4]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%7, %8, %9, %10};"
      : "=r"(sums[0]), "=r"(sums[1]), "=r"(sums[2]), "=r"(sums[3])
      : "r"(a0), "r"(a1), "r"(b), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#else
  for (int i = 0; i < 4; ++i) sums[i] = c[i];
  emulated_mma<32>("mma_u8s8_half", sums, {a0, a1, 0, 0}, b, 0, byte_operand);
#endif
}

// --- products of warpgroups ----------------------------------------------------------------------
// c += A B for A 64 x K from registers and B K x 64 from shared memory, by four warps, of which
// warp w has rows 16 w .. 16 w + 15. Registers are those of a warp's products: c[4 n ..] are
// columns 8 n .. 8 n + 7.
//
// They are carried out some time between the instruction and the wait for its group. Until then
// neither A nor c nor the shared memory may be touched. After registers have been written, there is
// to be a fence_products() before products use them.
constexpr int kWarpgroupColumns = 64, kWarpgroupSums = kWarpgroupColumns / 2;

// 32 bytes of kWarpgroupColumns rows of shared memory, 128 bytes apart, as B. Chunk c of 16 bytes
// of row r lies at c ^ r % 8, and row 0 at a multiple of kSharedAlignment.
struct SharedOperand {
  uint64_t descriptor;
  // The same rows from 32 times `count` bytes on.
  __device__ __forceinline__ SharedOperand after(int count) const {
    return {descriptor + static_cast<uint64_t>(2 * count)};  // in units of 16 bytes
  }
};
__device__ __forceinline__ SharedOperand shared_operand(const void* rows) {
#ifdef __CUDACC__
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(rows));
#else
  const auto at = static_cast<uint32_t>(static_cast<const unsigned char*>(rows) - shared_memory());
#endif
  constexpr uint64_t kSwizzle128 = 1, kEightRows = 8 * 128;
  // The second field is not used where rows are as long as what is swizzled.
  return {(at & 0x3ffffu) >> 4 | uint64_t{1} << 16 | kEightRows >> 4 << 32 | kSwizzle128 << 62};
}

#if PUNA_WARPGROUPS
// What this thread has written to shared memory, by copies that have landed too, is there for
// products of warpgroups after the next barrier.
__device__ __forceinline__ void fence_shared_operands() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  emulator::Machine::instance().fence_shared_operands();
#endif
}
__device__ __forceinline__ void fence_products() {
#ifdef __CUDACC__
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  emulator::Machine::instance().fence_products();
#endif
}
__device__ __forceinline__ void commit_products() {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  emulator::Machine::instance().commit_products();
#endif
}
// All but the last kLeft groups have been carried out, `c` among them: what is read of it
// afterwards the compiler must not read before.
template <int kLeft, class Accumulator>
__device__ __forceinline__ void wait_for_products(Accumulator (&c)[kWarpgroupSums]) {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
#pragma unroll
  for (Accumulator& sum : c)
    if constexpr (Accumulator(0.5f) == 0)  // a whole number
      asm volatile("" : "+r"(sum)::"memory");
    else
      asm volatile("" : "+f"(sum)::"memory");
#else
  emulator::Machine::instance().wait_products(kLeft);
  (void)c;
#endif
}

#ifndef __CUDACC__
// Element (n, k) of B, of kBytes; as the hardware finds it: the bits of the address that tell the
// row are added to those of the chunk.
inline const unsigned char* element_of(uint64_t descriptor, int n, int byte) {
  const auto start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const auto eight_rows = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1 || (start & 0x380) != 0)
    throw emulator::Fault("an operand in shared memory that is not swizzled from its first row on");
  uint32_t at =
      start + static_cast<uint32_t>(n / 8) * eight_rows + static_cast<uint32_t>(n % 8 * 128 + byte);
  at ^= at >> 3 & 0x70;
  return emulator::Machine::instance().shared() + at;
}
template <int kDepth, class Accumulator, bool kAdds = true, class Element>
void emulated_warpgroup_mma(const emulator::WarpgroupOperands& operands, Element element) {
  constexpr int kEach = kDepth / 8, kBytes = 32 / kDepth;  // elements of a register; their size
  static Accumulator left[64][kDepth], right[kDepth][kWarpgroupColumns];
  for (int thread = 0; thread < kWarpgroup; ++thread)
    for (int i = 0; i < 4; ++i)
      for (int e = 0; e < kEach; ++e)
        left[thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8]
            [i / 2 * kDepth / 2 + thread % 4 * kEach + e] = element(operands.a[thread][i], e, true);
  for (int n = 0; n < kWarpgroupColumns; ++n)
    for (int k = 0; k < kDepth; ++k) {
      uint32_t word = 0;
      memcpy(&word, element_of(operands.b, n, k * kBytes), kBytes);
      right[k][n] = element(word, 0, false);
    }
  for (int thread = 0; thread < kWarpgroup; ++thread)
    for (int i = 0; i < kWarpgroupSums; ++i) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8;
      const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      auto* const c = static_cast<Accumulator*>(operands.c[thread]) + i;
      Accumulator sum = kAdds ? *c : 0;
      for (int k = 0; k < kDepth; ++k) sum += left[row][k] * right[k][column];
      *c = sum;
    }
}
#endif

#define PUNA_EIGHT(kind, c, i)                                                                    \
  "+" kind(c[i]), "+" kind(c[i + 1]), "+" kind(c[i + 2]), "+" kind(c[i + 3]), "+" kind(c[i + 4]), \
      "+" kind(c[i + 5]), "+" kind(c[i + 6]), "+" kind(c[i + 7])
#define PUNA_WARPGROUP_MMA(instruction, kind, modifiers, c, a, b)                            \
  asm volatile(instruction                                                                   \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "    \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, " \
               "%31}, {%32, %33, %34, %35}, %36, " modifiers ";"                             \
               : PUNA_EIGHT(kind, c, 0), PUNA_EIGHT(kind, c, 8), PUNA_EIGHT(kind, c, 16),    \
                 PUNA_EIGHT(kind, c, 24)                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor))

// K = 16 of bfloat16, sums in fp32. kAdds = false: c = A B.
template <bool kAdds>
__device__ __forceinline__ void warpgroup_mma_bf16(float (&c)[kWarpgroupSums],
                                                   const uint32_t (&a)[4], SharedOperand b) {
#ifdef __CUDACC__
  // What follows whether to add: neither operand is negated, and B is not transposed.
  if constexpr (kAdds)
    PUNA_WARPGROUP_MMA("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", "f", "1, 1, 1, 0", c,
                       a, b);
  else
    PUNA_WARPGROUP_MMA("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", "f", "0, 1, 1, 0", c,
                       a, b);
#else
  emulator::Machine::instance().multiply(
      "warpgroup_mma_bf16", c, a, b.descriptor, [](const emulator::WarpgroupOperands& operands) {
        emulated_warpgroup_mma<16, float, kAdds>(operands, bf16_operand);
      });
#endif
}

// K = 32 of bytes, A without and B with sign; exact. kAdds = false: c = A B.
template <bool kAdds>
__device__ __forceinline__ void warpgroup_mma_u8s8(int32_t (&c)[kWarpgroupSums],
                                                   const uint32_t (&a)[4], SharedOperand b) {
#ifdef __CUDACC__
  if constexpr (kAdds)
    PUNA_WARPGROUP_MMA("wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8", "r", "1", c, a, b);
  else
    PUNA_WARPGROUP_MMA("wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8", "r", "0", c, a, b);
#else
  emulator::Machine::instance().multiply(
      "warpgroup_mma_u8s8", c, a, b.descriptor, [](const emulator::WarpgroupOperands& operands) {
        emulated_warpgroup_mma<32, int32_t, kAdds>(operands, byte_operand);
      });
#endif
}
#undef PUNA_WARPGROUP_MMA
#undef PUNA_EIGHT
#endif  // PUNA_WARPGROUPS

}  // namespace puna::cuda
