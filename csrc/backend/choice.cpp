// What backends whose memory is the host's do where others save the way of whole rows to the host.
#include "backend/backend.h"
#include "backend/checks.h"
#include "base/argmax.h"

namespace puna {

void Backend::argmax(std::span<int32_t> out, ConstRows x) {
  check_argmax(out, x);
  for (int64_t r = 0; r < x.rows; ++r)
    out[static_cast<size_t>(r)] = puna::argmax({x.row(r), static_cast<size_t>(x.cols)});
}

std::vector<Candidates> Backend::candidates(ConstRows x, std::span<const double> temperatures) {
  check_candidates(x, temperatures);
  return {};
}

}  // namespace puna
