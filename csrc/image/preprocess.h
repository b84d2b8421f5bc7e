// A picture to the normalised tiles that the vision model reads.
#pragma once

#include <cstdint>
#include <vector>

#include "image/tiling.h"

namespace puna {

struct PreparedImage {
  // [tiles][3][tile][tile] in [-1, 1], padding -1: the tiles of the canvas row by row and, if there
  // is more than one, last the global tile: the whole picture squeezed into one.
  std::vector<float> pixels;
  int64_t tiles = 0;
  int64_t rows = 0, columns = 0;  // of the canvas
};

// rgb is [height][width][3]. Throws as plan_tiles().
PreparedImage prepare_image(const uint8_t* rgb, int64_t height, int64_t width, int64_t tile,
                            int64_t max_tiles = kMaxTiles);

}  // namespace puna
