// Where an encoder puts its ids: memory that grows without being cleared, or nothing but a count.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <span>

namespace puna {

class IdBuffer {
 public:
  enum Mode { kKeep, kCount };

  // `expected`: how many ids will come, about.
  explicit IdBuffer(Mode mode = kKeep, size_t expected = 0) : mode_(mode) { grow(expected); }

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
  // Gives the memory up; it is to be freed by free().
  int32_t* release() {
    size_ = capacity_ = 0;
    return ids_.release();
  }

 private:
  struct Free {
    void operator()(int32_t* ids) const { std::free(ids); }
  };

  void grow(size_t least) {
    const size_t capacity = std::max<size_t>({least, capacity_ + capacity_ / 2, 64});
    void* moved = std::realloc(ids_.get(), capacity * sizeof(int32_t));
    if (!moved) throw std::bad_alloc();
    static_cast<void>(ids_.release());
    ids_.reset(static_cast<int32_t*>(moved));
    capacity_ = capacity;
  }

  Mode mode_;
  std::unique_ptr<int32_t, Free> ids_;
  size_t size_ = 0, capacity_ = 0;
};

}  // namespace puna
