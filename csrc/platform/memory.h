// Large, zeroed, page-aligned memory for weights and caches, in huge pages where the system has
// them.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

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

  // Gives whole pages of it back to the system: what they held is lost, and they take no memory
  // until they are written again.
  void give_back(void* start, size_t bytes);

  // Gives the memory up, and takes memory that was given up after it was asked for with `bytes`.
  void* release() { return std::exchange(data_, nullptr); }
  static Memory adopted(void* data, size_t bytes);

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// For large tables that are looked up at random, where each page of 4 KiB would have to be found
// first.
template <class T>
struct HugePageAllocator {
  using value_type = T;

  HugePageAllocator() = default;
  template <class U>
  HugePageAllocator(const HugePageAllocator<U>&) {}
  template <class U>
  bool operator==(const HugePageAllocator<U>&) const {
    return true;
  }

  T* allocate(size_t count) { return static_cast<T*>(Memory(count * sizeof(T)).release()); }
  void deallocate(T* data, size_t count) { Memory::adopted(data, count * sizeof(T)); }
};
template <class T>
using Table = std::vector<T, HugePageAllocator<T>>;

}  // namespace puna
