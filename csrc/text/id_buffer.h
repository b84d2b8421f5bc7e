// Where an encoder puts its ids: memory that grows without being cleared, or nothing but a count.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <span>
#include <utility>

#include "platform/memory.h"

namespace puna {

class IdBuffer {
 public:
  enum Mode { kKeep, kCount };

  // `expected`: how many ids will come at most, about; memory is used only as they come.
  explicit IdBuffer(Mode mode = kKeep, size_t expected = 0) : mode_(mode) {
    if (expected > 0) grow(expected);
  }

  // Room for `count` ids behind the last. Then set_end() says how many were written.
  int32_t* room(size_t count) {
    const size_t used = mode_ == kKeep ? size_ : 0;
    if (capacity_ - used < count) grow(used + count);
    return ids_.get() + used;
  }
  void set_end(const int32_t* end) {
    const auto position = static_cast<size_t>(end - ids_.get());
    size_ = mode_ == kKeep ? position : size_ + position;
  }
  void add(int32_t id) {
    int32_t* end = room(1);
    *end = id;
    set_end(end + 1);
  }
  void add(std::span<const int32_t> ids) {
    int32_t* end = room(ids.size());
    set_end(std::copy(ids.begin(), ids.end(), end));
  }

  size_t size() const { return size_; }
  std::span<const int32_t> ids() const { return {ids_.get(), mode_ == kKeep ? size_ : 0}; }
  // Memory of ids: of the system's in huge pages if it is much (`mapped` bytes), else of malloc().
  struct Free {
    Free() : mapped(0) {}
    explicit Free(size_t bytes) : mapped(bytes) {}
    size_t mapped;
    void operator()(int32_t* ids) const {
      if (mapped == 0) {
        std::free(ids);
      } else {
        Memory::adopted(ids, mapped);
      }
    }
  };
  using Owner = std::unique_ptr<int32_t, Free>;
  // Gives the memory up.
  Owner release() {
    size_ = capacity_ = 0;
    return std::move(ids_);
  }

 private:
  // From here on a page of the system is a huge one: with pages of 4 KiB, the first touch of each
  // takes as long as the encoding of a hundred bytes.
  static constexpr size_t kMapped = size_t{2} << 20;

  void grow(size_t least) {
    const size_t capacity = std::max<size_t>({least, capacity_ + capacity_ / 2, 64});
    const size_t bytes = capacity * sizeof(int32_t);
    if (bytes >= kMapped) {
      Memory memory(bytes);
      std::copy_n(ids_.get(), mode_ == kKeep ? size_ : 0, static_cast<int32_t*>(memory.data()));
      ids_ = Owner(static_cast<int32_t*>(memory.release()), Free(bytes));
    } else {
      void* moved = std::realloc(ids_.get(), bytes);
      if (!moved) throw std::bad_alloc();
      static_cast<void>(ids_.release());
      ids_ = Owner(static_cast<int32_t*>(moved), Free());
    }
    capacity_ = capacity;
  }

  Mode mode_;
  Owner ids_;
  size_t size_ = 0, capacity_ = 0;
};

}  // namespace puna
