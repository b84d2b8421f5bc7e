// What a GPU can do at best, as bench.h's Ceilings say of the processor.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cuda/device_table.h"

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
  double seconds(const cuda::ExerciseCall& call) const;

  const cuda::DeviceTable& table_;
  void* device_ = nullptr;
  void* memory_ = nullptr;
  int64_t bytes_, rounds_;
  int32_t multiprocessors_ = 0;
  std::vector<double> read_, copy_, int8_, bf16_;
};

}  // namespace puna::bench
