// CUDA devices that are the emulator: the functions of DeviceTable over memory of the host. Each
// device runs kernels by a schedule of its own.
#pragma once

#include <functional>

#include "kernels/cuda/device_table.h"

namespace emulator {

const puna::cuda::DeviceTable& device_table();

// From now on what a device is asked for is done when the host waits for it, as late as is legal,
// and not at once, but what it is sent (device_table.h) as early; otherwise it is the other way
// round. Nobody may look into its memory before.
void set_late(bool late);

// A stream as users make them, and how often a device has asked it for something.
void* make_stream(int ordinal);
void destroy_stream(void* stream);
int64_t asked(const void* stream);
// What a user asks it for; done as late as is legal.
void ask_stream(void* stream, std::function<void()> work);
// Whether it cannot be waited for everybody, as when somebody captures.
void set_everybody_fails(bool fails);

// How often anything was sent so far, to whatever device.
int64_t sends();

}  // namespace emulator
