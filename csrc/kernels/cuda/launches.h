// The kernels behind the functions of DeviceTable (device_table.h), by stream.
#pragma once

#include "kernels/cuda/device_table.h"
#include "kernels/cuda/ptx.h"

namespace puna::cuda {

int launch_prepare_operand(const OperandCall& call, Stream stream);
int launch_product(const ProductCall& call, Stream stream);
// Of kWeightsQuantized: part of launch_product.
int launch_quantized_product(const ProductCall& call, Stream stream);
int launch_route(const RoutingCall& call, Stream stream);
int launch_add_experts(const AddExpertsCall& call, Stream stream);
int launch_norm(const NormCall& call, Stream stream);
int launch_move(const MoveCall& call, Stream stream);
int launch_append(const AppendCall& call, Stream stream);
int launch_seal(const SealCall& call, Stream stream);
int launch_attend(const AttendCall& call, Stream stream);
int launch_vision_attention(const VisionAttentionCall& call, Stream stream);
int launch_unfold(const UnfoldCall& call, Stream stream);
int launch_pixel_shuffle(const PixelShuffleCall& call, Stream stream);

}  // namespace puna::cuda
