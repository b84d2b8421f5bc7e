// The emulator itself: instructions do what the manual says, and wrong programs are found out.
#include <cmath>
#include <random>

#include "check.h"
#include "emulator/machine.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/reduce.cuh"

using namespace puna::cuda;
using emulator::Fault;
using emulator::Machine;

namespace {

// Runs `body` for a block of so many threads, under a schedule. Returns what went wrong.
template <class Body>
std::string run(int threads, size_t shared_bytes, const emulator::Schedule& schedule,
                const Body& body) {
  Machine::instance().set_schedule(schedule);
  try {
    Machine::instance().run({}, {static_cast<unsigned>(threads)}, shared_bytes, body);
    return "";
  } catch (const Fault& fault) {
    return fault.what();
  }
}

void check_told(const std::string& told, const char* expected) {
  CHECK(told.find(expected) != std::string::npos);
  if (told.find(expected) == std::string::npos) std::fprintf(stderr, "told: %s\n", told.c_str());
}

int thread() { return static_cast<int>(threadIdx.x); }

}  // namespace

TEST(mma_multiplies_matrices) {
  std::mt19937 random(1);
  // Whole numbers, so that every sum is exact.
  int32_t a[16][32], b[32][8];
  for (auto& row : a)
    for (int32_t& value : row) value = static_cast<int32_t>(random() % 200);
  for (auto& row : b)
    for (int32_t& value : row) value = static_cast<int32_t>(random() % 200) - 100;
  const auto product = [&](int row, int column, int depth) {
    int32_t sum = 7;
    for (int k = 0; k < depth; ++k) sum += a[row][k] * b[k][column];
    return sum;
  };
  int wrong = 0;
  const std::string told = run(32, 0, {}, [&] {
    const int g = thread() / 4, t = thread() % 4;
    const auto bytes = [](const auto& at) {
      return static_cast<uint32_t>(at(0) & 255) | static_cast<uint32_t>(at(1) & 255) << 8 |
             static_cast<uint32_t>(at(2) & 255) << 16 | static_cast<uint32_t>(at(3) & 255) << 24;
    };
    uint32_t left[4], right[2];
    for (int i = 0; i < 4; ++i)
      left[i] = bytes([&](int j) { return a[g + i % 2 * 8][i / 2 * 16 + 4 * t + j]; });
    for (int i = 0; i < 2; ++i) right[i] = bytes([&](int j) { return b[i * 16 + 4 * t + j][g]; });
    int32_t whole[4] = {7, 7, 7, 7}, half[4] = {7, 7, 7, 7};
    mma_u8s8(whole, left, right[0], right[1], whole);
    mma_u8s8_half(half, left[0], left[1], right[0], half);
    float floats[4] = {7, 7, 7, 7};
    const auto pair = [](int32_t low, int32_t high) {
      return bf16_pair(static_cast<float>(low), static_cast<float>(high));
    };
    for (int i = 0; i < 4; ++i) {
      const int32_t* from = &a[g + i % 2 * 8][i / 2 * 8 + 2 * t];
      left[i] = pair(from[0], from[1]);
    }
    for (int i = 0; i < 2; ++i) right[i] = pair(b[i * 8 + 2 * t][g], b[i * 8 + 2 * t + 1][g]);
    mma_bf16(floats, left, right[0], right[1]);
    for (int i = 0; i < 4; ++i) {
      const int row = g + i / 2 * 8, column = 2 * t + i % 2;
      wrong += whole[i] != product(row, column, 32);
      wrong += half[i] != product(row, column, 16);
      wrong += floats[i] != static_cast<float>(product(row, column, 16));
    }
  });
  CHECK_EQ(told, "");
  CHECK_EQ(wrong, 0);
}

TEST(matrices_are_loaded_by_rows) {
  int wrong = 0;
  CHECK_EQ(run(32, 32 * 16, {},
               [&] {
                 auto* words = reinterpret_cast<uint32_t*>(shared_memory());
                 for (int i = 0; i < 4; ++i) words[4 * thread() + i] = 4 * thread() + i;
                 __syncwarp();
                 // The rows of each matrix from the last one on.
                 uint32_t got[4];
                 load_matrices<false>(got, words + 4 * (thread() ^ 7));
                 for (int i = 0; i < 4; ++i) {
                   const int row = 8 * i + (thread() / 4 ^ 7);
                   wrong += got[i] != static_cast<uint32_t>(4 * row + thread() % 4);
                 }
               }),
           "");
  CHECK_EQ(wrong, 0);
}

TEST(reductions_reach_every_thread) {
  int wrong = 0;
  for (const int starved : {-1, 0, 3}) {
    const std::string told = run(128, 4 * sizeof(float), {false, starved}, [&] {
      auto* scratch = reinterpret_cast<float*>(shared_memory());
      const auto value = static_cast<float>(thread());
      wrong += sum_lanes(thread()) != thread() / 32 * 32 * 32 + 496;
      wrong += sum_lanes<4>(1) != 4;
      wrong += max_lanes(value) != static_cast<float>(thread() | 31);
      wrong += combine_block<Sum, 128>(value, scratch) != 8128;
      __syncthreads();
      wrong += combine_block<Largest, 128>(value, scratch) != 127;
    });
    CHECK_EQ(told, "");
  }
  CHECK_EQ(wrong, 0);
}

TEST(shared_memory_starts_as_nan) {
  int numbers = 0;
  CHECK_EQ(
      run(32, 128, {},
          [&] { numbers += !std::isnan(reinterpret_cast<float*>(shared_memory())[thread()]); }),
      "");
  CHECK_EQ(numbers, 0);
}

TEST(a_missing_barrier_is_seen_by_a_starved_warp) {
  for (const bool barrier : {false, true}) {
    int wrong = 0;
    for (const int starved : {0, 1})
      CHECK_EQ(run(64, 64 * sizeof(int), {false, starved},
                   [&] {
                     int* values = reinterpret_cast<int*>(shared_memory());
                     values[thread()] = thread();
                     if (barrier) __syncthreads();
                     wrong += values[63 - thread()] != 63 - thread();
                   }),
               "");
    CHECK_EQ(wrong == 0, barrier);
  }
}

// What blocks, and lanes of a warp, read of one another without waiting.
TEST(a_missing_order_is_seen_when_it_is_reversed) {
  for (const bool reversed : {false, true}) {
    int blocks = 0, wrong = 0;
    Machine::instance().set_schedule({.reversed = reversed});
    Machine::instance().run({3, 2, 1}, {64}, 64 * sizeof(int), [&] {
      int* const values = reinterpret_cast<int*>(shared_memory());
      const int block = static_cast<int>(blockIdx.y * 3 + blockIdx.x);
      if (thread() == 0) wrong += block != (reversed ? 5 - blocks : blocks);
      if (thread() == 0) ++blocks;
      values[thread()] = thread();
      if (thread() % 32 == 7) wrong += values[thread() - 1] != thread() - 1;
    });
    CHECK_EQ(blocks, 6);
    CHECK_EQ(wrong, reversed ? 12 : 0);
  }
}

TEST(lanes_apart_and_threads_that_wait_for_ever_are_reported) {
  check_told(run(32, 0, {},
                 [] {
                   if (thread() < 16)
                     __syncwarp();
                   else
                     __shfl_xor_sync(kAllLanes, 1, 1);
                 }),
             "are at __syncwarp and at __shfl_xor_sync");
  check_told(run(64, 0, {},
                 [] {
                   if (thread() != 5) __syncthreads();
                   __syncwarp();
                 }),
             "deadlock in block 0, 0, 0: ");
  check_told(run(64, 0, {},
                 [] {
                   if (thread() < 40) __syncwarp();
                 }),
             "8 threads wait at __syncwarp");
  check_told(run(33, 0, {}, [] {}), "a block of 33 threads");
  check_told(run(32, (99 << 10) + 1, {}, [] {}), "101377 bytes of shared memory");
  try {
    Machine::instance().run({1, 65536, 1}, {32}, 0, [] {});
    CHECK(false);
  } catch (const Fault& fault) {
    check_told(fault.what(), "a grid of 1 x 65536 x 1 blocks");
  }
}

TEST(late_copies_land_when_they_are_waited_for) {
  const int source[2] = {1, 2};
  for (const bool late : {false, true}) {
    int before = 0, after = 0;
    CHECK_EQ(run(32, 8, {late},
                 [&] {
                   if (thread() > 0) return;
                   int* values = reinterpret_cast<int*>(shared_memory());
                   copy_async<4>(values, source);
                   commit_copies();
                   copy_async<4>(values + 1, source + 1);
                   commit_copies();
                   wait_for_copies<1>();
                   before = values[1];
                   after = values[0];
                   wait_for_copies<0>();
                   after += values[1];
                 }),
             "");
    CHECK_EQ(after, 3);
    CHECK_EQ(before == 2, !late);
  }
  check_told(run(32, 8, {true}, [&] { copy_async<4>(shared_memory(), source); }),
             "ended with asynchronous copies on their way");
}

TEST(addresses_are_aligned_and_in_shared_memory) {
  alignas(16) static const unsigned char source[64] = {};
  const auto copied = [](int to, int from) {
    return run(32, 64, {}, [=] {
      copy_async<16>(shared_memory() + to, source + from);
      commit_copies();
      wait_for_copies<0>();
    });
  };
  CHECK_EQ(copied(48, 16), "");
  check_told(copied(8, 0), "copy_async of 16 bytes at an address");
  check_told(copied(0, 8), "copy_async of 16 bytes at an address");
  check_told(copied(64, 0), "copy_async beyond the block's shared memory");
  check_told(run(32, 64, {}, [] { load_words(source + 8); }), "of 16 bytes at an address");
  check_told(run(32, 64, {}, [] { load_word(source + 2); }), "of 4 bytes at an address");
  const auto loaded = [](int from) {
    return run(32, 64, {}, [=] {
      uint32_t to[4];
      load_matrices<false>(to, shared_memory() + from);
    });
  };
  CHECK_EQ(loaded(48), "");
  check_told(loaded(8), "load_matrices of 16 bytes at an address");
  check_told(loaded(64), "load_matrices beyond the block's shared memory");
}

TEST(copies_wait_for_earlier_kernels_but_of_what_these_do_not_write) {
  alignas(16) static const unsigned char weights[16] = {}, rows[16] = {};
  Machine::instance().set_is_constant([](const void* at) { return at == weights; });
  const auto copied = [](const void* from, bool waits) {
    return run(32, 16, {}, [=] {
      if (waits) after_earlier_kernels();
      copy_async<16>(shared_memory(), from);
      commit_copies();
      wait_for_copies<0>();
    });
  };
  CHECK_EQ(copied(weights, false), "");
  CHECK_EQ(copied(rows, true), "");
  check_told(copied(rows, false), "does not wait for them");
  Machine::instance().set_is_constant(nullptr);
  CHECK_EQ(copied(rows, false), "");
}

// 64 x 16 x 64 of bfloat16, added to what is there or not.
TEST(warpgroups_multiply_bfloat16) {
  const auto a = [](int row, int k) { return (row * 5 + k * 3) % 50 - 20; };
  const auto b = [](int n, int k) { return (n * 7 + k) % 90 - 45; };
  const auto pair = [](int low, int high) {
    return bf16_pair(static_cast<float>(low), static_cast<float>(high));
  };
  int wrong = 0;
  for (const bool late : {false, true})
    CHECK_EQ(run(kWarpgroup, kWarpgroupColumns * 128, {late, -1, late},
                 [&] {
                   constexpr int kStep = 3;  // of 16 columns
                   auto* const rows = reinterpret_cast<uint32_t*>(shared_memory());
                   for (int i = thread(); i < kWarpgroupColumns * 32; i += kWarpgroup) {
                     const int n = i / 32, word = i % 32, chunk = (word / 4) ^ (n % 8);
                     rows[n * 32 + chunk * 4 + word % 4] = pair(b(n, 2 * word), b(n, 2 * word + 1));
                   }
                   fence_shared_operands();
                   __syncthreads();
                   const int row = thread() / 32 * 16 + thread() % 32 / 4, t = thread() % 4;
                   uint32_t left[4];
                   for (int i = 0; i < 4; ++i) {
                     const int k = i / 2 * 8 + 2 * t;
                     left[i] = pair(a(row + i % 2 * 8, k), a(row + i % 2 * 8, k + 1));
                   }
                   float added[kWarpgroupSums], set[kWarpgroupSums];
                   for (int i = 0; i < kWarpgroupSums; ++i) added[i] = set[i] = 9;
                   fence_products();
                   const SharedOperand operand = shared_operand(rows).after(kStep);
                   warpgroup_mma_bf16<true>(added, left, operand);
                   warpgroup_mma_bf16<false>(set, left, operand);
                   commit_products();
                   wait_for_products<0>(added);
                   for (int i = 0; i < kWarpgroupSums; ++i) {
                     int sum = 0;
                     for (int k = 0; k < 16; ++k)
                       sum +=
                           a(row + i % 4 / 2 * 8, k) * b(i / 4 * 8 + 2 * t + i % 2, kStep * 16 + k);
                     wrong += added[i] != static_cast<float>(9 + sum);
                     wrong += set[i] != static_cast<float>(sum);
                   }
                 }),
             "");
  CHECK_EQ(wrong, 0);
}

namespace {

// What one product of a warpgroup does wrong, and what it says: 64 x 32 x 64 of whole numbers.
struct WarpgroupProduct {
  bool fenced_copies = true, fenced = true, waited = true;
  int swizzle = 7, first_byte = 0;
  int wrong = 0;

  static int a(int row, int k) { return (row * 5 + k * 3) % 200; }
  static int b(int n, int k) { return (n * 7 + k) % 100 - 50; }

  std::string run_on(bool late) {
    std::vector<int8_t> source(kWarpgroupColumns * 128);
    for (int n = 0; n < kWarpgroupColumns; ++n)
      for (int k = 0; k < 128; ++k) source[n * 128 + k] = static_cast<int8_t>(b(n, k));
    return run(kWarpgroup, source.size() + 1024, {late, -1, late}, [&] {
      unsigned char* const rows = shared_memory() + first_byte;
      for (int i = thread(); i < kWarpgroupColumns * 8; i += kWarpgroup) {
        const int n = i / 8, chunk = i % 8;
        copy_async<16>(rows + n * 128 + (chunk ^ (n & swizzle)) * 16, &source[i * 16]);
      }
      commit_copies();
      wait_for_copies<0>();
      if (fenced_copies) fence_shared_operands();
      __syncthreads();
      constexpr int kStep = 2;  // of 32 columns
      const int row = thread() / 32 * 16 + thread() % 32 / 4, t = thread() % 4;
      uint32_t left[4] = {};
      for (int i = 0; i < 4; ++i)
        for (int byte = 0; byte < 4; ++byte)
          left[i] |= static_cast<uint32_t>(a(row + i % 2 * 8, i / 2 * 16 + 4 * t + byte))
                     << 8 * byte;
      int32_t c[kWarpgroupSums];
      for (int32_t& sum : c) sum = 9;
      if (fenced) fence_products();
      warpgroup_mma_u8s8<true>(c, left, shared_operand(rows).after(kStep));
      commit_products();
      if (waited) wait_for_products<0>(c);
      for (int i = 0; i < kWarpgroupSums; ++i) {
        int sum = 9;
        for (int k = 0; k < 32; ++k)
          sum += a(row + i % 4 / 2 * 8, k) * b(i / 4 * 8 + 2 * t + i % 2, kStep * 32 + k);
        wrong += c[i] != sum;
      }
    });
  }
};

}  // namespace

TEST(warpgroups_multiply_matrices_when_they_are_waited_for) {
  for (const bool late : {false, true}) {
    WarpgroupProduct right;
    CHECK_EQ(right.run_on(late), "");
    CHECK_EQ(right.wrong, 0);
    WarpgroupProduct not_swizzled{.swizzle = 0};
    CHECK_EQ(not_swizzled.run_on(late), "");
    CHECK(not_swizzled.wrong > 0);
    WarpgroupProduct without_fence{.fenced = false};
    check_told(without_fence.run_on(late), "without fence_products");
    WarpgroupProduct unfenced{.fenced_copies = false};
    check_told(unfenced.run_on(late), "was copied without a fence");
    WarpgroupProduct shifted{.first_byte = 128};
    check_told(shifted.run_on(late), "not swizzled from its first row on");
    WarpgroupProduct not_waited{.waited = false};
    check_told(not_waited.run_on(late), late ? "products on their way" : "");
  }
}
