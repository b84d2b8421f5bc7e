#include "text/bpe_model.h"

#include <algorithm>

#include "base/error.h"
#include "text/table_file.h"

namespace puna {

namespace {

// Ids of ordinary tokens.
struct MergeRule {
  int32_t left, right, merged;
};

std::vector<MergeRule> rules_of(const Vocabulary& vocabulary, const ByteStrings& sides) {
  std::vector<MergeRule> rules;
  rules.reserve(sides.size() / 2);
  for (size_t i = 0; i + 1 < sides.size(); i += 2) {
    const std::string_view left = sides[i], right = sides[i + 1];
    // They lie one after the other.
    const std::string_view merged(left.data(), left.size() + right.size());
    const MergeRule rule{vocabulary.find(left), vocabulary.find(right), vocabulary.find(merged)};
    if (std::min({rule.left, rule.right, rule.merged}) == Vocabulary::kNone) {
      fail(ErrorCode::kModelFormat, "[tokenizer] merge ", i / 2,
           " names a token that the vocabulary lacks");
    }
    rules.push_back(rule);
  }
  return rules;
}

// Whether merge rules say what a list of ranks would: a token's merges come where its id is in the
// order, and all of them are there, each once.
bool follow_ranks(const Vocabulary& vocabulary, const std::vector<MergeRule>& rules) {
  size_t at = 0;
  std::vector<int32_t> lefts;
  for (size_t id = 0; id < vocabulary.size(); ++id) {
    const std::string_view whole = vocabulary.ordinary(id);
    size_t possible = 0;
    for (size_t cut = 1; cut < whole.size(); ++cut) {
      possible += vocabulary.find(whole.substr(0, cut)) != Vocabulary::kNone &&
                  vocabulary.find(whole.substr(cut)) != Vocabulary::kNone;
    }
    lefts.clear();
    for (; at < rules.size() && rules[at].merged == static_cast<int32_t>(id); ++at)
      lefts.push_back(rules[at].left);
    std::sort(lefts.begin(), lefts.end());
    if (lefts.size() != possible || std::adjacent_find(lefts.begin(), lefts.end()) != lefts.end())
      return false;
  }
  return at == rules.size();
}

}  // namespace

BpeModel::BpeModel(ByteStrings tokens, std::vector<bool> added)
    : vocabulary_(std::move(tokens), std::move(added)) {
  if (const std::optional<size_t> missing = find_bytes()) {
    fail(ErrorCode::kModelFormat, "[tokenizer] there is no token for the single byte ", *missing,
         "; byte-level BPE needs all 256");
  }
}

std::optional<size_t> BpeModel::find_bytes() {
  byte_ids_.fill(Vocabulary::kNone);
  for (size_t id = 0; id < vocabulary_.size(); ++id) {
    const std::string_view bytes = vocabulary_.ordinary(id);
    if (bytes.size() == 1) byte_ids_[static_cast<uint8_t>(bytes[0])] = static_cast<int32_t>(id);
  }
  const auto missing = std::find(byte_ids_.begin(), byte_ids_.end(), Vocabulary::kNone);
  if (missing == byte_ids_.end()) return std::nullopt;
  return static_cast<size_t>(missing - byte_ids_.begin());
}

BpeModel BpeModel::of_ranks(ByteStrings tokens, std::vector<bool> added) {
  BpeModel model(std::move(tokens), std::move(added));
  model.ranked_ = RankedBpe::of(model.vocabulary_);
  if (!model.ranked_) add_merges_of_ranks(model.vocabulary_, model.merges_);
  model.incremental_ = model.ranked_ && model.ranked_->all_reachable();
  return model;
}

BpeModel BpeModel::of_merges(ByteStrings tokens, std::vector<bool> added, const ByteStrings& sides,
                             bool whole_first) {
  BpeModel model(std::move(tokens), std::move(added));
  const std::vector<MergeRule> rules = rules_of(model.vocabulary_, sides);
  if (follow_ranks(model.vocabulary_, rules)) model.ranked_ = RankedBpe::of(model.vocabulary_);
  if (!model.ranked_) {
    model.merges_.reserve(rules.size());
    uint32_t rank = 0;
    for (const auto& [left, right, merged] : rules)
      model.merges_.add(left, right, {rank++, merged});
    model.merges_.require_short_searches();
  }
  if (!whole_first && !(model.ranked_ && model.ranked_->all_reachable())) {
    std::vector<bool> keep(model.vocabulary_.size(), false);
    for (uint32_t id = 0; model.ranked_ && id < keep.size(); ++id) {
      keep[id] = model.ranked_->is_reachable(id);
    }
    model.vocabulary_.restrict_to(keep);
  }
  model.incremental_ = model.ranked_ && (!whole_first || model.ranked_->all_reachable());
  return model;
}

void BpeModel::save(TableWriter& out) const {
  out.number(ranked_.has_value());
  out.number(incremental_);
  vocabulary_.save(out);
  if (ranked_) {
    ranked_->save(out);
  } else {
    merges_.save(out);
  }
}

std::optional<BpeModel> BpeModel::load(TableReader& in, std::span<const uint32_t> added) {
  uint64_t ranked = 0, incremental = 0;
  if (!in.number(ranked) || !in.number(incremental)) return std::nullopt;
  std::optional<Vocabulary> vocabulary = Vocabulary::load(in, added);
  if (!vocabulary) return std::nullopt;
  BpeModel model;
  model.vocabulary_ = std::move(*vocabulary);
  if (model.find_bytes()) return std::nullopt;
  if (ranked == 0) {
    if (!model.merges_.load(in, model.vocabulary_.size())) return std::nullopt;
    return model;
  }
  model.ranked_ = RankedBpe::load(in, model.vocabulary_);
  if (!model.ranked_) return std::nullopt;
  model.incremental_ = incremental != 0;
  return model;
}

void BpeModel::merge(std::string_view piece, std::vector<int32_t>& symbols,
                     std::vector<int32_t>& out) const {
  symbols.clear();
  for (const char byte : piece) symbols.push_back(byte_ids_[static_cast<uint8_t>(byte)]);
  merge_pairs(merges_, symbols, out);
}

}  // namespace puna
