// What a GPU can do at best, as bench.h's Ceilings say of the processor.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "bench.h"
#include "kernels/cuda/device_table.h"
#include "platform/thread_pool.h"

namespace puna::bench {

class DeviceCeilings {
 public:
  // `small`: hardly any work, to see that it runs.
  DeviceCeilings(int ordinal, bool small);
  ~DeviceCeilings();
  DeviceCeilings(const DeviceCeilings&) = delete;
  DeviceCeilings& operator=(const DeviceCeilings&) = delete;

  void sample();  // each of them once more

  // Medians. Bytes per second; a copy counts what it reads and what it writes.
  double read() const;
  double copy() const;
  double int8() const;  // operations per second
  double bf16() const;

 private:
  // Of work on the device, which returns its code.
  double seconds(const std::function<int()>& work) const;

  const cuda::DeviceTable& table_;
  void* device_ = nullptr;
  void* memory_ = nullptr;
  int64_t bytes_, rounds_;
  int32_t multiprocessors_ = 0;
  std::vector<double> read_, copy_, int8_, bf16_;
};

// Of whatever `backend` computes on: the processor, with those instructions and threads, or the
// GPU, of that with hardly any work if `small`.
class MachineCeilings {
 public:
  MachineCeilings(const Backend& backend, const std::string& isa, int threads, bool small = false);

  void sample();
  double read() const { return gpu_ != nullptr ? gpu_->read() : cpu_->read(); }
  double bf16() const { return gpu_ != nullptr ? gpu_->bf16() : cpu_->bf16(); }

 private:
  std::unique_ptr<DeviceCeilings> gpu_;
  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<Ceilings> cpu_;
};

}  // namespace puna::bench
