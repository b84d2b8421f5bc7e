// Runs CUDA kernels on the CPU, one block at a time: every thread of the block is a fibre, and
// instructions of a whole warp are carried out when its last lane arrives.
//
// It is harsher than hardware where that finds bugs. Shared memory starts as NaN. A schedule may
// starve one warp, which then runs only when nothing else can, so that a missing barrier is seen;
// it may run blocks and lanes from the last one on, so that it is seen where one reads what another
// writes; and asynchronous copies, and products of warpgroups, may be carried out at once or not
// before they are waited for: then they read registers and memory as these are by then. Lanes that
// meet at different instructions, threads that wait for ever, copies and products never waited for,
// and products without the fences that they need are errors with the place where they happened. It
// sees neither weak memory ordering beyond that nor bank conflicts, and says nothing about speed.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

struct Extent {
  unsigned x = 1, y = 1, z = 1;
  unsigned count() const { return x * y * z; }
};

constexpr int kWarpLanes = 32, kWarpgroupThreads = 128;

struct Schedule {
  bool late_copies = false;    // they land when they are waited for, not at once
  int starved_warp = -1;       // of each block, modulo its warps; -1: none
  bool late_products = false;  // of warpgroups: likewise
  bool reversed = false;       // blocks, and lanes of a warp, from the last one on
};

// What went wrong in a kernel.
class Fault : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Threads that wait for one another. `generation` counts the times they met.
struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

// Of a product of a warpgroup: where its threads have their registers, and the descriptor of what
// comes from shared memory.
struct WarpgroupOperands {
  std::array<void*, kWarpgroupThreads> c;
  std::array<const uint32_t*, kWarpgroupThreads> a;
  uint64_t b;
};

class Machine {
 public:
  static Machine& instance();

  void set_schedule(const Schedule& schedule) { schedule_ = schedule; }
  // Of a block, from the next launch on.
  void set_most_shared(size_t bytes) { most_shared_ = bytes; }
  // Whether no kernel writes what is there, so that it may be copied before earlier ones have
  // ended; null: not known.
  void set_is_constant(bool (*is_constant)(const void*)) { is_constant_ = is_constant; }
  // Runs `body` once for every thread of every block. Throws Fault.
  void run(Extent grid, Extent block, size_t shared_bytes, const std::function<void()>& body);
  int64_t launches() const { return launches_; }

  // --- what a kernel sees, within run() ---
  Extent block_index, block_extent, grid_extent;
  Extent thread_index() const { return fibres_[current_].index; }
  unsigned char* shared() { return shared_; }

  void wait_for_earlier_launches() { fibres_[current_].waited = true; }
  void check_waited_for_earlier_launches() const {
    if (!fibres_[current_].waited)
      throw Fault("a thread ended without waiting for earlier kernels");
  }
  void sync_block();
  // `instruction` names what the lanes are at; evaluate(in, out) is called once, for all lanes.
  template <class In, class Out, class Evaluate>
  Out with_warp(const char* instruction, const In& in, Evaluate evaluate);

  // An instruction that takes so many bytes, a power of two, from an address, or from shared
  // memory.
  void check_aligned(const char* instruction, const void* at, int bytes) const;
  void check_shared(const char* instruction, const void* at, int bytes) const;

  // Asynchronous copies of this thread to shared memory, in groups. From null: zeros.
  void copy_async(void* to, const void* from, int bytes);
  void commit_copies();
  void wait_copies(int groups_left);

  // Products of this thread's warpgroup, in groups; and what has to precede them.
  using CarryOut = void (*)(const WarpgroupOperands&);
  void fence_shared_operands() { fibres_[current_].unfenced = false; }
  void fence_products();
  void multiply(const char* instruction, void* c, const uint32_t* a, uint64_t b,
                CarryOut carry_out);
  void commit_products();
  void wait_products(int groups_left);

  // What a block may have at least, on devices from sm_80 on; and on those with warpgroups.
  static constexpr size_t kLeastShared = 99 << 10, kWarpgroupShared = 227 << 10;

 private:
  static constexpr size_t kSlotBytes = 128;  // of a lane's operands, and of its results
  struct Warp {
    Barrier barrier;
    const char* instruction = nullptr;
    alignas(16) std::array<std::array<unsigned char, kSlotBytes>, kWarpLanes> in, out;
  };
  struct Product {
    WarpgroupOperands operands;
    CarryOut carry_out;
  };
  struct Warpgroup {
    Barrier barrier;
    const char* instruction = nullptr;
    WarpgroupOperands operands;  // of those that have arrived
    bool fenced = false;
    std::vector<Product> open;
    std::deque<std::vector<Product>> groups;
  };
  struct Copy {
    void* to;
    const void* from;
    int bytes;
  };
  struct Fibre {
    void* stack_pointer = nullptr;
    void* fake_stack = nullptr;  // of AddressSanitizer
    Extent index;
    int lane = 0, warp = 0;
    bool done = false;
    bool waited = false;                // for earlier launches
    bool unfenced = false;              // its copies have landed, for itself
    const Barrier* waits_at = nullptr;  // until its generation is another than `seen`
    unsigned seen = 0;
    const char* place = "";  // what it waits for
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
  };

  Machine() = default;
  void start_block(size_t shared_bytes);
  void run_block();
  bool runnable(const Fibre& fibre) const {
    return !fibre.done && (fibre.waits_at == nullptr || fibre.waits_at->generation != fibre.seen);
  }
  bool run_fibres(int only_warp, int but_warp);
  Warpgroup& warpgroup();
  // `work` once, when all threads of the warpgroup are at the instruction.
  template <class Work>
  void with_warpgroup(const char* instruction, const Work& work);
  void resume(int fibre);
  void suspend();
  // Suspends the current fibre until the barrier's generation changes.
  void wait_at(const Barrier& barrier, const char* place);
  [[noreturn]] void report_deadlock();
  // Whether two names of instructions are; mostly they are one constant.
  static bool are_different(const char* a, const char* b) {
    return a != b && std::strcmp(a, b) != 0;
  }
  static void entry();

  Schedule schedule_;
  std::vector<Fibre> fibres_;
  std::vector<Warp> warps_;
  std::vector<Warpgroup> warpgroups_;
  std::vector<std::unique_ptr<unsigned char[]>> stacks_;
  std::vector<unsigned char> shared_memory_;
  unsigned char* shared_ = nullptr;
  size_t shared_bytes_ = 0;
  bool (*is_constant_)(const void*) = nullptr;
  size_t most_shared_ = kLeastShared;
  Barrier block_barrier_;
  int alive_ = 0, current_ = 0;
  void* scheduler_pointer_ = nullptr;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr failure_;
  bool running_ = false;
  int64_t launches_ = 0;
};

template <class In, class Out, class Evaluate>
Out Machine::with_warp(const char* instruction, const In& in, Evaluate evaluate) {
  static_assert(sizeof(In) <= kSlotBytes && sizeof(Out) <= kSlotBytes);
  const int lane = fibres_[current_].lane;
  Warp& warp = warps_[fibres_[current_].warp];
  if (warp.barrier.arrived == 0) warp.instruction = instruction;
  if (are_different(warp.instruction, instruction))
    throw Fault("lanes of warp " + std::to_string(fibres_[current_].warp) + " are at " +
                warp.instruction + " and at " + instruction);
  std::memcpy(warp.in[lane].data(), &in, sizeof(In));
  if (++warp.barrier.arrived == kWarpLanes) {
    std::array<In, kWarpLanes> operands;
    std::array<Out, kWarpLanes> results;
    for (int i = 0; i < kWarpLanes; ++i) std::memcpy(&operands[i], warp.in[i].data(), sizeof(In));
    evaluate(operands, results);
    for (int i = 0; i < kWarpLanes; ++i) std::memcpy(warp.out[i].data(), &results[i], sizeof(Out));
    warp.barrier.arrived = 0;
    ++warp.barrier.generation;
  } else {
    wait_at(warp.barrier, instruction);
  }
  Out result;
  std::memcpy(&result, warp.out[lane].data(), sizeof(Out));
  return result;
}

}  // namespace emulator
