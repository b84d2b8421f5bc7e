#include "emulator/machine.h"

#include <algorithm>
#include <map>
#include <sstream>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the registers that a call must preserve on the stack, swaps stacks, and returns there.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.pushsection .text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
.popsection
)");

namespace emulator {
namespace {

// Kernels hold their state in registers; sanitizers need more than that.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
constexpr int kSavedRegisters = 6;
// What devices allow in the second and third direction.
constexpr unsigned kMostBlocks = 65535;
constexpr size_t kSharedAlignment = 1024;  // as shared_memory() promises

}  // namespace

Machine& Machine::instance() {
  static Machine machine;
  return machine;
}

void Machine::entry() {
  Machine& machine = instance();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack_,
                                  &machine.scheduler_stack_bytes_);
#endif
  try {
    (*machine.body_)();
    if (!machine.warpgroup().open.empty() || !machine.warpgroup().groups.empty())
      throw Fault("a thread ended with products on their way");
    if (!machine.fibres_[machine.current_].open.empty() ||
        !machine.fibres_[machine.current_].groups.empty())
      throw Fault("a thread ended with asynchronous copies on their way");
  } catch (...) {
    if (!machine.failure_) machine.failure_ = std::current_exception();
  }
  machine.fibres_[machine.current_].done = true;
  --machine.alive_;
  machine.suspend();
  __builtin_unreachable();
}

void Machine::start_block(size_t shared_bytes) {
  const int threads = static_cast<int>(block_extent.count());
  while (stacks_.size() < static_cast<size_t>(threads))
    stacks_.push_back(std::make_unique_for_overwrite<unsigned char[]>(kStackBytes));
  // All ones: NaN as float, double or bfloat16, and no small number.
  std::memset(shared_, 0xff, shared_bytes);
  // Blocks are many: what they are made of is used again.
  warps_.resize(threads / kWarpLanes);
  for (Warp& warp : warps_) warp.barrier = {};
  warpgroups_.resize((threads + kWarpgroupThreads - 1) / kWarpgroupThreads);
  for (Warpgroup& group : warpgroups_) {
    group.barrier = {};
    group.fenced = false;
    group.open.clear();
    group.groups.clear();
  }
  fibres_.resize(threads);
  block_barrier_ = {};
  alive_ = threads;
  for (int i = 0; i < threads; ++i) {
    Fibre& fibre = fibres_[i];
    fibre.done = false;
    fibre.waited = false;
    fibre.unfenced = false;
    fibre.waits_at = nullptr;
    fibre.fake_stack = nullptr;
    fibre.open.clear();
    fibre.groups.clear();
#if defined(__SANITIZE_ADDRESS__)
    // What an earlier thread left, since it never returns.
    __asan_unpoison_memory_region(stacks_[i].get(), kStackBytes);
#endif
    fibre.index = {i % block_extent.x, i / block_extent.x % block_extent.y,
                   i / (block_extent.x * block_extent.y)};
    fibre.lane = i % kWarpLanes;
    fibre.warp = i / kWarpLanes;
    auto** top = reinterpret_cast<void**>(stacks_[i].get() + kStackBytes - 64);
    *--top = nullptr;  // where entry() would return to
    *--top = reinterpret_cast<void*>(&entry);
    for (int r = 0; r < kSavedRegisters; ++r) *--top = nullptr;
    fibre.stack_pointer = top;
  }
}

void Machine::run(Extent grid, Extent block, size_t shared_bytes,
                  const std::function<void()>& body) {
  if (running_) throw Fault("a kernel was launched from within a kernel");
  if (block.count() > 1024 || block.count() % kWarpLanes != 0)
    throw Fault("a block of " + std::to_string(block.count()) + " threads");
  if (grid.y > kMostBlocks || grid.z > kMostBlocks)
    throw Fault("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                std::to_string(grid.z) + " blocks");
  if (shared_bytes > most_shared_)
    throw Fault(std::to_string(shared_bytes) + " bytes of shared memory");
  ++launches_;
  running_ = true;
  grid_extent = grid;
  block_extent = block;
  body_ = &body;
  // Exactly as much as was asked for, so that AddressSanitizer sees what lies beyond.
  std::vector<unsigned char>(shared_bytes + kSharedAlignment).swap(shared_memory_);
  shared_bytes_ = shared_bytes;
  shared_ = shared_memory_.data();
  while (reinterpret_cast<uintptr_t>(shared_) % kSharedAlignment != 0) ++shared_;
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(
      shared_ + shared_bytes,
      shared_memory_.data() + shared_memory_.size() - (shared_ + shared_bytes));
#endif
  failure_ = nullptr;
  try {
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          block_index = schedule_.reversed ? Extent{grid.x - 1 - x, grid.y - 1 - y, grid.z - 1 - z}
                                           : Extent{x, y, z};
          start_block(shared_bytes);
          run_block();
        }
  } catch (...) {
    failure_ = std::current_exception();
  }
  running_ = false;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(shared_memory_.data(), shared_memory_.size());
#endif
  if (failure_) std::rethrow_exception(failure_);
}

void Machine::run_block() {
  const int warps = static_cast<int>(warps_.size());
  const int starved = schedule_.starved_warp < 0 ? -1 : schedule_.starved_warp % warps;
  while (alive_ > 0) {
    // The starved warp has its turn when the others have come as far as they can.
    if (run_fibres(-1, starved)) continue;
    if (starved < 0 || !run_fibres(starved, -1)) report_deadlock();
  }
}

bool Machine::run_fibres(int only_warp, int but_warp) {
  bool ran = false;
  for (int turn = 0; turn < static_cast<int>(fibres_.size()); ++turn) {
    const int i = schedule_.reversed ? turn ^ (kWarpLanes - 1) : turn;
    const Fibre& fibre = fibres_[i];
    if (!runnable(fibre) || fibre.warp == but_warp || (only_warp >= 0 && fibre.warp != only_warp))
      continue;
    ran = true;
    resume(i);
    if (failure_) std::rethrow_exception(failure_);
  }
  return ran;
}

void Machine::resume(int fibre) {
  current_ = fibre;
  fibres_[fibre].waits_at = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack_, stacks_[fibre].get(), kStackBytes);
#endif
  emulator_switch(&scheduler_pointer_, fibres_[fibre].stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
#endif
}

void Machine::suspend() {
  Fibre& fibre = fibres_[current_];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fibre.done ? nullptr : &fibre.fake_stack, scheduler_stack_,
                                 scheduler_stack_bytes_);
#endif
  emulator_switch(&fibre.stack_pointer, scheduler_pointer_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fibre.fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
}

void Machine::wait_at(const Barrier& barrier, const char* place) {
  Fibre& fibre = fibres_[current_];
  fibre.waits_at = &barrier;
  fibre.seen = barrier.generation;
  fibre.place = place;
  suspend();
}

void Machine::report_deadlock() {
  std::map<std::string, int> places;
  for (const Fibre& fibre : fibres_)
    if (!fibre.done) ++places[fibre.place];
  std::ostringstream text;
  text << "deadlock in block " << block_index.x << ", " << block_index.y << ", " << block_index.z
       << ":";
  for (const auto& [place, count] : places) text << ' ' << count << " threads wait at " << place;
  throw Fault(text.str());
}

void Machine::sync_block() {
  // Threads that have ended count as arrived.
  if (++block_barrier_.arrived == alive_) {
    block_barrier_.arrived = 0;
    ++block_barrier_.generation;
  } else {
    wait_at(block_barrier_, "__syncthreads");
  }
}

void Machine::check_aligned(const char* instruction, const void* at, int bytes) const {
  if (reinterpret_cast<uintptr_t>(at) % static_cast<unsigned>(bytes) != 0)
    throw Fault(std::string(instruction) + " of " + std::to_string(bytes) +
                " bytes at an address that is no multiple of them");
}

void Machine::check_shared(const char* instruction, const void* at, int bytes) const {
  check_aligned(instruction, at, bytes);
  const auto begin = reinterpret_cast<uintptr_t>(shared_), of = reinterpret_cast<uintptr_t>(at);
  if (of < begin || of + static_cast<unsigned>(bytes) > begin + shared_bytes_)
    throw Fault(std::string(instruction) + " beyond the block's shared memory");
}

void Machine::copy_async(void* to, const void* from, int bytes) {
  static constexpr unsigned char kZeros[16] = {};
  check_shared("copy_async", to, bytes);
  if (from == nullptr) {
    from = kZeros;
  } else {
    check_aligned("copy_async", from, bytes);
    if (!fibres_[current_].waited && is_constant_ != nullptr && !is_constant_(from))
      throw Fault("a copy of what earlier kernels may write, which does not wait for them");
  }
  if (!schedule_.late_copies) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
    bytes = 0;  // that are still to come
  }
  fibres_[current_].open.push_back({to, from, bytes});
}

void Machine::commit_copies() {
  Fibre& fibre = fibres_[current_];
  fibre.groups.push_back(std::move(fibre.open));
  fibre.open.clear();
}

void Machine::wait_copies(int groups_left) {
  Fibre& fibre = fibres_[current_];
  while (static_cast<int>(fibre.groups.size()) > groups_left) {
    for (const Copy& copy : fibre.groups.front())
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    if (!fibre.groups.front().empty()) fibre.unfenced = true;
    fibre.groups.pop_front();
  }
}

Machine::Warpgroup& Machine::warpgroup() {
  return warpgroups_[fibres_[current_].warp * kWarpLanes / kWarpgroupThreads];
}

template <class Work>
void Machine::with_warpgroup(const char* instruction, const Work& work) {
  Warpgroup& group = warpgroup();
  if (group.barrier.arrived == 0) group.instruction = instruction;
  if (are_different(group.instruction, instruction))
    throw Fault(std::string("threads of a warpgroup are at ") + group.instruction + " and at " +
                instruction);
  if (++group.barrier.arrived == kWarpgroupThreads) {
    work(group);
    group.barrier.arrived = 0;
    ++group.barrier.generation;
  } else {
    wait_at(group.barrier, instruction);
  }
}

void Machine::fence_products() {
  with_warpgroup("fence_products", [](Warpgroup& group) { group.fenced = true; });
}

void Machine::multiply(const char* instruction, void* c, const uint32_t* a, uint64_t b,
                       CarryOut carry_out) {
  Warpgroup& of = warpgroup();
  const Fibre& fibre = fibres_[current_];
  const int thread = (fibre.warp * kWarpLanes + fibre.lane) % kWarpgroupThreads;
  if (of.barrier.arrived > 0 && of.operands.b != b)
    throw Fault(std::string("threads of a warpgroup have different operands of ") + instruction);
  of.operands.c[thread] = c;
  of.operands.a[thread] = a;
  of.operands.b = b;
  with_warpgroup(instruction, [&](Warpgroup& group) {
    if (!group.fenced) throw Fault(std::string(instruction) + " without fence_products");
    for (const Fibre& writer : fibres_)
      if (writer.unfenced)
        throw Fault(std::string(instruction) + " reads what was copied without a fence");
    if (schedule_.late_products)
      group.open.push_back({group.operands, carry_out});
    else
      carry_out(group.operands);
  });
}

void Machine::commit_products() {
  with_warpgroup("commit_products", [](Warpgroup& group) {
    group.groups.push_back(std::move(group.open));
    group.open.clear();
  });
}

void Machine::wait_products(int groups_left) {
  with_warpgroup("wait_products", [&](Warpgroup& group) {
    while (static_cast<int>(group.groups.size()) > groups_left) {
      for (const Product& product : group.groups.front()) product.carry_out(product.operands);
      group.groups.pop_front();
    }
    group.fenced = false;  // now the registers may be used
  });
}

}  // namespace emulator
