// Two places of a device's memory: one is sent to while kernels read what came to the other.
#pragma once

#include <array>
#include <cstddef>

#include "backend/cuda/device.h"

namespace puna {

class SentPlaces {
 public:
  static constexpr size_t kCount = 2;

  // Before their first turn and after their memory was given to something else: what the kernels
  // noted so far do to it, and to what will be sent, comes before.
  void begin(CudaDevice& device) {
    for (Place& place : places_) {
      if (place.sent == nullptr) place = {device.make_event(), device.make_event()};
      device.record(place.read, cuda::kMainQueue);
    }
  }
  // send() asks for copies to the place, and use() notes kernels that read it: the copies wait for
  // what read the place before, the kernels for the copies.
  template <class Send, class Use>
  void turn(CudaDevice& device, size_t place, const Send& send, const Use& use) {
    const auto& [sent, read] = places_[place];
    device.wait_for(read, cuda::kSendQueue);
    send();
    device.record(sent, cuda::kSendQueue);
    device.wait_for(sent, cuda::kMainQueue);
    use();
    device.record(read, cuda::kMainQueue);  // starts them, so that they run beside the next copies
  }
  // The host waits until the copies of the place's last turn are done.
  void await(CudaDevice& device, size_t place) { device.await(places_[place].sent); }

 private:
  struct Place {
    CudaDevice::Event sent;  // what was asked for has come
    CudaDevice::Event read;  // and is not needed any more
  };
  std::array<Place, kCount> places_;
};

}  // namespace puna
