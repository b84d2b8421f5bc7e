// What every backend demands of the arguments of an operation, in one place, so that all of them
// refuse the same calls with the same words. Each function throws Error or returns.
#pragma once

#include <cstdint>
#include <span>

#include "backend/backend.h"
#include "backend/routing.h"
#include "base/half.h"

namespace puna {

// Sizes of the whole that the parts make up.
struct MatrixShape {
  int64_t rows = 0, cols = 0;
  DType dtype = DType::kF32;
};
MatrixShape check_matrix_parts(std::span<const MatrixSource> parts, const MatrixOptions& options);
int64_t check_vector_parts(std::span<const TensorRef> parts);

void check_embed(ConstRows out, const TensorRef& table, std::span<const int32_t> ids);
void check_gather(ConstRows out, ConstRows x, std::span<const int32_t> index);
void check_scatter(ConstRows out, ConstRows x, std::span<const int32_t> index);
void check_rms_norm(ConstRows out, ConstRows x, const VectorRef& weight);
void check_layer_norm(ConstRows out, ConstRows x, const VectorRef& weight, const VectorRef& bias);
void check_matmul(ConstRows out, ConstRows x, const WeightRef& weight,
                  const MatmulOptions& options);
void check_mlp(ConstRows residual, ConstRows x, const WeightRef& gate_up, const WeightRef& down);
void check_moe(ConstRows residual, ConstRows x, const MoeWeights& weights);
void check_experts(ConstRows out, ConstRows x, const Routing& routing,
                   std::span<const WeightRef> gate_up, std::span<const WeightRef> down);
void check_attention(ConstRows out, const AttentionInput& input);
void check_vision_attention(ConstRows out, ConstRows qkv, int64_t tiles, int64_t tokens,
                            int64_t heads, const float* cos, const float* sin, DType operands);
void check_argmax(std::span<const int32_t> out, ConstRows x);
void check_candidates(ConstRows x, std::span<const double> temperatures);
void check_unfold(ConstRows out, const float* pixels, int64_t tiles, int64_t size, int64_t patch);
void check_pixel_shuffle(ConstRows out, ConstRows x, int64_t tiles, int64_t grid, int64_t factor);

// What load_matrix() packs a matrix as. Throws Unsupported for formats that cannot be made from it.
WeightFormat target_format(const MatrixShape& shape, const MatrixOptions& options);
void check_adopted(WeightFormat format, int64_t rows, int64_t cols, const void* data);

}  // namespace puna
