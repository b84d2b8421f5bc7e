// Products of many rows with quantised weights.
#include "kernels/cuda/quantized_tiles.cuh"

namespace puna::cuda {

int launch_quantized_large_tiles(const ProductCall& call, Stream stream) {
  using Launch = int (*)(const ProductCall&, Stream);
  constexpr Launch kLaunches[] = {
#define PUNA_FORMAT(Traits, name) &launch_tiled_product<QuantizedTile<Traits, LargeTile>>,
#include "quant/formats.inc"
#undef PUNA_FORMAT
  };
  return kLaunches[call.format](call, stream);
}

}  // namespace puna::cuda
