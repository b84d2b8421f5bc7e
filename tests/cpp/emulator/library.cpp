// The emulator as a libpuna_cuda.so, for PUNA_CUDA_LIBRARY: whole models run on it.
#include "emulator/device.h"

extern "C" __attribute__((visibility("default"))) const puna::cuda::DeviceTable* PUNA_CUDA_ENTRY(
    int32_t version) {
  return version == puna::cuda::kTableVersion ? &emulator::device_table() : nullptr;
}
