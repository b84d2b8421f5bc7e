// Words for messages about files. Names that come out of a file may hold any bytes and have any
// length; a message is one line of valid UTF-8, fit for a terminal and for a Python string.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace puna {

// `text` with control characters and stray bytes written as \xNN, and its middle left out if it is
// longer than `most` bytes.
std::string printable(std::string_view text, size_t most = 160);

// "a, b, c and 7 more"
std::string listing(const std::vector<std::string>& names, size_t most = 5);

// The one of `names` that is nearest to `name` by edit distance, or "" if none is near. Looks at
// the first few thousand only, and at none that is too long to be meant.
std::string nearest_name(const std::string& name, const std::vector<std::string>& names);

}  // namespace puna
