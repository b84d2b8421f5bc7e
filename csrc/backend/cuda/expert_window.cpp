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
  if (left_[0] == nullptr) {
    for (Place& place : places_) place = {device.make_event(), device.make_event()};
    for (CudaDevice::Event& left : left_) left = device.make_event();
  }
  size_t bytes = 0;
  for (const WeightRef& matrix : matrices) bytes = std::max(bytes, matrix.bytes);
  if (bytes <= place_bytes_) return;
  place_bytes_ = bytes;
  begin_ = memory_.reserve<char>(device, static_cast<int64_t>(bytes * kPlaces));
  // The memory is there in the order of the kernels, not in that of what is sent.
  for (const Place& place : places_) device.record(place.read, cuda::kMainQueue);
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
    const Place& place = places_[place_];
    char* const at = begin_ + place_ * place_bytes_;
    place_ = (place_ + 1) % kPlaces;
    device.wait_for(place.read, cuda::kSendQueue);
    send(device, host, at, matrices[i]);
    device.record(place.sent, cuda::kSendQueue);
    device.wait_for(place.sent, cuda::kMainQueue);
    use(i, at);
    device.record(place.read, cuda::kMainQueue);  // starts them, so that they run beside the next
  }
}

}  // namespace puna
