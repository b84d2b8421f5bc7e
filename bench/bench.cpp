#include "bench.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstring>

#include "base/error.h"

namespace puna::bench {

// --- arguments ----------------------------------------------------------------------------------

Arguments::Arguments(std::string command, std::vector<Option> options, int argc, char** argv)
    : command_(std::move(command)), options_(std::move(options)) {
  options_.push_back({"help", nullptr, "print this"});
  for (int i = 0; i < argc; ++i) {
    const std::string argument = argv[i];
    const auto option = std::find_if(options_.begin(), options_.end(), [&](const Option& known) {
      return argument == std::string("--") + known.name;
    });
    if (option == options_.end()) {
      fail(ErrorCode::kInvalidRequest, "[", command_, "] there is no '", argument, "'\n", help());
    }
    if (option->value && i + 1 == argc) {
      fail(ErrorCode::kInvalidRequest, "[", command_, "] ", argument, " needs a value ",
           option->value);
    }
    given_[option->name] = option->value ? argv[++i] : "";
  }
}

std::string Arguments::help() const {
  std::string text = "usage: puna-bench " + command_ + " [options]\n";
  for (const Option& option : options_) {
    std::string left =
        std::string("  --") + option.name + (option.value ? std::string(" ") + option.value : "");
    left.resize(std::max<size_t>(left.size() + 2, 22), ' ');
    text += left + option.help + "\n";
  }
  return text;
}

std::string Arguments::text(const std::string& name, const std::string& otherwise) const {
  const auto found = given_.find(name);
  return found == given_.end() ? otherwise : found->second;
}

int64_t Arguments::integer(const std::string& name, int64_t otherwise, int64_t low,
                           int64_t high) const {
  const auto found = given_.find(name);
  if (found == given_.end()) return otherwise;
  const std::string& text = found->second;
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < low || value > high) {
    fail(ErrorCode::kInvalidRequest, "[", command_, "] --", name, " is '", text,
         "', and must be a whole number from ", low, " to ", high);
  }
  return value;
}

int64_t Arguments::bytes(const std::string& name, int64_t otherwise) const {
  const auto found = given_.find(name);
  if (found == given_.end()) return otherwise;
  const std::string& text = found->second;
  constexpr std::pair<const char*, int> kUnits[] = {{"", 0}, {"KiB", 10}, {"MiB", 20}, {"GiB", 30}};
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  for (const auto& [unit, shift] : kUnits)
    if (error == std::errc() && end == text.data() + text.size() - std::strlen(unit) &&
        text.ends_with(unit) && value >= 0 && value < int64_t{1} << 30)
      return value << shift;
  fail(ErrorCode::kInvalidRequest, "[", command_, "] --", name, " is '", text,
       "', and must be bytes, such as 512MiB or 3GiB");
}

// --- timing -------------------------------------------------------------------------------------

double median(std::vector<double> values) {
  if (values.empty()) fail(ErrorCode::kInternal, "[median] there are no values");
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  return values.size() % 2 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

double seconds_of(const std::function<void()>& run) {
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double Case::best_rate() const { return work / *std::min_element(seconds.begin(), seconds.end()); }

// --- ceilings -----------------------------------------------------------------------------------

namespace {

// Results of the ceilings go here, so that no compiler takes the work for useless.
volatile double sink;

// Every lane reads chunks of `chunk` bytes, the lanes in turns; 0: one contiguous part each.
Case reading(const KernelTable& kernels, ThreadPool& pool, const std::byte* memory, int64_t chunk) {
  const auto read = kernels.read_bytes;
  return {"read",
          static_cast<double>(Ceilings::kBytes),
          [read, &pool, memory, chunk] {
            pool.run([&](Lane& lane) {
              uint64_t sum = 0;
              if (chunk == 0) {
                const Part part = lane.part(Ceilings::kBytes, 4096);
                sum = read(memory + part.begin, part.end - part.begin);
              } else {
                for (int64_t i = lane.id() * chunk; i < Ceilings::kBytes;
                     i += lane.count() * chunk) {
                  sum += read(memory + i, std::min(chunk, Ceilings::kBytes - i));
                }
              }
              sink = static_cast<double>(sum);
            });
          },
          {}};
}

Case computing(float (*peak)(int64_t, int64_t*), ThreadPool& pool) {
  // As many rounds as take about 20 ms.
  int64_t iterations = 1024, operations = 0;
  while (seconds_of([&] { sink = peak(iterations, &operations); }) < 0.02) iterations *= 2;
  return {"peak",
          static_cast<double>(operations) * pool.lanes(),
          [peak, &pool, iterations] {
            pool.run([&](Lane&) {
              int64_t done = 0;
              sink = peak(iterations, &done);
            });
          },
          {}};
}

}  // namespace

Ceilings::Ceilings(const KernelTable& kernels, ThreadPool& pool)
    : memory_(kBytes),
      bf16_(computing(kernels.peak_bf16, pool)),
      f32_(computing(kernels.peak_f32, pool)),
      int8_(computing(kernels.peak_int8, pool)) {
  // Exponents 2^-7 to 2^-5 with either sign, from a linear congruential generator: normal numbers
  // both as bfloat16 and in pairs as float.
  auto* words = static_cast<uint16_t*>(memory_.data());
  pool.run([&](Lane& lane) {
    const Part part = lane.part(kBytes / 2, 4096);
    uint32_t state = static_cast<uint32_t>(lane.id() + 1);
    for (int64_t i = part.begin; i < part.end; ++i) {
      state = state * 1664525u + 1013904223u;
      words[i] = static_cast<uint16_t>(0x3c00u + (state >> 24) + (state & 0x8000u));
    }
  });
  for (int64_t chunk : {int64_t{0}, int64_t{64} << 10, int64_t{4} << 20}) {
    reads_.push_back(reading(kernels, pool, static_cast<const std::byte*>(memory_.data()), chunk));
  }
}

void Ceilings::sample() {
  for (Case& read : reads_) read.sample();
  bf16_.sample();
  f32_.sample();
  int8_.sample();
}

double Ceilings::read() const {
  double best = 0;
  for (const Case& read : reads_) best = std::max(best, read.median_rate());
  return best;
}

// --- reports ------------------------------------------------------------------------------------

namespace {

std::string formatted(const Report::Value& value, bool json) {
  if (const auto* text = std::get_if<std::string>(&value)) {
    if (!json) return *text;
    std::string quoted = "\"";
    for (char c : *text) {
      char escaped[8];
      if (c == '"' || c == '\\') {
        quoted += '\\';
        quoted += c;
      } else if (static_cast<unsigned char>(c) < 0x20) {
        std::snprintf(escaped, sizeof(escaped), "\\u%04x", c);
        quoted += escaped;
      } else {
        quoted += c;
      }
    }
    return quoted + "\"";
  }
  if (const auto* whole = std::get_if<int64_t>(&value)) return std::to_string(*whole);
  char digits[32];
  std::snprintf(digits, sizeof(digits), json ? "%.6g" : "%.1f", std::get<double>(value));
  return digits;
}

std::string json_object(const Report::Fields& fields) {
  std::string text = "{";
  for (const auto& [name, value] : fields) {
    if (text.size() > 1) text += ", ";
    text += formatted(name, true) + ": " + formatted(value, true);
  }
  return text + "}";
}

}  // namespace

void Report::print(std::ostream& out, bool json) const {
  if (json) {
    out << "{\"facts\": " << json_object(facts_) << ",\n \"rows\": [";
    for (size_t i = 0; i < rows_.size(); ++i) out << (i ? ",\n  " : "") << json_object(rows_[i]);
    out << "]}\n";
    return;
  }
  for (const auto& [name, value] : facts_) out << name << ": " << formatted(value, false) << "\n";
  if (rows_.empty()) return;
  std::vector<std::vector<std::string>> lines(1);
  for (const auto& [name, value] : rows_[0]) lines[0].push_back(name);
  for (const Fields& row : rows_) {
    std::vector<std::string>& line = lines.emplace_back();
    for (const auto& [name, value] : row) line.push_back(formatted(value, false));
  }
  out << "\n";
  for (const std::vector<std::string>& line : lines) {
    for (size_t column = 0; column < line.size(); ++column) {
      size_t width = 0;
      for (const auto& other : lines) width = std::max(width, other[column].size());
      const std::string space(width - line[column].size(), ' ');
      const bool left = std::holds_alternative<std::string>(rows_[0][column].second);
      out << (column ? "  " : "") << (left ? line[column] + space : space + line[column]);
    }
    out << "\n";
  }
}

}  // namespace puna::bench
