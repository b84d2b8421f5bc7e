// The operations on a CUDA device: weights, activations, keys and values all lie in its memory.
//
// Weights lie as they do for the CPU (ADR 0009), so that packed files are read by both, and are
// packed by a backend of the host. With quantised weights, products have the bits of the CPU's.
#pragma once

#include <memory>

#include "backend/host_backend.h"
#include "kernels/cuda/device_table.h"

namespace puna {

// `host` packs weights, decodes embeddings, and computes the experts that are left to it. Kernels
// are started `batch_kernels` at a time (0: as many as are good for speed), or when a result is
// asked for. They and all else but copies beside them are asked for on `stream`, a cudaStream_t of
// the device, unless it is null.
std::unique_ptr<Backend> make_cuda_backend(const cuda::DeviceTable& table, int ordinal,
                                           std::unique_ptr<HostBackend> host,
                                           size_t batch_kernels = 0,
                                           std::shared_ptr<void> stream = {});

// Whether libpuna_cuda.so and a device are there, and which, or what is missing.
BackendStatus cuda_status();
// The functions of libpuna_cuda.so; throws DeviceError if it cannot be loaded.
const cuda::DeviceTable& cuda_library();

}  // namespace puna
