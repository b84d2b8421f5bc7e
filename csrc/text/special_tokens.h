// The special tokens that follow the ranks of Llama 4's own tokenizer.model.
#pragma once

#include <string>
#include <vector>

namespace puna {

// All 2,048, in the order of their ids.
std::vector<std::string> llama4_special_tokens();

}  // namespace puna
