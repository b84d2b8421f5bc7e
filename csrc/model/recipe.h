// Which format each matrix of a model is packed in.
//
// Matrices are named by what they compute, whatever the checkpoint calls its tensors:
//   layers.N.attention.qkv   layers.N.attention.output
//   layers.N.router          layers.N.shared_expert.{gate_up,down}
//   layers.N.experts.E.{gate_up,down} layers.N.mlp.{gate_up,down} (dense layers) lm_head vision.*
// Routers are always fp32, and the vision model stays as stored.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "quant/format.h"

namespace puna {

class QuantRecipe {
 public:
  // As stored.
  QuantRecipe() = default;
  // `quant`: "" (as stored), "int4" or "int8", or the name of a format for all text matrices.
  // `overrides`: (pattern, format or "stored") for matrices whose name matches, `*` standing for
  // any characters; of several the last one counts. Throws InvalidRequest naming the choices, or
  // Unsupported for formats that weights cannot be quantised to.
  QuantRecipe(const std::string& quant,
              const std::vector<std::pair<std::string, std::string>>& overrides);

  // The format of a matrix; none: as stored.
  std::optional<WeightFormat> format_of(std::string_view matrix) const;
  bool as_stored() const { return rules_.empty(); }
  // Throws InvalidRequest if the pattern of an override matches none of a model's matrices, or only
  // such as are never quantised.
  void require_matches(const std::vector<std::string>& matrices) const;

 private:
  struct Rule {
    std::string pattern;
    std::optional<WeightFormat> format;
  };
  std::vector<Rule> rules_;  // later ones go before earlier ones
  size_t overrides_ = 0;     // the last ones
};

}  // namespace puna
