// One medium that holds KV pages, within a budget of bytes. A tier knows nothing of sequences or
// layers.
#pragma once

#include <cstddef>
#include <cstdint>

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
  // Whether the host may read and write its pages, as what is saved to files must be.
  virtual bool host_memory() const { return true; }
  // A zeroed page, or null if the budget, or the system, has none left. Pages come in a few sizes,
  // each a multiple of kPageAlignment. Large ones are in huge pages where the system has them:
  // direct I/O into small ones, each a piece of its own to the disk, runs at 40% of the speed.
  virtual void* allocate(size_t bytes) = 0;
  virtual void free(void* page, size_t bytes) = 0;
  // One page's contents to another page, both of this tier.
  virtual void copy(void* to, const void* from, size_t bytes) = 0;
  virtual int64_t bytes_in_use() const = 0;
  // Bytes that can still be allocated; the largest int64 if nothing but the system sets a bound.
  virtual int64_t bytes_left() const = 0;
};

}  // namespace puna
