// The kernels behind the functions of DeviceTable (device_table.h), by stream.
#pragma once

#include "kernels/cuda/device_table.h"
#include "kernels/cuda/ptx.h"

namespace puna::cuda {

// Of a block, so that it fits the devices with the least shared memory.
constexpr int kMostShared = 99 << 10;

#define PUNA_OPERATION(name, Call) int launch_##name(const Call& call, Stream stream);
#include "kernels/cuda/operations.inc"
#undef PUNA_OPERATION
// Parts of launch_product: of kWeightsBF16, those of it by warpgroups, of kWeightsQuantized, and
// those of the latter with one row, with some, and with many by the products of warps or of
// warpgroups.
int launch_bf16_product(const ProductCall& call, Stream stream);
int launch_bf16_warpgroups(const ProductCall& call, Stream stream);
int launch_quantized_product(const ProductCall& call, Stream stream);
bool is_for_one_row(const ProductCall& call);
int launch_quantized_one_row(const ProductCall& call, Stream stream);
int launch_quantized_small_tiles(const ProductCall& call, Stream stream);
int launch_quantized_large_tiles(const ProductCall& call, Stream stream);
int launch_quantized_warpgroups(const ProductCall& call, Stream stream);

}  // namespace puna::cuda
