// One medium that holds KV pages, within a budget of bytes. A tier knows nothing of sequences or
// layers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace puna {

// Pages begin at multiples of this, and their sizes are: they go to and from files by direct I/O.
constexpr size_t kPageAlignment = 4096;
constexpr size_t whole_blocks(size_t bytes) {
  return (bytes + kPageAlignment - 1) / kPageAlignment * kPageAlignment;
}

class KvTier {
 public:
  virtual ~KvTier() = default;
  virtual const char* name() const = 0;
  // Whether the host may read and write its pages where they are. What is saved to files, or read
  // from them, is copied otherwise.
  virtual bool host_memory() const { return true; }
  // A zeroed page, or null if the budget, or the system, has none left. Pages come in a few sizes,
  // each a multiple of kPageAlignment. Large ones are in huge pages where the system has them:
  // direct I/O into small ones, each a piece of its own to the disk, runs at 40% of the speed.
  virtual void* allocate(size_t bytes) = 0;
  virtual void free(void* page, size_t bytes) = 0;
  // One page's contents to another page, both of this tier; or one of them of a tier of the same
  // backend, where the host sees it after settle().
  virtual void copy(void* to, const void* from, size_t bytes) = 0;
  // To any memory of the host, done when it returns; and from there, where what lies in a tier must
  // stay as it is until settle().
  virtual void to_host(void* to, const void* page, size_t bytes) { std::memcpy(to, page, bytes); }
  virtual void from_host(void* page, const void* from, size_t bytes) {
    std::memcpy(page, from, bytes);
  }
  // Waits until nothing is on its way to pages or from them.
  virtual void settle() {}
  virtual int64_t bytes_in_use() const = 0;
  // Bytes that can still be allocated; the largest int64 if nothing but the system sets a bound.
  virtual int64_t bytes_left() const = 0;
};

}  // namespace puna
