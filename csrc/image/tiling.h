// How Llama 4 cuts a picture into tiles, and which tokens stand for them.
#pragma once

#include <cstdint>
#include <vector>

namespace puna {

constexpr int64_t kMaxTiles = 16;

// A larger picture is refused, as 256 MiB of RGB and far more than the 1.8 million pixels that 16
// tiles of 336 x 336 can show. It is also where Pillow begins to suspect a decompression bomb.
constexpr int64_t kMaxPixels = (int64_t{256} << 20) / 3;
// Resampling keeps a few weights per source row and column, so that a line of pixels must end too.
constexpr int64_t kMaxSide = 65'535;

struct TilePlan {
  int64_t rows = 1, columns = 1;  // tiles of the canvas
  int64_t height = 1,
          width = 1;  // what the picture is resized to; the rest of the canvas is padding
};

// The canvas, of at most `max_tiles` tiles of `tile` x `tile` pixels, that shows a picture of
// height x width best: the one that enlarges it least, else the one that shrinks it least; of
// equals the smallest. Throws ErrorCode::kImage for a picture without pixels or beyond the limits
// above.
TilePlan plan_tiles(int64_t height, int64_t width, int64_t tile, int64_t max_tiles = kMaxTiles);

// Ids of the special tokens that surround a picture's patches.
struct ImageTokens {
  int32_t image_start, image_end, tile_x_separator, tile_y_separator, image, patch;
};

// The ids that stand for a picture of rows x columns tiles, each of them `tokens_per_tile` patches:
// for more than one tile, the rows with their separators; then, always, the global (or only) tile.
std::vector<int32_t> image_token_layout(int64_t rows, int64_t columns, int64_t tokens_per_tile,
                                        const ImageTokens& ids);

}  // namespace puna
