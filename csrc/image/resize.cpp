#include "image/resize.h"

#include <algorithm>
#include <cmath>

namespace puna {

namespace {

// Weights are fixed-point numbers of 22 bits: with 8 bits of pixel, and 2 of headroom, they
// fill 32.
constexpr int kPrecision = 22;
constexpr int32_t kHalf = 1 << (kPrecision - 1);

// Which source pixels make one target pixel, and with which weights.
struct Window {
  int64_t first = 0;
  std::vector<int32_t> weights;
};

// The windows of all target pixels along one side. Their shape is a triangle that reaches one
// source pixel to either side or, when the picture shrinks, one target pixel.
std::vector<Window> triangle_windows(int64_t size, int64_t new_size) {
  const double scale = static_cast<double>(size) / static_cast<double>(new_size);
  const double support = std::max(scale, 1.0);
  std::vector<Window> windows(static_cast<size_t>(new_size));
  std::vector<double> weights;
  for (int64_t x = 0; x < new_size; ++x) {
    const double centre = (static_cast<double>(x) + 0.5) * scale;
    const int64_t first = std::max<int64_t>(0, static_cast<int64_t>(centre - support + 0.5));
    const int64_t last = std::min(size, static_cast<int64_t>(centre + support + 0.5));
    weights.clear();
    double total = 0;
    for (int64_t i = first; i < last; ++i) {
      const double distance = std::abs((static_cast<double>(i) - centre + 0.5) * (1.0 / support));
      weights.push_back(std::max(0.0, 1.0 - distance));
      total += weights.back();
    }
    windows[x].first = first;
    windows[x].weights.reserve(weights.size());
    for (const double weight : weights) {
      windows[x].weights.push_back(static_cast<int32_t>(0.5 + weight / total * (1 << kPrecision)));
    }
  }
  return windows;
}

uint8_t to_level(int32_t sum) {
  return static_cast<uint8_t>(std::clamp(sum >> kPrecision, 0, 255));
}

// [rows][width][3] -> [rows][new_width][3]
std::vector<uint8_t> resize_rows(const uint8_t* rgb, int64_t rows, int64_t width,
                                 int64_t new_width) {
  const std::vector<Window> windows = triangle_windows(width, new_width);
  std::vector<uint8_t> result(static_cast<size_t>(rows * new_width * 3));
  uint8_t* out = result.data();
  for (int64_t y = 0; y < rows; ++y) {
    for (const Window& window : windows) {
      const uint8_t* pixel = rgb + (y * width + window.first) * 3;
      int32_t red = kHalf, green = kHalf, blue = kHalf;
      for (const int32_t weight : window.weights) {
        red += pixel[0] * weight;
        green += pixel[1] * weight;
        blue += pixel[2] * weight;
        pixel += 3;
      }
      *out++ = to_level(red);
      *out++ = to_level(green);
      *out++ = to_level(blue);
    }
  }
  return result;
}

// [height][row_bytes] -> [new_height][row_bytes]
std::vector<uint8_t> resize_columns(const std::vector<uint8_t>& bytes, int64_t height,
                                    int64_t row_bytes, int64_t new_height) {
  const std::vector<Window> windows = triangle_windows(height, new_height);
  std::vector<uint8_t> result(static_cast<size_t>(new_height * row_bytes));
  std::vector<int32_t> sums(static_cast<size_t>(row_bytes));
  uint8_t* out = result.data();
  for (const Window& window : windows) {
    std::fill(sums.begin(), sums.end(), kHalf);
    const uint8_t* source = bytes.data() + window.first * row_bytes;
    for (const int32_t weight : window.weights) {
      for (int64_t i = 0; i < row_bytes; ++i) sums[i] += source[i] * weight;
      source += row_bytes;
    }
    for (int64_t i = 0; i < row_bytes; ++i) *out++ = to_level(sums[i]);
  }
  return result;
}

}  // namespace

std::vector<uint8_t> resize_rgb(const uint8_t* rgb, int64_t height, int64_t width,
                                int64_t new_height, int64_t new_width) {
  // Along the rows first, with 8-bit pixels in between. A side that keeps its size is left alone.
  std::vector<uint8_t> across = new_width == width
                                    ? std::vector<uint8_t>(rgb, rgb + height * width * 3)
                                    : resize_rows(rgb, height, width, new_width);
  if (new_height == height) return across;
  return resize_columns(across, height, new_width * 3, new_height);
}

}  // namespace puna
