#include "backend/cuda/cuda_backend.h"

#include <algorithm>
#include <vector>

#include "backend/checks.h"
#include "backend/cuda/implementation.h"

namespace puna {

std::unique_ptr<Backend> make_cuda_backend(const cuda::DeviceTable& table, int ordinal,
                                           std::unique_ptr<HostBackend> host, size_t batch_kernels,
                                           std::shared_ptr<void> stream) {
  return std::make_unique<CudaBackend>(table, ordinal, std::move(host), batch_kernels,
                                       std::move(stream));
}

std::string CudaBackend::description() const {
  return "cuda:" + std::to_string(ordinal_) + " (" + device_->name() + ")";
}

// --- memory and weights --------------------------------------------------------------------------

Buffer CudaBackend::allocate(size_t bytes) {
  const std::shared_ptr<void> memory = device_->allocate(bytes);
  return Buffer(memory.get(), bytes, [memory](void*) {});
}

Buffer CudaBackend::allocate_shared(size_t bytes) {
  const std::shared_ptr<void> memory = device_->allocate_shared(bytes);
  return Buffer(memory.get(), bytes, [memory](void*) {});
}

Buffer CudaBackend::allocate_host(size_t bytes) {
  const std::shared_ptr<void> memory = device_->allocate_pinned(bytes);
  return Buffer(memory.get(), bytes, [memory](void*) {});
}

WeightRef CudaBackend::uploaded(const WeightRef& weight) {
  const std::shared_ptr<void> memory = device_->allocate(weight.bytes);
  device_->upload(memory.get(), weight.data.get(), weight.bytes);
  return {weight.format, weight.rows, weight.cols, weight.bytes, memory};
}

WeightRef CudaBackend::load_matrix(std::span<const MatrixSource> parts,
                                   const MatrixOptions& options) {
  return uploaded(host_->load_matrix(parts, options));
}

WeightRef CudaBackend::adopt_matrix(WeightFormat format, int64_t rows, int64_t cols,
                                    std::shared_ptr<const void> data) {
  return uploaded(host_->adopt_matrix(format, rows, cols, std::move(data)));
}

VectorRef CudaBackend::load_vector(std::span<const TensorRef> parts) {
  const VectorRef vector = host_->load_vector(parts);
  const size_t bytes = static_cast<size_t>(vector.size) * sizeof(float);
  const std::shared_ptr<void> memory = device_->allocate(bytes);
  device_->upload(memory.get(), vector.get(), bytes);
  return {vector.size, {memory, static_cast<const float*>(memory.get())}};
}

void CudaBackend::to_host(float* out, ConstRows x) {
  device_->download(out, x.data, static_cast<size_t>(x.cols) * sizeof(float),
                    static_cast<size_t>(x.stride) * sizeof(float), x.rows);
  device_->next_pass();
}

void CudaBackend::from_host(Rows out, const float* x) {
  const auto upload = [&](float* to, const float* from, int64_t count) {
    device_->upload(to, from, static_cast<size_t>(count) * sizeof(float));
  };
  if (out.stride == out.cols) {
    upload(out.data, x, out.rows * out.cols);
  } else {
    for (int64_t r = 0; r < out.rows; ++r) upload(out.row(r), x + r * out.cols, out.cols);
  }
}

// --- rows ----------------------------------------------------------------------------------------

void CudaBackend::embed(Rows out, const TensorRef& table, std::span<const int32_t> ids) {
  check_embed(out, table, ids);
  device_->next_pass();
  std::vector<float> rows(static_cast<size_t>(out.rows * out.cols));
  host_->embed({rows.data(), out.rows, out.cols}, table, ids);
  from_host(out, rows.data());
}

void CudaBackend::gather(Rows out, ConstRows x, std::span<const int32_t> index) {
  check_gather(out, x, index);
  device_->run("gather", &cuda::DeviceTable::move,
               cuda::MoveCall{device_rows(out), device_rows(x), nullptr, device_->table(index),
                              out.rows, out.cols});
}

void CudaBackend::scatter(Rows out, ConstRows x, std::span<const int32_t> index) {
  check_scatter(out, x, index);
  device_->run("scatter", &cuda::DeviceTable::move,
               cuda::MoveCall{device_rows(out), device_rows(x), device_->table(index), nullptr,
                              x.rows, x.cols});
}

void CudaBackend::rms_norm(Rows out, ConstRows x, const VectorRef& weight, float eps) {
  check_rms_norm(out, x, weight);
  cuda::NormCall call{
      device_rows(out), device_rows(x), weight.get(), nullptr, x.rows, x.cols, eps, {}, {}};
  // The sum of a layer's experts, if that has just been noted, goes on into the next layer's norm.
  const cuda::AddExpertsCall* const added = device_->last(&cuda::DeviceTable::add_experts);
  if (added != nullptr && added->residual.data == x.data && added->residual.stride == x.stride &&
      added->rows == x.rows && added->cols == x.cols) {
    call.added = *added;
    device_->drop_last();
  }
  device_->run("rms_norm", &cuda::DeviceTable::norm, call);
}

void CudaBackend::layer_norm(Rows out, ConstRows x, const VectorRef& weight, const VectorRef& bias,
                             float eps) {
  check_layer_norm(out, x, weight, bias);
  device_->run(
      "layer_norm", &cuda::DeviceTable::norm,
      cuda::NormCall{
          device_rows(out), device_rows(x), weight.get(), bias.get(), x.rows, x.cols, eps, {}, {}});
}

void CudaBackend::unfold(Rows out, const float* pixels, int64_t tiles, int64_t size,
                         int64_t patch) {
  check_unfold(out, pixels, tiles, size, patch);
  const int64_t count = tiles * 3 * size * size;
  auto* const on_device = pixels_.reserve<float>(*device_, count);
  if (count > 0) device_->upload(on_device, pixels, static_cast<size_t>(count) * sizeof(float));
  device_->run("unfold", &cuda::DeviceTable::unfold,
               cuda::UnfoldCall{device_rows(out), on_device, tiles, size, patch});
}

void CudaBackend::pixel_shuffle(Rows out, ConstRows x, int64_t tiles, int64_t grid,
                                int64_t factor) {
  check_pixel_shuffle(out, x, tiles, grid, factor);
  device_->run(
      "pixel_shuffle", &cuda::DeviceTable::pixel_shuffle,
      cuda::PixelShuffleCall{device_rows(out), device_rows(x), tiles, grid, factor, x.cols});
}

}  // namespace puna
