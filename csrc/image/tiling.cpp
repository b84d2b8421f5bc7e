#include "image/tiling.h"

#include <algorithm>
#include <optional>

#include "base/error.h"

namespace puna {

namespace {

struct Canvas {
  int64_t rows, columns;
};

// Every canvas of at most `max_tiles` tiles. Order does not matter: two canvases of equal area
// never tie, because the smaller one of min(rows) x min(columns) shows a picture at the same scale.
std::vector<Canvas> canvases(int64_t max_tiles) {
  std::vector<Canvas> all;
  for (int64_t rows = 1; rows <= max_tiles; ++rows) {
    for (int64_t columns = 1; rows * columns <= max_tiles; ++columns) {
      all.push_back({rows, columns});
    }
  }
  return all;
}

void check_sizes(int64_t height, int64_t width, int64_t tile, int64_t max_tiles) {
  if (height < 1 || width < 1) {
    fail(ErrorCode::kImage, "[image] the picture is ", width, " x ", height,
         " pixels; it needs at least 1 x 1");
  }
  if (height > kMaxSide || width > kMaxSide || height * width > kMaxPixels) {
    fail(ErrorCode::kImage, "[image] the picture is ", width, " x ", height, " pixels; at most ",
         kMaxPixels, " in all and ", kMaxSide, " a side are accepted: make it smaller");
  }
  // The canvas is bounded like a picture, which bounds every size computed from it.
  if (tile < 1 || max_tiles < 1 || tile > kMaxSide || max_tiles > kMaxPixels / (tile * tile)) {
    fail(ErrorCode::kImage, "[image] a canvas of at most ", max_tiles, " tiles of ", tile, " x ",
         tile, " pixels is not possible: both must be at least 1, and the pixels at most ",
         kMaxPixels);
  }
}

}  // namespace

TilePlan plan_tiles(int64_t height, int64_t width, int64_t tile, int64_t max_tiles) {
  check_sizes(height, width, tile, max_tiles);
  // In fp32 as in the reference: rounding decides which scales are equal.
  const auto scale_of = [&](const Canvas& canvas) {
    const float vertical = static_cast<float>(canvas.rows * tile) / static_cast<float>(height);
    const float horizontal = static_cast<float>(canvas.columns * tile) / static_cast<float>(width);
    return std::min(vertical, horizontal);
  };
  const std::vector<Canvas> all = canvases(max_tiles);
  std::optional<float> least_enlarging;
  float largest = 0;
  for (const Canvas& canvas : all) {
    const float scale = scale_of(canvas);
    largest = std::max(largest, scale);
    if (scale >= 1) least_enlarging = std::min(scale, least_enlarging.value_or(scale));
  }
  const float chosen = least_enlarging.value_or(largest);
  const Canvas* best = nullptr;
  for (const Canvas& canvas : all) {
    if (scale_of(canvas) != chosen) continue;
    if (!best || canvas.rows * canvas.columns < best->rows * best->columns) best = &canvas;
  }

  TilePlan plan{best->rows, best->columns, 0, 0};
  // A small picture is not enlarged beyond one tile's side.
  const int64_t target_height = std::min(std::max(height, tile), plan.rows * tile);
  const int64_t target_width = std::min(std::max(width, tile), plan.columns * tile);
  // In double as in Meta's reference. The port in transformers has fp32 here, and now and then
  // arrives at a size that is one pixel off.
  const double by_height = static_cast<double>(target_height) / static_cast<double>(height);
  const double by_width = static_cast<double>(target_width) / static_cast<double>(width);
  if (by_width < by_height) {
    plan.width = target_width;
    plan.height =
        std::min(static_cast<int64_t>(static_cast<double>(height) * by_width), target_height);
  } else {
    plan.height = target_height;
    plan.width =
        std::min(static_cast<int64_t>(static_cast<double>(width) * by_height), target_width);
  }
  // The thinnest pictures would vanish.
  plan.height = std::max<int64_t>(plan.height, 1);
  plan.width = std::max<int64_t>(plan.width, 1);
  return plan;
}

std::vector<int32_t> image_token_layout(int64_t rows, int64_t columns, int64_t tokens_per_tile,
                                        const ImageTokens& ids) {
  if (rows < 1 || columns < 1 || tokens_per_tile < 1 || rows > kMaxSide || columns > kMaxSide ||
      tokens_per_tile > kMaxPixels / (rows * columns)) {
    fail(ErrorCode::kImage, "[image] ", rows, " x ", columns, " tiles of ", tokens_per_tile,
         " tokens are no layout: each must be at least 1, and all together at most ", kMaxPixels);
  }
  std::vector<int32_t> tokens = {ids.image_start};
  const auto add_tile = [&] {
    tokens.insert(tokens.end(), static_cast<size_t>(tokens_per_tile), ids.patch);
  };
  if (rows * columns > 1) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) {
        if (column > 0) tokens.push_back(ids.tile_x_separator);
        add_tile();
      }
      tokens.push_back(ids.tile_y_separator);
    }
  }
  tokens.push_back(ids.image);
  add_tile();
  tokens.push_back(ids.image_end);
  return tokens;
}

}  // namespace puna
