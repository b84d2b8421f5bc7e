// puna-bench kv-decode: attention of one new token of one or many sequences over a long cache of
// procedural keys and values, through KvStore and Backend, beside the rates at which memory and the
// disk are read.
#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "bench.h"
#include "engine/factory.h"
#include "kernels/cpu/dispatch.h"
#include "platform/system.h"
#include "procedural_cache.h"

namespace puna::bench {
namespace {

std::vector<int64_t> numbers_of(const std::string& list) {
  std::vector<int64_t> numbers;
  for (size_t at = 0; at <= list.size();) {
    const size_t end = std::min(list.find(',', at), list.size());
    const std::string number = list.substr(at, end - at);
    if (number.empty() || number.find_first_not_of("0123456789") != std::string::npos ||
        number.size() > 4 || std::stoll(number) < 1)
      fail(ErrorCode::kInvalidRequest, "--rows ", list, ": numbers from 1 to 9999 are expected");
    numbers.push_back(std::stoll(number));
    at = end + 1;
  }
  return numbers;
}

AttentionMode mode_named(const std::string& text) {
  AttentionMode mode;
  const size_t colon = text.find(':');
  const std::string kind = text.substr(0, colon);
  const char* const number = colon == std::string::npos ? "" : text.c_str() + colon + 1;
  char* end = nullptr;
  const double value = std::strtod(number, &end);
  const bool valid = *number != 0 && *end == 0 && value > 0 && value < 1;
  if (kind == "certified" && valid) {
    mode.kind = AttentionMode::Kind::kCertified;
    mode.tau = value;
  } else if (kind == "budget" && valid) {
    mode.kind = AttentionMode::Kind::kBudget;
    mode.fraction = value;
  } else if (text != "exact") {
    fail(ErrorCode::kInvalidRequest, "--attention ", text,
         ": exact, certified:TAU or budget:FRACTION is expected, with a number between 0 and 1");
  }
  return mode;
}

// Read from the disk at a time, to see how fast that is.
constexpr int64_t kDiskSample = int64_t{4} << 30;

}  // namespace

int run_kv_decode(int argc, char** argv) {
  const Arguments arguments(
      "kv-decode",
      {{"geom", "NAME", "shape of the layers: scout (default) or ledger"},
       {"layers", "N", "layers that keep everything (default 1)"},
       {"tokens", "N", "length of the cache, whole pages of 256 (default 131072)"},
       {"kv", "FORMAT", "bf16, int8 (default) or int4"},
       {"rows", "N,...", "sequences that share the cache, one new token of each (default 1)"},
       {"attention", "MODE", "exact (default), certified:TAU or budget:FRACTION"},
       {"sharpness", "N", "keys have a topic for each page; heads ask for one, which scores N"},
       {"ram", "BYTES", "memory for the cache, such as 3GiB (default: no bound)"},
       {"disk", "DIR", "directory for what does not fit into it"},
       {"threads", "N", "compute threads (default: the usable cores)"},
       {"isa", "NAME", "instruction set (default: the best)"},
       {"rounds", "N", "rounds of which the medians are taken (default 5)"},
       {"json", nullptr, "print JSON"}},
      argc, argv);
  if (arguments.wants_help()) {
    std::cout << arguments.help();
    return 0;
  }
  const Geometry& shape = geometry_named(arguments.text("geom", "scout"));
  const std::string format = arguments.text("kv", "int8");
  const int64_t layers = arguments.integer("layers", 1, 1, 48);
  const int64_t tokens = arguments.integer("tokens", 131072, kPageTokens, int64_t{1} << 26) /
                         kPageTokens * kPageTokens;
  const int64_t rounds = arguments.integer("rounds", 5, 1, 1000);
  const int64_t ram = arguments.bytes("ram", 0);
  const std::vector<int64_t> rows = numbers_of(arguments.text("rows", "1"));
  // Each step adds a token to the first sequence, whose own tokens are compared in one page.
  if (const int64_t steps = (rounds + 1) * std::ssize(rows) + 1; steps >= kPageTokens)
    fail(ErrorCode::kInvalidRequest, "--rounds ", rounds, " of ", rows.size(),
         " numbers of rows would add ", steps, " tokens; at most ", kPageTokens - 1,
         " can be added: ask for fewer rounds");
  const auto threads = static_cast<int>(arguments.integer("threads", 0, 1, ThreadPool::kMaxLanes));
  const std::string isa = arguments.text("isa", "");
  const std::string attention = arguments.text("attention", "exact");
  const AttentionMode mode = mode_named(attention);
  const bool exact = mode.kind == AttentionMode::Kind::kExact;
  const int64_t sharpness = arguments.integer("sharpness", 0, 0, 1000);
  if (format == "bf16" && (sharpness > 0 || !exact))
    fail(ErrorCode::kInvalidRequest,
         "--kv bf16 keeps pages as they are: none is left out, and they have no topics");

  ThreadPool pool(threads);
  const KernelTable kernels = resolve_isa(isa);
  const std::unique_ptr<Backend> backend = make_backend("cpu", {isa, pool.lanes()});
  const KvGeometry geometry{{DType::kBF16, shape.kv_heads, shape.head_dim},
                            std::vector<int64_t>(static_cast<size_t>(layers), 0),
                            seal_named(format)};
  KvStoreOptions options;
  options.disk = arguments.text("disk", "");
  ProceduralCache cache(shape, geometry, ram, options, *backend, pool, sharpness > 0);
  const double filled = seconds_of([&] { cache.fill(tokens); });

  std::vector<std::vector<double>> seconds(rows.size());
  cache.ask(mode, static_cast<float>(sharpness));
  for (const int64_t count : rows) cache.step(count);  // pages of their own
  // Before the memory that is read for comparison.
  const auto peak = static_cast<double>(peak_resident_bytes());
  Ceilings ceilings(kernels, pool);
  std::optional<DiskReads> disk;
  if (!options.disk.empty() && cache.statistics().read_bytes > 0) disk.emplace(options.disk);
  const KvStatistics before = cache.statistics();
  const AttentionReport begun = cache.report();
  for (int64_t round = 0; round < rounds; ++round) {
    ceilings.sample();
    if (disk) disk->sample(std::min(kDiskSample, disk->bytes()));
    for (size_t i = 0; i < rows.size(); ++i) seconds[i].push_back(cache.step(rows[i]));
  }
  const KvStatistics after = cache.statistics();
  const AttentionReport ended = cache.report();
  const double error = cache.check_step();
  // Words of a query that scores N are off by half a step in each of n channels, at most 128 codes
  // from the middle: by 128 / 2 * n * (2 N / n * scale) / 32512 = N 2^-15 in all, with scales of
  // 2 / 255 (int4: as much). Values are below 1.01 in magnitude. A budget promises nothing.
  double bound = cache.bound() + static_cast<double>(sharpness) * 0x1p-14 +
                 2 * 1.01 * cache.report().worst_share;
  if (mode.kind == AttentionMode::Kind::kBudget) bound = 2.02;
  if (!(error <= bound))
    fail(ErrorCode::kInternal, "[kv-decode] an output is off by ", error, ", at most ", bound,
         " was expected");

  const double bytes = static_cast<double>(layers * (tokens / kPageTokens) * cache.page_bytes());
  Report report;
  report.fact("processor", processor_name());
  report.fact("isa", std::string(kernels.isa));
  report.fact("threads", static_cast<int64_t>(pool.lanes()));
  report.fact("rounds", rounds);
  report.fact("shape", std::string(shape.name));
  report.fact("layers", layers);
  report.fact("tokens", tokens);
  report.fact("kv", format);
  if (sharpness > 0) report.fact("sharpness", sharpness);
  if (!exact) {
    report.fact("attention", attention);
    report.fact("% of pages read", 100.0 * static_cast<double>(ended.read - begun.read) /
                                       static_cast<double>(ended.pages - begun.pages));
    report.fact("largest share left out, in 1e-6", ended.worst_share * 1e6);
    report.fact("GB in files not read a step",
                static_cast<double>(ended.unread_bytes - begun.unread_bytes) /
                    static_cast<double>(rounds) / static_cast<double>(rows.size()) / 1e9);
  }
  report.fact("cache GB", bytes / 1e9);
  report.fact("seconds to fill", filled);
  report.fact("read GB/s", ceilings.read() / 1e9);
  report.fact("off from double by, in 1e-6", error * 1e6);
  report.fact("CRC-32C of the last outputs", cache.checksum());
  report.fact("peak resident GiB", peak / (1 << 30));
  const double steps = static_cast<double>(rounds) * static_cast<double>(rows.size());
  const double streamed = static_cast<double>(after.read_bytes - before.read_bytes) / steps;
  if (disk) {
    report.fact("disk read GB/s", disk->median_rate() / 1e9);
    report.fact("GB from disk a step", streamed / 1e9);
    report.fact("seconds waited for disk a step",
                (after.waited_seconds - before.waited_seconds) / steps);
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    const double step = median(seconds[i]);
    Report::Fields fields = {{"rows", rows[i]},
                             {"ms a step", step * 1e3},
                             {"tokens/s", static_cast<double>(rows[i]) / step},
                             {"cache GB/s", bytes / step / 1e9},
                             {"% of read", 100 * bytes / step / ceilings.read()}};
    if (disk) fields.push_back({"% of disk read", 100 * streamed / step / disk->median_rate()});
    fields.push_back({"x of the first", step / median(seconds[0])});
    report.row(std::move(fields));
  }
  report.print(std::cout, arguments.has("json"));
  return 0;
}

}  // namespace puna::bench
