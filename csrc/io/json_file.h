// JSON from hostile files: bounded in size and depth, duplicate keys refused, errors with a place.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace puna {

// `where` names the text in messages. Throws ModelFormat.
nlohmann::json parse_json(std::string_view text, const std::string& where);
// Throws ModelNotFound if there is no such file.
nlohmann::json read_json(const std::string& path);
// The whole file, at most `limit` bytes.
std::string read_text(const std::string& path, size_t limit = 100u << 20);

}  // namespace puna
