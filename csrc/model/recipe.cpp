#include "model/recipe.h"

#include <algorithm>

#include "base/error.h"
#include "io/message.h"
#include "quant/encode.h"

namespace puna {
namespace {

bool matches(std::string_view pattern, std::string_view name) {
  // The classic two-pointer match: on a mismatch, the last star takes one character more.
  size_t p = 0, n = 0, star = std::string_view::npos, resume = 0;
  while (n < name.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      resume = n;
    } else if (p < pattern.size() && pattern[p] == name[n]) {
      ++p;
      ++n;
    } else if (star != std::string_view::npos) {
      p = star + 1;
      n = ++resume;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*') ++p;
  return p == pattern.size();
}

WeightFormat encodable(const std::string& name) {
  const std::optional<WeightFormat> format = format_of(name);
  if (format && can_encode(*format)) return *format;
  std::string choices;
  for (const WeightFormat known : all_formats())
    if (can_encode(known)) choices += (choices.empty() ? "" : ", ") + std::string(name_of(known));
  if (format)
    fail(ErrorCode::kUnsupported, "[quant] weights cannot be quantised to '", name,
         "'; they can to ", choices);
  fail(ErrorCode::kInvalidRequest, "[quant] there is no weight format '", name,
       "'; there are the recipes int4 and int8, and the formats ", choices);
}

bool is_router(std::string_view matrix) { return matrix.ends_with(".router"); }
bool is_quantizable(std::string_view matrix) {
  return !is_router(matrix) && !matrix.starts_with("vision.");
}

}  // namespace

QuantRecipe::QuantRecipe(const std::string& quant,
                         const std::vector<std::pair<std::string, std::string>>& overrides) {
  if (quant == "int4") {
    // Experts hold 96 % of Scout's weights; attention and head are small and sensitive.
    rules_ = {{"layers.*", WeightFormat::kInt4G32},
              {"layers.*.attention.*", WeightFormat::kInt8G32},
              {"lm_head", WeightFormat::kInt8G32}};
  } else if (!quant.empty()) {
    const WeightFormat format = encodable(quant);
    rules_ = {{"layers.*", format}, {"lm_head", format}};
  }
  for (const auto& [pattern, name] : overrides)
    rules_.push_back({pattern, name == "stored" ? std::nullopt : std::optional(encodable(name))});
  overrides_ = overrides.size();
}

std::optional<WeightFormat> QuantRecipe::format_of(std::string_view matrix) const {
  if (is_router(matrix)) return WeightFormat::kF32;
  if (!is_quantizable(matrix)) return std::nullopt;
  for (auto rule = rules_.rbegin(); rule != rules_.rend(); ++rule)
    if (matches(rule->pattern, matrix)) return rule->format;
  return std::nullopt;
}

void QuantRecipe::require_matches(const std::vector<std::string>& matrices) const {
  for (size_t i = rules_.size() - overrides_; i < rules_.size(); ++i) {
    const auto& [pattern, format] = rules_[i];
    const bool found = std::any_of(matrices.begin(), matrices.end(), [&](const auto& matrix) {
      return (!format || is_quantizable(matrix)) && matches(pattern, matrix);
    });
    if (found) continue;
    fail(ErrorCode::kInvalidRequest, {.param = "quant"},
         "[quant] no matrix of the model that can be quantised matches '", printable(pattern),
         "'; they have names like 'layers.0.attention.qkv' and 'lm_head' (docs/formats.md), and * ",
         "stands for any characters");
  }
}

}  // namespace puna
