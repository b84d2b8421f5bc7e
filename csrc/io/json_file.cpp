#include "io/json_file.h"

#include <set>
#include <vector>

#include "base/error.h"
#include "io/message.h"
#include "platform/mmap.h"

namespace puna {

namespace {

constexpr int kMaxDepth = 64;  // a configuration nests three or four deep

// Refuses what nests too deep, and keys that come twice, of which nlohmann keeps the last. Not as
// the callback of its parser, which looks through all of a parent at the end of each of its
// objects.
class Checker final : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit Checker(const std::string& where) : where_(where) {}

  bool start_object(std::size_t) override {
    keys_.emplace_back();
    return open();
  }
  bool key(string_t& name) override {
    if (!keys_.back().insert(name).second)
      fail(ErrorCode::kModelFormat, "[json] ", where_, " has the key \"", printable(name),
           "\" twice");
    return true;
  }
  bool end_object() override {
    keys_.pop_back();
    return close();
  }
  bool start_array(std::size_t) override { return open(); }
  bool end_array() override { return close(); }
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool parse_error(std::size_t, const std::string&, const nlohmann::json::exception&) override {
    return false;  // which the parser that makes values tells
  }

 private:
  bool open() {
    if (++depth_ > kMaxDepth)
      fail(ErrorCode::kModelFormat, "[json] ", where_, " nests deeper than ", kMaxDepth);
    return true;
  }
  bool close() {
    --depth_;
    return true;
  }

  const std::string& where_;
  std::vector<std::set<std::string>> keys_;  // of the objects that are open
  int depth_ = 0;
};

}  // namespace

nlohmann::json parse_json(std::string_view text, const std::string& where) {
  Checker checker(where);
  nlohmann::json::sax_parse(text.begin(), text.end(), &checker);
  try {
    return nlohmann::json::parse(text.begin(), text.end());
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
