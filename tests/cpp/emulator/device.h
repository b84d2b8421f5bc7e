// CUDA devices that are the emulator: the functions of DeviceTable over memory of the host. Each
// device runs kernels by a schedule of its own.
#pragma once

#include "kernels/cuda/device_table.h"

namespace emulator {

const puna::cuda::DeviceTable& device_table();

}  // namespace emulator
