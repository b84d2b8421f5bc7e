// A backend that packs one matrix of each shape and format, and copies it within the backend's
// memory for all others of that kind: packing a hundred billion weights would take the host
// minutes, and reading them takes a device as long whatever they are.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <span>
#include <tuple>
#include <utility>

#include "backend/forwarding_backend.h"

namespace puna::bench {

class CloningBackend final : public ForwardingBackend {
 public:
  explicit CloningBackend(Backend& backend)
      : ForwardingBackend(backend),
        host_(&backend.host() == &backend ? nullptr
                                          : std::make_unique<CloningBackend>(backend.host())) {}

  Backend& host() override { return host_ == nullptr ? *this : *host_; }
  WeightRef load_matrix(std::span<const MatrixSource> parts,
                        const MatrixOptions& options) override {
    int64_t rows = 0;
    for (const MatrixSource& part : parts) rows += part.rows;
    // Routers stay as they are: each layer chooses for itself.
    constexpr int64_t kFewRows = 1024;
    if (rows <= kFewRows) return backend_.load_matrix(parts, options);
    WeightRef& first = made_[{rows, parts.front().cols, options.format}];
    if (first.data == nullptr) return first = backend_.load_matrix(parts, options);
    const auto memory = std::make_shared<Buffer>(backend_.allocate(first.bytes));
    backend_.copy(memory->data(), first.data.get(), first.bytes);
    WeightRef clone = first;
    clone.data = {memory, memory->data()};
    return clone;
  }

 private:
  std::unique_ptr<CloningBackend> host_;
  std::map<std::tuple<int64_t, int64_t, std::optional<WeightFormat>>, WeightRef> made_;
};

}  // namespace puna::bench
