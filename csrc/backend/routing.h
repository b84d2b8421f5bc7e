// Which rows of a batch go to which experts.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace puna {

// A slot is one row at one expert. Slots are ordered by expert, then by row, so that an expert's
// rows are consecutive.
struct Routing {
  std::vector<int64_t> row;       // [slots]
  std::vector<float> score;       // [slots]: sigmoid of the logit, factor of the expert's input
  std::vector<int64_t> offset;    // [experts + 1]: first slot of each expert
  std::vector<int64_t> occupied;  // experts that have slots, ascending

  // Room for a batch, so that assign() allocates nothing.
  void reserve(int64_t rows, int64_t experts, int64_t top_k);
  // The top_k largest logits of each row, the lower index first among equals; a NaN counts as the
  // smallest. logits [rows][experts].
  void assign(const float* logits, int64_t rows, int64_t experts, int64_t top_k);
  // As it was assigned elsewhere: rows and scores by slot, first slots by expert.
  void adopt(std::span<const int32_t> rows, std::span<const float> scores,
             std::span<const int32_t> offsets);

 private:
  std::vector<int64_t> chosen_;  // [rows][top_k]
  std::vector<int64_t> next_;    // [experts]
};

}  // namespace puna
