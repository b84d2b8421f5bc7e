// Memory and views of the backend interface: Buffer owns, everything else only looks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>

#include "base/dtype.h"
#include "quant/format.h"

namespace puna {

// The only owner of backend memory (host, pinned or device). Move-only, zeroed when handed out.
class Buffer {
 public:
  using Release = std::function<void(void*)>;

  Buffer() = default;
  Buffer(void* data, size_t bytes, Release release)
      : data_(data, std::move(release)), bytes_(bytes) {}

  void* data() const { return data_.get(); }
  float* floats() const { return static_cast<float*>(data_.get()); }
  size_t bytes() const { return bytes_; }

 private:
  std::unique_ptr<void, Release> data_{nullptr, [](void*) {}};
  size_t bytes_ = 0;
};

// fp32 activations, row-major: row r starts at data + r * stride. `Rows` is written, `ConstRows`
// read.
template <class T>
struct RowsOf {
  T* data = nullptr;
  int64_t rows = 0, cols = 0, stride = 0;

  RowsOf() = default;
  RowsOf(T* data, int64_t rows, int64_t cols) : data(data), rows(rows), cols(cols), stride(cols) {}
  RowsOf(T* data, int64_t rows, int64_t cols, int64_t stride)
      : data(data), rows(rows), cols(cols), stride(stride) {}
  operator RowsOf<const T>() const {
    return {data, rows, cols, stride};
  }  // NOLINT: implicit by design

  T* row(int64_t r) const { return data + r * stride; }
  RowsOf slice(int64_t first, int64_t count) const { return {row(first), count, cols, stride}; }
};
using Rows = RowsOf<float>;
using ConstRows = RowsOf<const float>;

// The factors of a float8 matrix's rows, of a float type; `rows_each` neighbours share one.
struct RowScales {
  DType dtype = DType::kF32;
  const void* data = nullptr;
  int64_t rows_each = 1;
};

// A matrix as it lies in a checkpoint: element (r, c) is at data + r * row_stride + c * col_stride
// (strides in elements), so a transposed or sliced tensor needs no copy. float32, float16 or
// bfloat16; float8 e4m3 with scales; or one of GGUF's blocked types, whose col_stride is 1.
struct MatrixSource {
  DType dtype = DType::kF32;
  const void* data = nullptr;
  int64_t rows = 0, cols = 0;
  int64_t row_stride = 0, col_stride = 1;
  RowScales scales = {};
};

// Packed weights of y = W x, W being rows x cols; opaque outside the backend that packed them.
// Copies share the data, which lives as long as any of them.
struct WeightRef {
  WeightFormat format = WeightFormat::kF32;
  int64_t rows = 0, cols = 0;
  size_t bytes = 0;
  std::shared_ptr<const void> data;
};

// A vector of fp32 in the backend's memory: norm weights and biases.
struct VectorRef {
  int64_t size = 0;
  std::shared_ptr<const float> data;

  const float* get() const { return data.get(); }
};

}  // namespace puna
