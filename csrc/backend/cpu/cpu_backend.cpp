#include "backend/cpu/cpu_backend.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "backend/checks.h"
#include "backend/cpu/implementation.h"
#include "backend/cpu/pack.h"
#include "base/error.h"
#include "kernels/cpu/dispatch.h"
#include "quant/blocks.h"

namespace puna {

static_assert(kKeyBlock == kKeyBlockTokens, "kernels and page layout agree on the key blocks");

std::unique_ptr<HostBackend> make_cpu_backend(const BackendOptions& options) {
  return std::make_unique<CpuBackend>(options);
}

BackendStatus cpu_status() {
  return {"cpu", true, std::string("instruction set ") + resolve_isa("").isa};
}

std::vector<IsaStatus> cpu_isas() {
  std::vector<IsaStatus> all;
  for (const KernelTable* table : compiled_isas()) {
    all.push_back({table->isa, table->supported()});
  }
  return all;
}

CpuBackend::CpuBackend(const BackendOptions& options)
    : kernels_(resolve_isa(options.isa)), pool_(options.threads) {}

std::string CpuBackend::description() const {
  return std::string("cpu (") + kernels_.isa + ", " + std::to_string(pool_.lanes()) +
         (pool_.lanes() == 1 ? " thread)" : " threads)");
}

void* CpuBackend::Scratch::reserve_bytes(size_t bytes) {
  if (bytes > memory_.size()) {
    memory_ = Memory();  // first, so that old and new do not add up
    memory_ = Memory(bytes);
  }
  return memory_.data();
}

// --- memory and weights
// ---------------------------------------------------------------------------

Buffer CpuBackend::allocate(size_t bytes) {
  auto memory = std::make_shared<Memory>(bytes);
  return Buffer(memory->data(), bytes, [memory](void*) {});
}

void CpuBackend::copy(void* to, const void* from, size_t bytes) {
  constexpr size_t kEach = 4096;
  const auto pages = static_cast<int64_t>((bytes + kEach - 1) / kEach);
  for_rows(pages, kEach / sizeof(float), [&](int64_t begin, int64_t end) {
    const size_t first = static_cast<size_t>(begin) * kEach;
    const size_t last = std::min(static_cast<size_t>(end) * kEach, bytes);
    std::memcpy(static_cast<char*>(to) + first, static_cast<const char*>(from) + first,
                last - first);
  });
}

WeightRef CpuBackend::load_matrix(std::span<const MatrixSource> parts,
                                  const MatrixOptions& options) {
  const MatrixShape shape = check_matrix_parts(parts, options);
  const WeightFormat format = target_format(shape, options);
  const size_t bytes = packed_bytes(format, shape.rows, shape.cols);
  auto memory = std::make_shared<Memory>(bytes);
  if (is_quantized(format))
    pack_quantized(pool_, parts, shape, format, options.importance, memory->data());
  else if (format == WeightFormat::kFP8)
    pack_fp8(pool_, parts, shape, memory->data());
  else
    pack_panels(pool_, parts, shape, format, memory->data());
  return {format, shape.rows, shape.cols, bytes,
          std::shared_ptr<const void>(memory, memory->data())};
}

WeightRef CpuBackend::adopt_matrix(WeightFormat format, int64_t rows, int64_t cols,
                                   std::shared_ptr<const void> data) {
  check_adopted(format, rows, cols, data.get());
  return {format, rows, cols, packed_bytes(format, rows, cols), std::move(data)};
}

VectorRef CpuBackend::load_vector(std::span<const TensorRef> parts) {
  const int64_t size = check_vector_parts(parts);
  auto memory = std::make_shared<Memory>(static_cast<size_t>(size) * sizeof(float));
  auto* out = static_cast<float*>(memory->data());
  for (const TensorRef& part : parts) {
    decode_elements(part.dtype, part.data, 0, part.elements(), out);
    out += part.elements();
  }
  return {size, std::shared_ptr<const float>(memory, static_cast<const float*>(memory->data()))};
}

void CpuBackend::to_host(float* out, ConstRows x) {
  for_rows(x.rows, x.cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) std::copy_n(x.row(r), x.cols, out + r * x.cols);
  });
}

void CpuBackend::from_host(Rows out, const float* x) {
  for_rows(out.rows, out.cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) std::copy_n(x + r * out.cols, out.cols, out.row(r));
  });
}

// --- rows
// -----------------------------------------------------------------------------------------

void CpuBackend::embed(Rows out, const TensorRef& table, std::span<const int32_t> ids) {
  check_embed(out, table, ids);
  const int64_t n = out.cols;
  for_rows(out.rows, n, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t first = ids[r] * n;
      if (table.dtype == DType::kBF16)
        kernels_.f32_from_bf16(out.row(r), static_cast<const uint16_t*>(table.data) + first, n);
      else
        decode_elements(table.dtype, table.data, first, n, out.row(r));
    }
  });
}

void CpuBackend::gather(Rows out, ConstRows x, std::span<const int32_t> index) {
  check_gather(out, x, index);
  for_rows(out.rows, out.cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) std::copy_n(x.row(index[r]), x.cols, out.row(r));
  });
}

void CpuBackend::scatter(Rows out, ConstRows x, std::span<const int32_t> index) {
  check_scatter(out, x, index);
  // In order, on one lane: of equal indices the last one wins.
  for (int64_t r = 0; r < x.rows; ++r) std::copy_n(x.row(r), x.cols, out.row(index[r]));
}

void CpuBackend::rms_norm(Rows out, ConstRows x, const VectorRef& weight, float eps) {
  check_rms_norm(out, x, weight);
  for_rows(x.rows, x.cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      kernels_.rms_norm(out.row(r), x.row(r), weight.get(), x.cols, eps);
  });
}

void CpuBackend::layer_norm(Rows out, ConstRows x, const VectorRef& weight, const VectorRef& bias,
                            float eps) {
  check_layer_norm(out, x, weight, bias);
  for_rows(x.rows, x.cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      kernels_.layer_norm(out.row(r), x.row(r), weight.get(), bias.get(), x.cols, eps);
  });
}

// --- vision layout
// --------------------------------------------------------------------------------

void CpuBackend::unfold(Rows out, const float* pixels, int64_t tiles, int64_t size, int64_t patch) {
  check_unfold(out, pixels, tiles, size, patch);
  const int64_t grid = size / patch;
  for_rows(out.rows, out.cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t tile = r / (grid * grid), y = r / grid % grid * patch, x = r % grid * patch;
      float* to = out.row(r);
      for (int64_t channel = 0; channel < 3; ++channel)
        for (int64_t line = 0; line < patch; ++line, to += patch)
          std::copy_n(pixels + ((tile * 3 + channel) * size + y + line) * size + x, patch, to);
    }
  });
}

void CpuBackend::pixel_shuffle(Rows out, ConstRows x, int64_t tiles, int64_t grid, int64_t factor) {
  check_pixel_shuffle(out, x, tiles, grid, factor);
  const int64_t small = grid / factor;
  for_rows(out.rows, out.cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t tile = r / (small * small);
      const int64_t y = r / small % small * factor, column = r % small * factor;
      float* to = out.row(r);
      for (int64_t dy = 0; dy < factor; ++dy)
        for (int64_t dx = 0; dx < factor; ++dx, to += x.cols)
          std::copy_n(x.row((tile * grid + y + dy) * grid + column + dx), x.cols, to);
    }
  });
}

}  // namespace puna
