#include "device_ceilings.h"

#include "backend/cuda/cuda_backend.h"
#include "base/env.h"
#include "base/error.h"
#include "kernels/cpu/dispatch.h"

namespace puna::bench {
namespace {

constexpr int32_t kReadingBlocks = 4, kMultiplyingBlocks = 2;  // of a multiprocessor

}  // namespace

DeviceCeilings::DeviceCeilings(int ordinal, bool small)
    : table_(cuda_library()), bytes_(int64_t{1} << (small ? 16 : 32)), rounds_(small ? 2 : 20000) {
  cuda::DeviceInfo info = {};
  int code = table_.device_info(ordinal, &info);
  multiprocessors_ = info.multiprocessors;
  if (code == 0) code = table_.open(ordinal, nullptr, &device_);
  if (code == 0) code = table_.allocate(device_, static_cast<size_t>(bytes_), &memory_);
  if (code != 0) fail(ErrorCode::kDevice, "[cuda] ceilings: ", table_.describe(code));
  sample();  // what is compiled or fetched when it first runs
  for (std::vector<double>* rates : {&read_, &copy_, &int8_, &bf16_}) rates->clear();
  sample();
}

DeviceCeilings::~DeviceCeilings() {
  table_.release(device_, memory_);
  table_.close(device_);
}

double DeviceCeilings::seconds(const std::function<int()>& work) const {
  return seconds_of([&] {
    int code = work();
    if (code == 0) code = table_.synchronise(device_);
    if (code != 0) fail(ErrorCode::kDevice, "[cuda] ceilings: ", table_.describe(code));
  });
}

void DeviceCeilings::sample() {
  cuda::ExerciseCall call = {};
  call.data = memory_;
  call.bytes = bytes_;
  call.out = static_cast<int32_t*>(memory_);
  call.kind = cuda::kExerciseRead;
  call.blocks = kReadingBlocks * multiprocessors_;
  const auto exercise = [&] { return table_.exercise(device_, &call); };
  read_.push_back(static_cast<double>(bytes_) / seconds(exercise));
  const int64_t half = bytes_ / 2;
  copy_.push_back(static_cast<double>(bytes_) / seconds([&] {
                    return table_.copy(device_, memory_, static_cast<char*>(memory_) + half,
                                       static_cast<size_t>(half));
                  }));
  call.rounds = rounds_;
  call.blocks = kMultiplyingBlocks * multiprocessors_;
  // By the instructions that the backend uses for many rows.
  const bool warpgroups = environment_cuda_warpgroups();
  const int32_t int8 = warpgroups ? cuda::kExerciseWarpgroupsInt8 : cuda::kExerciseInt8;
  const int32_t bf16 = warpgroups ? cuda::kExerciseWarpgroupsBF16 : cuda::kExerciseBF16;
  for (const int32_t kind : {int8, bf16}) {
    call.kind = kind;
    const int64_t products = rounds_ * call.blocks * cuda::kExerciseWarps * cuda::kExerciseProducts;
    (kind == int8 ? int8_ : bf16_)
        .push_back(static_cast<double>(products * cuda::exercise_operations(kind)) /
                   seconds(exercise));
  }
}

double DeviceCeilings::read() const { return median(read_); }
double DeviceCeilings::copy() const { return median(copy_); }
double DeviceCeilings::int8() const { return median(int8_); }
double DeviceCeilings::bf16() const { return median(bf16_); }

MachineCeilings::MachineCeilings(const Backend& backend, const std::string& isa, int threads,
                                 bool small) {
  if (backend.device_memory()) {
    // "cuda:1 (name)"
    const std::string device = backend.description();
    gpu_ = std::make_unique<DeviceCeilings>(std::stoi(device.substr(device.find(':') + 1)), small);
  } else {
    pool_ = std::make_unique<ThreadPool>(threads);
    cpu_ = std::make_unique<Ceilings>(resolve_isa(isa), *pool_);
  }
}

void MachineCeilings::sample() {
  if (gpu_ != nullptr) gpu_->sample();
  if (cpu_ != nullptr) cpu_->sample();
}

}  // namespace puna::bench
