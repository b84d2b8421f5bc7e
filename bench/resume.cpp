// puna-bench resume: how soon a saved session of a long text goes on, beside the rate at which its
// files are read: opening it, the first step over all its keys and values, and forking it.
#include <filesystem>
#include <iostream>
#include <memory>
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

// Scout's layers: of every four the last keeps everything, the others the current chunk.
constexpr int64_t kLayers = 48, kGlobalEvery = 4, kChunk = 8192;

// Memory for making the session: what one pass of a chunk takes in all layers, and two chunks.
constexpr int64_t kMakingRam = int64_t{4} << 30;

void remove_own(const std::string& directory) {
  std::error_code ignored;
  std::filesystem::remove_all(directory, ignored);
}

}  // namespace

int run_resume(int argc, char** argv) {
  const Arguments arguments(
      "resume",
      {{"dir", "DIR", "where the session is; made if it is not there"},
       {"tokens", "N", "of a session that is made, whole chunks of 8192 (default 131072)"},
       {"kv", "FORMAT", "bf16, int8 (default) or int4"},
       {"ram", "BYTES", "memory for keys and values (default 1GiB)"},
       {"threads", "N", "compute threads (default: the usable cores)"},
       {"make", nullptr, "only make it, so that another process finds it cold"},
       {"json", nullptr, "print JSON"}},
      argc, argv);
  if (arguments.wants_help()) {
    std::cout << arguments.help();
    return 0;
  }
  const std::string directory = arguments.text("dir", "");
  if (directory.empty()) fail(ErrorCode::kInvalidRequest, "--dir DIR is needed");
  const std::string format = arguments.text("kv", "int8"), session = directory + "/session";
  const int64_t wanted =
      arguments.integer("tokens", 131072, kChunk, int64_t{1} << 26) / kChunk * kChunk;
  const auto threads = static_cast<int>(arguments.integer("threads", 0, 1, ThreadPool::kMaxLanes));
  const Geometry& shape = geometry_named("scout");
  KvGeometry geometry{{DType::kBF16, shape.kv_heads, shape.head_dim}, {}, seal_named(format)};
  for (int64_t layer = 0; layer < kLayers; ++layer)
    geometry.chunk.push_back(layer % kGlobalEvery == kGlobalEvery - 1 ? 0 : kChunk);

  ThreadPool pool(threads);
  const std::unique_ptr<Backend> backend = make_backend("cpu", {"", pool.lanes()});
  if (!std::filesystem::exists(session + "/journal")) {
    KvStoreOptions options;
    options.disk = directory + "/making";
    ProceduralCache cache(shape, geometry, kMakingRam, options, *backend, pool);
    cache.fill(wanted, session);
  }
  remove_own(directory + "/making");
  if (arguments.has("make")) return 0;

  DiskReads disk(session);
  disk.sample(0);
  // What opens it shares no memory with what made it; direct I/O passes the system's cache by.
  ProceduralCache cache(shape, geometry, arguments.bytes("ram", int64_t{1} << 30), {}, *backend,
                        pool);
  const double opened = seconds_of([&] { cache.open(session); });
  KvStore& store = cache.store();
  const int64_t tokens = store.length(cache.base());
  const int64_t before_fork = store.bytes_in_use();
  std::vector<double> forks;
  for (int i = 0; i < 9; ++i) {
    KvStore::Sequence fork = 0;
    forks.push_back(seconds_of([&] { fork = store.fork(cache.base()); }));
    if (store.bytes_in_use() != before_fork)
      fail(ErrorCode::kInternal, "[resume] a fork took ", store.bytes_in_use() - before_fork,
           " bytes");
    store.release(fork);
  }
  const double first = seconds_of([&] { cache.step(1); });
  const KvStatistics statistics = cache.statistics();
  disk.sample(0);
  const double error = cache.check_step();
  if (!(error <= cache.bound()))
    fail(ErrorCode::kInternal, "[resume] an output is off by ", error, ", at most ", cache.bound(),
         " was expected");

  const double reading = static_cast<double>(disk.bytes()) / disk.median_rate();
  Report report;
  report.fact("processor", processor_name());
  report.fact("isa", std::string(resolve_isa("").isa));
  report.fact("threads", static_cast<int64_t>(pool.lanes()));
  report.fact("kv", format);
  report.fact("tokens", tokens);
  report.fact("session GB", static_cast<double>(disk.bytes()) / 1e9);
  report.fact("disk read GB/s", disk.median_rate() / 1e9);
  report.fact("seconds to read it", reading);
  report.fact("seconds to open", opened);
  report.fact("seconds to the first step's end", opened + first);
  report.fact("x of reading it", (opened + first) / reading);
  report.fact("GB read", static_cast<double>(statistics.read_bytes) / 1e9);
  report.fact("ms to fork", median(forks) * 1e3);
  report.fact("bytes to fork", int64_t{0});
  report.fact("off from double by, in 1e-6", error * 1e6);
  report.fact("peak resident GiB", static_cast<double>(peak_resident_bytes()) / (1 << 30));
  report.print(std::cout, arguments.has("json"));
  return 0;
}

}  // namespace puna::bench
