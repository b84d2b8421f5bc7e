// Large, zeroed, page-aligned memory for weights and caches, in huge pages where the system has
// them.
#pragma once

#include <cstddef>

namespace puna {

class Memory {
 public:
  Memory() = default;
  // Throws OutOfMemory with the bytes asked for and free.
  explicit Memory(size_t bytes);
  ~Memory();
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;

  void* data() const { return data_; }
  size_t size() const { return size_; }  // at least the bytes asked for

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace puna
