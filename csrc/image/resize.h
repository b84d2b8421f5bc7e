// Antialiased bilinear resizing of 8-bit RGB, bit for bit as Image.resize(BILINEAR) of Pillow up to
// 12: the pictures that Llama 4 was trained on went through it. (Pillow 13 resizes the columns
// before the rows where that is less work, which moves some levels by one.)
#pragma once

#include <cstdint>
#include <vector>

namespace puna {

// rgb [height][width][3] -> [new_height][new_width][3]. All sizes are at least 1.
std::vector<uint8_t> resize_rgb(const uint8_t* rgb, int64_t height, int64_t width,
                                int64_t new_height, int64_t new_width);

}  // namespace puna
