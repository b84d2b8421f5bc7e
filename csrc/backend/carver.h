// Pieces of one block of scratch memory.
#pragma once

#include <cstdint>

namespace puna {

// Hands out consecutive arrays of a piece of memory, each at a multiple of `alignment` bytes; from
// a null pointer it only adds up their size.
class Carver {
 public:
  static constexpr int64_t kCacheLine = 64, kDeviceAlignment = 256;

  explicit Carver(char* memory, int64_t alignment = kCacheLine)
      : memory_(memory), alignment_(alignment) {}

  template <class T>
  T* take(int64_t count) {
    T* array = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + alignment_ - 1) / alignment_ * alignment_;
    return array;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t alignment_, used_ = 0;
};

}  // namespace puna
