#include "text/special_tokens.h"

namespace puna {

std::vector<std::string> llama4_special_tokens() {
  std::vector<std::string> names;
  const auto named = [&](std::initializer_list<const char*> list) {
    for (const char* name : list) names.push_back("<|" + std::string(name) + "|>");
  };
  // `count` reserved names of a group, numbered from `first`.
  const auto reserved = [&](const std::string& group, int first, int count) {
    for (int i = first; i < first + count; ++i) {
      names.push_back("<|" + group + "reserved_special_token_" + std::to_string(i) + "|>");
    }
  };
  named({"begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"});
  named({"header_start", "header_end", "eom", "eot", "step"});
  reserved("text_post_train_", 0, 6);
  named({"python_start", "python_end", "finetune_right_pad"});
  reserved("text_post_train_", 8, 61);
  named({"image_start", "image_end"});
  reserved("vision_", 0, 2);
  named({"tile_x_separator", "tile_y_separator"});
  reserved("vision_", 2, 4);
  named({"image"});
  reserved("vision_", 6, 1);
  named({"patch"});
  reserved("vision_", 7, 1041);
  reserved("reasoning_", 0, 8);
  named({"reasoning_thinking_start", "reasoning_thinking_end"});
  reserved("", 0, 2048 - static_cast<int>(names.size()));
  return names;
}

}  // namespace puna
