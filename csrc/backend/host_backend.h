// What a backend with memory of its own needs of one whose memory is the host's: that packs weights
// and decodes embeddings, and computes the experts that the other's memory does not hold.
#pragma once

#include <span>

#include "backend/backend.h"
#include "backend/routing.h"

namespace puna {

class HostBackend : public Backend {
 public:
  // out[slot] = expert(score[slot] * x[row[slot]]) of each slot (routing.h) by its expert, whose
  // matrices are those of MoeWeights: what moe() would add to the rows.
  virtual void experts(Rows out, ConstRows x, const Routing& routing,
                       std::span<const WeightRef> gate_up, std::span<const WeightRef> down) = 0;
  // That share the work of experts() and of large copies.
  virtual int threads() const = 0;
  // Whether experts() with quantised weights has the bits of a device (kernel_table.h). Else who
  // computes them must not depend on the other rows of a call.
  virtual bool has_bits_of_devices() const = 0;
};

}  // namespace puna
