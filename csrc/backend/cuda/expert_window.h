// Matrices of experts that lie in the host's memory and are multiplied by the device, as many rows
// of a prompt make it worth while: they come through a window of two places of the device's memory,
// each while kernels read the one before.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <span>

#include "backend/backend.h"
#include "backend/cuda/device.h"
#include "backend/cuda/sent_places.h"

namespace puna {

// What decides who computes a layer's experts: rates of the machine, in bytes and operations a
// second. Those of the host are of one thread.
struct ExpertRates {
  // Of PCIe 5 x16, whose 63 GB/s copies get some 55 of; assumed.
  double link = 50e9;
  // Weights that are read once and written to memory that the caches hold; assumed, of the 14 GB/s
  // at which a thread reads memory where bench/results were measured.
  double host_copy = 8e9;
  // Products of many rows with weights of 4 bits: 300 tokens a second of four layers of Scout by
  // two threads (README: prefill 512), 2.5e9 operations each; measured.
  double host_products = 0.38e12;
};

// From so many rows on it is quicker to send all of a layer's experts to the device, whose products
// are then done before the next matrix has come, than to compute the rows on `threads` threads of
// the host: so many rows take the host as long as the copies. (That the host reads its weights,
// too, does not count: it does so faster than it could copy them.) `bytes` are those of all
// experts, `multiply_adds` those of a row at its experts.
int64_t rows_worth_sending(const ExpertRates& rates, double bytes, double multiply_adds,
                           int threads);

class ExpertWindow {
 public:
  // Copies to the host's pinned memory are cut into pieces, so few and small that these stay in its
  // caches until the device has read them.
  static constexpr size_t kPieceBytes = size_t{4} << 20,
                          kPieces = MoeWeights::kStagedBytes / kPieceBytes;

  // use(i, place): notes kernels that read matrices[i], which is at that place of the device's
  // memory. In the order of the matrices, of the memory of `host`.
  void each(CudaDevice& device, Backend& host, std::span<const WeightRef> matrices,
            const std::function<void(size_t i, const void* place)>& use);

 private:
  static_assert(SentPlaces::kCount == MoeWeights::kSentMatrices);

  void reserve(CudaDevice& device, std::span<const WeightRef> matrices);
  void send(CudaDevice& device, Backend& host, char* to, const WeightRef& matrix);

  CudaScratch memory_;
  char* begin_ = nullptr;
  size_t place_bytes_ = 0;
  SentPlaces places_;
  size_t place_ = 0;  // the next one

  CudaPinnedScratch staged_;
  std::array<CudaDevice::Event, kPieces> left_;  // the device has read it
  size_t piece_ = 0;                             // the next one
};

}  // namespace puna
