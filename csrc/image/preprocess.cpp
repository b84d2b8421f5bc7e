#include "image/preprocess.h"

#include <algorithm>
#include <array>

#include "image/resize.h"

namespace puna {

namespace {

// Mean and standard deviation of Llama 4's image processor are 0.5 for every channel.
std::array<float, 256> normalised_levels() {
  std::array<float, 256> levels;
  for (int v = 0; v < 256; ++v) levels[v] = (static_cast<float>(v) / 255.0f - 0.5f) / 0.5f;
  return levels;
}

// Fills one tile [3][tile][tile] from the part of rgb [height][width][3] that begins at (top,
// left); what lies beyond the picture stays padding.
void fill_tile(float* out, const std::vector<uint8_t>& rgb, int64_t height, int64_t width,
               int64_t top, int64_t left, int64_t tile) {
  static const std::array<float, 256> levels = normalised_levels();
  const int64_t filled_rows = std::min(tile, height - top);
  const int64_t filled_columns = std::min(tile, width - left);
  for (int64_t y = 0; y < filled_rows; ++y) {
    const uint8_t* pixel = rgb.data() + ((top + y) * width + left) * 3;
    float* red = out + y * tile;
    float* green = red + tile * tile;
    float* blue = green + tile * tile;
    for (int64_t x = 0; x < filled_columns; ++x, pixel += 3) {
      red[x] = levels[pixel[0]];
      green[x] = levels[pixel[1]];
      blue[x] = levels[pixel[2]];
    }
  }
}

}  // namespace

PreparedImage prepare_image(const uint8_t* rgb, int64_t height, int64_t width, int64_t tile,
                            int64_t max_tiles) {
  const TilePlan plan = plan_tiles(height, width, tile, max_tiles);
  const int64_t canvas_tiles = plan.rows * plan.columns;
  PreparedImage image;
  image.rows = plan.rows;
  image.columns = plan.columns;
  image.tiles = canvas_tiles > 1 ? canvas_tiles + 1 : 1;
  const int64_t tile_floats = 3 * tile * tile;
  image.pixels.assign(static_cast<size_t>(image.tiles * tile_floats), -1.0f);  // padding is black

  const std::vector<uint8_t> fitted = resize_rgb(rgb, height, width, plan.height, plan.width);
  float* out = image.pixels.data();
  for (int64_t row = 0; row < plan.rows; ++row) {
    for (int64_t column = 0; column < plan.columns; ++column) {
      fill_tile(out, fitted, plan.height, plan.width, row * tile, column * tile, tile);
      out += tile_floats;
    }
  }
  if (canvas_tiles > 1) {
    fill_tile(out, resize_rgb(rgb, height, width, tile, tile), tile, tile, 0, 0, tile);
  }
  return image;
}

}  // namespace puna
