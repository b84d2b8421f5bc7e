// A backend that passes everything on and, when asked, notes which experts the rows choose.
#pragma once

#include <set>
#include <utility>
#include <vector>

#include "backend/forwarding_backend.h"
#include "backend/routing.h"

namespace puna::bench {

class RoutingProbe final : public ForwardingBackend {
 public:
  using ForwardingBackend::ForwardingBackend;

  // From now on, or no longer. Noting costs a second product with the router.
  void watch(bool on) { watching_ = on; }
  // (MoE layer in the order of first use, expert) pairs seen.
  int64_t experts_seen() const { return static_cast<int64_t>(seen_.size()); }

  void moe(Rows residual, ConstRows x, const MoeWeights& weights) override {
    if (watching_) note(x, weights);
    backend_.moe(residual, x, weights);
  }

 private:
  void note(ConstRows x, const MoeWeights& weights) {
    const int64_t experts = weights.router.rows;
    const Buffer buffer = backend_.allocate(static_cast<size_t>(x.rows * experts) * sizeof(float));
    const Rows logits(buffer.floats(), x.rows, experts);
    backend_.matmul(logits, x, weights.router, {});
    std::vector<float> host(static_cast<size_t>(x.rows * experts));
    backend_.to_host(host.data(), logits);
    routing_.reserve(x.rows, experts, weights.top_k);
    routing_.assign(host.data(), x.rows, experts, weights.top_k);
    for (const int64_t expert : routing_.occupied) seen_.insert({&weights, expert});
  }

  bool watching_ = false;
  Routing routing_;
  std::set<std::pair<const MoeWeights*, int64_t>> seen_;
};

}  // namespace puna::bench
