// A view of a dense tensor. It never owns memory: whoever hands it out says what keeps it alive.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "base/dtype.h"

namespace puna {

struct TensorRef {
  static constexpr int kMaxRank = 4;

  DType dtype = DType::kF32;
  int rank = 0;
  std::array<int64_t, kMaxRank> shape{};  // row-major, contiguous; shape[0] is the outermost
  const void* data = nullptr;

  int64_t elements() const {
    int64_t count = 1;
    for (int i = 0; i < rank; ++i) count *= shape[i];
    return count;
  }
  size_t bytes() const { return bytes_of(dtype, elements()); }
  std::string shape_string() const {
    std::string text = "(";
    for (int i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + ")";
  }
};

}  // namespace puna
