#include "io/json_file.h"

#include <set>
#include <vector>

#include "base/error.h"
#include "io/message.h"
#include "platform/mmap.h"

namespace puna {

namespace {

constexpr int kMaxDepth = 64;  // a configuration nests three or four deep

}  // namespace

nlohmann::json parse_json(std::string_view text, const std::string& where) {
  std::vector<std::set<std::string>> keys;
  // The callback sees every key and brace; nlohmann itself keeps the last of duplicate keys.
  const auto check = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& parsed) {
    using Event = nlohmann::json::parse_event_t;
    if (depth > kMaxDepth)
      fail(ErrorCode::kModelFormat, "[json] ", where, " nests deeper than ", kMaxDepth);
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end) keys.pop_back();
    if (event == Event::key && !keys.back().insert(parsed.get<std::string>()).second) {
      fail(ErrorCode::kModelFormat, "[json] ", where, " has the key \"",
           printable(parsed.get<std::string>()), "\" twice");
    }
    return true;
  };
  try {
    return nlohmann::json::parse(text.begin(), text.end(), check);
  } catch (const nlohmann::json::exception& error) {
    // The message says line and column, and quotes the text.
    fail(ErrorCode::kModelFormat, "[json] ", where,
         " is not valid JSON: ", printable(error.what(), 300));
  }
}

std::string read_text(const std::string& path, size_t limit) {
  const MappedFile file(path);
  if (file.size() > limit) {
    fail(ErrorCode::kModelFormat, "[file] ", path, " has ", file.size(), " bytes, more than the ",
         limit, " that such a file may have");
  }
  return {reinterpret_cast<const char*>(file.data()), file.size()};
}

nlohmann::json read_json(const std::string& path) { return parse_json(read_text(path), path); }

}  // namespace puna
