// The emulator as a libpuna_cuda.so, for PUNA_CUDA_LIBRARY: whole models run on it; and streams for
// them.
#include "emulator/device.h"

extern "C" __attribute__((visibility("default"))) const puna::cuda::DeviceTable* PUNA_CUDA_ENTRY(
    int32_t version) {
  return version == puna::cuda::kTableVersion ? &emulator::device_table() : nullptr;
}

extern "C" __attribute__((visibility("default"))) void* emulator_make_stream(int ordinal) {
  return emulator::make_stream(ordinal);
}
extern "C" __attribute__((visibility("default"))) int64_t emulator_asked(const void* stream) {
  return emulator::asked(stream);
}
extern "C" __attribute__((visibility("default"))) void emulator_set_late(bool late) {
  emulator::set_late(late);
}
