// What tokens are chosen by: instead of rows of logits, their largest elements go to the host.
#include <cmath>
#include <vector>

#include "backend/checks.h"
#include "backend/cuda/implementation.h"

namespace puna {

// The columns on the device, until the next choice.
const int32_t* CudaBackend::find_largest(ConstRows x) {
  const int64_t parts = x.rows * cuda::choice_blocks(x.cols);
  auto* const out = largest_.reserve<int32_t>(*device_, x.rows);
  device_->run("argmax", &cuda::DeviceTable::argmax,
               cuda::ArgmaxCall{device_rows(x), x.rows, x.cols,
                                choice_parts_.reserve<uint64_t>(*device_, parts),
                                arrived_choices_.reserve<int32_t>(*device_, x.rows), out});
  return out;
}

void CudaBackend::argmax(std::span<int32_t> out, ConstRows x) {
  check_argmax(out, x);
  const int32_t* const largest = find_largest(x);
  device_->download(out.data(), largest, sizeof(int32_t), sizeof(int32_t), x.rows);
}

std::vector<Candidates> CudaBackend::candidates(ConstRows x, std::span<const double> temperatures) {
  check_candidates(x, temperatures);
  const int32_t* const largest = find_largest(x);
  auto* const out = candidates_.reserve<cuda::RowCandidates>(*device_, x.rows);
  // Parts and who arrived are those of find_largest(), whose kernel has ended.
  device_->run("candidates", &cuda::DeviceTable::candidates,
               cuda::CandidatesCall{
                   device_rows(x), x.rows, x.cols, largest, device_->table(temperatures),
                   choice_parts_.reserve<double>(*device_, x.rows * cuda::choice_blocks(x.cols)),
                   candidate_counts_.reserve<int32_t>(*device_, x.rows * cuda::kCandidateBins),
                   arrived_choices_.reserve<int32_t>(*device_, x.rows),
                   candidate_bins_.reserve<int32_t>(*device_, x.rows), out});
  std::vector<cuda::RowCandidates> rows(static_cast<size_t>(x.rows));
  device_->download(rows.data(), out, sizeof(rows[0]), sizeof(rows[0]), x.rows);
  // Each term is within a few units in its last place, here and on the device, and a sum in any
  // order adds at most a rounding for each term.
  const double error = 4 * static_cast<double>(x.cols + 8) * 0x1p-53;
  std::vector<Candidates> all(rows.size());
  for (size_t r = 0; r < rows.size(); ++r) {
    if (temperatures[r] == 0 || !std::isfinite(rows[r].total)) continue;
    all[r].total = rows[r].total;
    all[r].error = error;
    all[r].largest.assign(rows[r].at, rows[r].at + rows[r].count);
  }
  return all;
}

}  // namespace puna
