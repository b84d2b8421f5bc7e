// A backend that watches what goes into matrices: which input channels are large, over all rows.
#pragma once

#include <map>
#include <vector>

#include "backend/forwarding_backend.h"
#include "backend/routing.h"

namespace puna {

// What one matrix has seen.
struct InputRecord {
  std::vector<double> squares;  // [cols], summed over rows
  int64_t rows = 0;
};

// Passes everything on to a backend whose memory is the host's, and takes feed-forwards and
// mixtures of experts apart to see what reaches their inner matrices. Results are those of the
// backend but for the order in which experts are added.
class RecordingBackend : public ForwardingBackend {
 public:
  using ForwardingBackend::ForwardingBackend;

  // By the matrix's data. An expert's matrices see the rows that were sent to it.
  const std::map<const void*, InputRecord>& records() const { return records_; }

  void matmul(Rows out, ConstRows x, const WeightRef& weight,
              const MatmulOptions& options) override;
  void mlp(Rows residual, ConstRows x, const WeightRef& gate_up, const WeightRef& down) override;
  void moe(Rows residual, ConstRows x, const MoeWeights& weights) override;

 private:
  void record(const WeightRef& weight, ConstRows x);

  Routing routing_;
  std::map<const void*, InputRecord> records_;
};

}  // namespace puna
