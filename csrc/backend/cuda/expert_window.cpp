#include "backend/cuda/expert_window.h"

#include <algorithm>
#include <cmath>

namespace puna {

int64_t rows_worth_sending(const ExpertRates& rates, double bytes, double multiply_adds,
                           int threads) {
  const double copies = std::min(rates.link, threads * rates.host_copy);
  const double row = 2 * multiply_adds / (threads * rates.host_products);  // seconds
  return static_cast<int64_t>(std::ceil(bytes / copies / row));
}

void ExpertWindow::reserve(CudaDevice& device, std::span<const WeightRef> matrices) {
  if (left_[0] == nullptr)
    for (CudaDevice::Event& left : left_) left = device.make_event();
  size_t bytes = 0;
  for (const WeightRef& matrix : matrices) bytes = std::max(bytes, matrix.bytes);
  if (bytes <= place_bytes_) return;
  place_bytes_ = bytes;
  begin_ = memory_.reserve<char>(device, static_cast<int64_t>(bytes * SentPlaces::kCount));
  places_.begin(device);
}

void ExpertWindow::send(CudaDevice& device, Backend& host, char* to, const WeightRef& matrix) {
  const auto* const from = static_cast<const char*>(matrix.data.get());
  char* const staged = staged_.reserve<char>(device, kPieces * kPieceBytes);
  for (size_t at = 0; at < matrix.bytes; at += kPieceBytes) {
    const size_t bytes = std::min(matrix.bytes - at, kPieceBytes);
    char* const piece = staged + piece_ * kPieceBytes;
    device.await(left_[piece_]);
    host.copy(piece, from + at, bytes);
    device.send(to + at, piece, bytes);
    device.record(left_[piece_], cuda::kSendQueue);
    piece_ = (piece_ + 1) % kPieces;
  }
}

void ExpertWindow::each(CudaDevice& device, Backend& host, std::span<const WeightRef> matrices,
                        const std::function<void(size_t i, const void* place)>& use) {
  reserve(device, matrices);
  device.start();  // while the first one is on its way
  for (size_t i = 0; i < matrices.size(); ++i) {
    char* const at = begin_ + place_ * place_bytes_;
    places_.turn(device, place_, [&] { send(device, host, at, matrices[i]); }, [&] { use(i, at); });
    place_ = (place_ + 1) % SentPlaces::kCount;
  }
}

}  // namespace puna
