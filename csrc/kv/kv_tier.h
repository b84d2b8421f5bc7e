// One medium that holds KV pages. A tier knows nothing of sequences or layers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace puna {

class KvTier {
 public:
  virtual ~KvTier() = default;
  virtual const char* name() const = 0;
  // A zeroed page of the size given at construction, or null if the tier's budget is spent.
  virtual void* allocate() = 0;
  virtual void free(void* page) = 0;
  // One page's contents to another page, both of this tier.
  virtual void copy(void* to, const void* from) = 0;
  virtual size_t page_bytes() const = 0;
  virtual int64_t pages_in_use() const = 0;
  // Pages that can still be allocated; the largest int64 if nothing but the system sets a bound.
  virtual int64_t pages_left() const = 0;
};

}  // namespace puna
