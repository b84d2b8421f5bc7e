// Image preprocessing: tiling, resizing against Pillow's own results, normalisation, token layout.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "image/preprocess.h"
#include "image/resize.h"
#include "image/tiling.h"

using namespace puna;

namespace {

constexpr int64_t kTile = 336;

// Noise of a linear congruential generator, as in tests/golden/make_resize_golden.py.
std::vector<uint8_t> noise(int64_t height, int64_t width) {
  uint32_t state = static_cast<uint32_t>(height * 65536 + width);
  std::vector<uint8_t> rgb(static_cast<size_t>(height * width * 3));
  for (uint8_t& level : rgb) {
    state = state * 1664525u + 1013904223u;
    level = static_cast<uint8_t>(state >> 24);
  }
  return rgb;
}

float normalised(uint8_t level) { return (static_cast<float>(level) / 255.0f - 0.5f) / 0.5f; }

struct ResizeGolden {
  int64_t height, width, new_height, new_width;
  std::vector<uint8_t> levels;
};

const std::vector<ResizeGolden> kResizeGolden = {
#include "resize_golden.inc"
};

struct PlanGolden {
  int64_t height, width, rows, columns, new_height, new_width;
};

void check_plan(const PlanGolden& golden, int64_t tile, int64_t max_tiles = kMaxTiles) {
  const TilePlan plan = plan_tiles(golden.height, golden.width, tile, max_tiles);
  CHECK_EQ(plan.rows, golden.rows);
  CHECK_EQ(plan.columns, golden.columns);
  CHECK_EQ(plan.height, golden.new_height);
  CHECK_EQ(plan.width, golden.new_width);
}

}  // namespace

TEST(plans_of_known_sizes) {
  // Computed with Meta's reference; tests/test_images.py compares with it on many more sizes.
  const PlanGolden plans[] = {
      {336, 336, 1, 1, 336, 336},     {1, 1, 1, 1, 336, 336},         {337, 336, 2, 1, 337, 336},
      {672, 672, 2, 2, 672, 672},     {480, 640, 2, 2, 480, 640},     {1080, 1920, 3, 5, 945, 1680},
      {3000, 4000, 3, 4, 1008, 1344}, {4000, 4000, 4, 4, 1344, 1344}, {100, 5000, 1, 15, 100, 5000},
      {5000, 100, 15, 1, 5000, 100},  {1, 65535, 1, 16, 1, 5376},     {65535, 1, 16, 1, 5376, 1},
  };
  for (const PlanGolden& plan : plans) check_plan(plan, kTile);
  // Computed in fp32, this height would be 504.
  check_plan({639, 852, 2, 2, 503, 672}, kTile, 4);
}

TEST(plans_of_any_size) {
  uint32_t state = 1;
  const auto random = [&](int64_t below) {
    state = state * 1664525u + 1013904223u;
    return static_cast<int64_t>((uint64_t{state} * static_cast<uint64_t>(below)) >> 32);
  };
  for (int i = 0; i < 20'000; ++i) {
    const int64_t height = 1 + random(i % 2 ? 9000 : 700), width = 1 + random(i % 3 ? 9000 : 700);
    const int64_t tile = i % 5 ? kTile : 1 + random(600), most = i % 7 ? kMaxTiles : 1 + random(20);
    const TilePlan plan = plan_tiles(height, width, tile, most);
    CHECK(plan.rows >= 1 && plan.columns >= 1 && plan.rows * plan.columns <= most);
    CHECK(plan.height >= 1 && plan.height <= plan.rows * tile);
    CHECK(plan.width >= 1 && plan.width <= plan.columns * tile);
    // The canvas is filled in one direction, or the picture would have been enlarged too far.
    CHECK(plan.height == std::min(std::max(height, tile), plan.rows * tile) ||
          plan.width == std::min(std::max(width, tile), plan.columns * tile));
  }
}

TEST(refuses_impossible_pictures) {
  const auto plan = [](int64_t height, int64_t width, int64_t tile = kTile,
                       int64_t max_tiles = kMaxTiles) {
    return plan_tiles(height, width, tile, max_tiles);
  };
  constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();
  for (const int64_t bad : {int64_t{0}, int64_t{-1}, kMaxSide + 1, kHuge}) {
    CHECK_THROWS(ErrorCode::kImage, plan(bad, 10));
    CHECK_THROWS(ErrorCode::kImage, plan(10, bad));
    CHECK_THROWS(ErrorCode::kImage, prepare_image(nullptr, bad, 10, kTile));
    CHECK_THROWS(ErrorCode::kImage, plan(10, 10, bad));
  }
  CHECK_THROWS(ErrorCode::kImage, plan(kMaxSide, kMaxSide));
  CHECK_THROWS(ErrorCode::kImage, plan(kMaxPixels / 10'000 + 1, 10'000));
  CHECK_EQ(plan(kMaxPixels / 10'000, 10'000).width, 4 * kTile);
  for (const int64_t bad : {int64_t{0}, int64_t{-1}, int64_t{10'000}, kHuge}) {
    CHECK_THROWS(ErrorCode::kImage, plan(10, 10, kTile, bad));
  }
  const ImageTokens ids{1, 2, 3, 4, 5, 6};
  CHECK_THROWS(ErrorCode::kImage, image_token_layout(0, 1, 144, ids));
  CHECK_THROWS(ErrorCode::kImage, image_token_layout(1, kHuge, 144, ids));
  CHECK_THROWS(ErrorCode::kImage, image_token_layout(1, 1, 0, ids));
  CHECK_THROWS(ErrorCode::kImage, image_token_layout(1, 1, kHuge, ids));
}

TEST(resizes_as_pillow) {
  CHECK(!kResizeGolden.empty());
  for (const ResizeGolden& golden : kResizeGolden) {
    const std::vector<uint8_t> source = noise(golden.height, golden.width);
    CHECK(resize_rgb(source.data(), golden.height, golden.width, golden.new_height,
                     golden.new_width) == golden.levels);
  }
}

TEST(resizing_keeps_what_is_even_or_equal) {
  const std::vector<uint8_t> source = noise(20, 30);
  CHECK(resize_rgb(source.data(), 20, 30, 20, 30) == source);
  for (const int level : {0, 1, 127, 254, 255}) {
    const std::vector<uint8_t> even(31 * 17 * 3, static_cast<uint8_t>(level));
    for (const int64_t size : {1, 5, 17, 40, 100}) {
      const std::vector<uint8_t> resized = resize_rgb(even.data(), 31, 17, size, size + 3);
      CHECK(resized == std::vector<uint8_t>(static_cast<size_t>(size * (size + 3) * 3),
                                            static_cast<uint8_t>(level)));
    }
  }
  // The thinnest picture allowed, to a point.
  const std::vector<uint8_t> line(static_cast<size_t>(kMaxSide * 3), 200);
  CHECK(resize_rgb(line.data(), 1, kMaxSide, 1, 1) == std::vector<uint8_t>(3, 200));
}

TEST(prepares_tiles_row_by_row_and_the_global_tile_last) {
  constexpr int64_t kSmall = 8, kFloats = 3 * kSmall * kSmall;
  // 13 x 20 pixels on 2 x 3 tiles of 8: the canvas is 16 x 24, and nothing is resized.
  const std::vector<uint8_t> source = noise(13, 20);
  const PreparedImage image = prepare_image(source.data(), 13, 20, kSmall);
  CHECK_EQ(image.rows, 2);
  CHECK_EQ(image.columns, 3);
  CHECK_EQ(image.tiles, 7);
  CHECK_EQ(image.pixels.size(), size_t{7 * kFloats});
  for (int64_t y = 0; y < 16; ++y) {
    for (int64_t x = 0; x < 24; ++x) {
      const float* tile = image.pixels.data() + (y / kSmall * 3 + x / kSmall) * kFloats;
      for (int64_t c = 0; c < 3; ++c) {
        const float value = tile[(c * kSmall + y % kSmall) * kSmall + x % kSmall];
        const bool inside = y < 13 && x < 20;
        CHECK_EQ(value, inside ? normalised(source[(y * 20 + x) * 3 + c]) : -1.0f);
      }
    }
  }
  const std::vector<uint8_t> whole = resize_rgb(source.data(), 13, 20, kSmall, kSmall);
  for (int64_t i = 0; i < kSmall * kSmall; ++i) {
    for (int64_t c = 0; c < 3; ++c) {
      CHECK_EQ(image.pixels[6 * kFloats + c * kSmall * kSmall + i], normalised(whole[i * 3 + c]));
    }
  }
}

TEST(one_tile_has_no_global_tile) {
  const std::vector<uint8_t> source = noise(4, 8);
  const PreparedImage image = prepare_image(source.data(), 4, 8, 8);
  CHECK_EQ(image.tiles, 1);
  CHECK_EQ(image.rows * image.columns, 1);
  CHECK_EQ(image.pixels[0], normalised(source[0]));
  CHECK_EQ(image.pixels.back(), -1.0f);  // the lower half is padding
  CHECK_EQ(normalised(0), -1.0f);
  CHECK_EQ(normalised(255), 1.0f);
}

TEST(token_layout) {
  const ImageTokens ids{10, 11, 12, 13, 14, 15};
  CHECK_EQ(image_token_layout(1, 1, 144, ids).size(), size_t{147});
  CHECK_EQ(image_token_layout(2, 2, 144, ids).size(), size_t{727});
  CHECK_EQ(image_token_layout(4, 4, 144, ids).size(), size_t{2467});
  CHECK((image_token_layout(1, 1, 2, ids) == std::vector<int32_t>{10, 14, 15, 15, 11}));
  CHECK((image_token_layout(2, 3, 1, ids) ==
         std::vector<int32_t>{10, 15, 12, 15, 12, 15, 13, 15, 12, 15, 12, 15, 13, 14, 15, 11}));
  CHECK((image_token_layout(1, 2, 1, ids) == std::vector<int32_t>{10, 15, 12, 15, 13, 14, 15, 11}));
  CHECK((image_token_layout(2, 1, 1, ids) == std::vector<int32_t>{10, 15, 13, 15, 13, 14, 15, 11}));
}
