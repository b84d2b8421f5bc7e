// puna-bench kv-decode: attention of one new token of one or many sequences over a long cache of
// procedural keys and values, through KvStore and Backend, beside the rate at which memory is read.
//
// The contents of a page are a function of its layer and place, so that any page can be made again:
// all pages that lie in memory are held against that, and one KV head of the last layer is computed
// in double.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <iostream>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "backend/kv_seal.h"
#include "base/error.h"
#include "base/half.h"
#include "bench.h"
#include "engine/factory.h"
#include "kernels/cpu/dispatch.h"
#include "kv/kv_store.h"
#include "platform/system.h"

namespace puna::bench {
namespace {

struct Geometry {
  const char* name;
  int64_t heads, kv_heads, head_dim;
};
constexpr Geometry kGeometries[] = {{"scout", 40, 8, 128}, {"ledger", 2, 1, 128}};

struct CacheFormat {
  const char* name;
  KvSeal seal;
};
constexpr CacheFormat kFormats[] = {
    {"bf16", KvSeal::kNone}, {"int8", KvSeal::kInt8}, {"int4", KvSeal::kInt4}};

template <class Entry, size_t N>
const Entry& named(const Entry (&entries)[N], const char* option, const std::string& name) {
  std::string names;
  for (const Entry& entry : entries) {
    if (name == entry.name) return entry;
    names += (names.empty() ? "" : ", ") + std::string(entry.name);
  }
  fail(ErrorCode::kInvalidRequest, "--", option, " ", name, ": one of ", names, " is expected");
}

uint64_t mixed(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// Pages as attention reads them before a row's own.
class ProceduralPages {
 public:
  explicit ProceduralPages(const KvGeometry& geometry)
      : open_(geometry.layout),
        sealed_(geometry.sealed_layout()),
        bytes_(geometry.sealed_bytes()) {}

  size_t bytes() const { return bytes_; }

  // Codes are anything; scales and zero points make values of -1 to about 1 of them. Elements of
  // bfloat16 have any sign and a magnitude of 2^-3 to 2.
  void fill(void* page, int64_t layer, int64_t index) const {
    auto* words = static_cast<uint64_t*>(page);
    const uint64_t key = mixed(static_cast<uint64_t>(layer) << 40 ^ static_cast<uint64_t>(index));
    const bool open = sealed_.format == KvSeal::kNone;
    const size_t codes = open ? bytes_ : sealed_.key_scale_offset(0);
    for (size_t i = 0; i < codes / 8; ++i) {
      const uint64_t random = mixed(key + i);
      words[i] = open ? (random & 0x81ff81ff81ff81ffull) + 0x3e003e003e003e00ull : random;
    }
    if (open) return;
    std::memset(static_cast<char*>(page) + codes, 0, bytes_ - codes);
    const float step = 2.0f / static_cast<float>((1 << sealed_.bits()) - 1);
    for (int64_t head = 0; head < sealed_.kv_heads; ++head) {
      const auto put = [&](size_t offset, int64_t count, int64_t used) {
        auto* scales = reinterpret_cast<uint16_t*>(static_cast<char*>(page) + offset);
        for (int64_t i = 0; i < used; ++i) {
          scales[i] = static_cast<uint16_t>(bf16_of_float(step) - mixed(key ^ (offset + i)) % 64);
          scales[count + i] = bf16_of_float(-1.0f);
        }
      };
      put(sealed_.key_scale_offset(head), sealed_.padded_dim(), sealed_.head_dim);
      put(sealed_.value_scale_offset(head), kPageTokens, kPageTokens);
    }
  }

  double key(const void* page, int64_t head, int64_t t, int64_t c) const {
    if (sealed_.format != KvSeal::kNone) return sealed_key(page, sealed_, head, t, c);
    return element(page, open_.key_offset(head), open_.key_index(t, c));
  }
  double value(const void* page, int64_t head, int64_t t, int64_t c) const {
    if (sealed_.format != KvSeal::kNone) return sealed_value(page, sealed_, head, t, c);
    return element(page, open_.value_offset(head), open_.value_index(t, c));
  }
  static double element(const void* page, size_t offset, int64_t index) {
    const auto* bits = reinterpret_cast<const uint16_t*>(static_cast<const char*>(page) + offset);
    return float_of_bf16(bits[index]);
  }

 private:
  KvPageLayout open_;
  KvSealedLayout sealed_;
  size_t bytes_;
};

// Softmax attention of a few queries in double, page by page.
struct DoubleAttention {
  DoubleAttention(int64_t queries, int64_t head_dim)
      : n(head_dim), m(queries, -INFINITY), l(queries), o(queries, std::vector<double>(head_dim)) {}

  template <class Key, class Value>
  void add(const std::vector<std::vector<double>>& q, int64_t tokens, Key key, Value value) {
    for (int64_t t = 0; t < tokens; ++t) {
      std::vector<double> k(n), v(n);
      for (int64_t c = 0; c < n; ++c) {
        k[c] = key(t, c);
        v[c] = value(t, c);
      }
      for (size_t i = 0; i < m.size(); ++i)
        merge(i, std::inner_product(k.begin(), k.end(), q[i].begin(), 0.0), 1, v);
    }
  }
  void merge(size_t i, double score, double weight, const std::vector<double>& value) {
    const double top = std::max(m[i], score);
    const double a = std::exp(m[i] - top), b = std::exp(score - top);
    m[i] = top;
    l[i] = l[i] * a + weight * b;
    for (int64_t c = 0; c < n; ++c) o[i][c] = o[i][c] * a + value[c] * b;
  }

  int64_t n;
  std::vector<double> m, l;
  std::vector<std::vector<double>> o;
};

// A cache of `layers` layers, all of which keep everything, and steps of decoding over it.
class Cache {
 public:
  Cache(const Geometry& shape, const KvGeometry& geometry, int64_t budget, KvStoreOptions options,
        Backend& backend, ThreadPool& pool)
      : shape_(shape),
        pages_(geometry),
        text_(!options.disk.empty()),
        store_(geometry, make_memory_tier(budget), std::move(options)),
        backend_(backend),
        pool_(pool),
        base_(store_.create()) {
    order_.resize(geometry.chunk.size());
    std::iota(order_.begin(), order_.end(), int64_t{0});
  }

  void fill(int64_t tokens) {
    const int64_t unit = store_.geometry().unit();
    for (int64_t done = 0; done < tokens;) {
      const int64_t count = std::min(unit - done % unit, tokens - done);
      const KvStore::Append append = extend(base_, count);
      const KvStore::Plan plan = store_.plan({&append, 1});
      store_.apply(plan);
      store_.begin_pass(order_);
      for (const int64_t layer : order_) {
        const KvView view = store_.view(base_, layer);
        const bool open = store_.geometry().seal == KvSeal::kNone;
        const int64_t first = done / kPageTokens;
        pool_.run([&](Lane& lane) {
          const Part part = lane.part(count / kPageTokens);
          for (int64_t page = first + part.begin; page < first + part.end; ++page)
            pages_.fill(open ? view.open[page - view.first_open] : view.sealed[page], layer, page);
        });
      }
      store_.commit(plan);
      done += count;
    }
    tokens_ = tokens;
  }

  // One new token of each of `rows` forks, in all layers; returns the seconds of attention.
  double step(int64_t rows) {
    while (std::ssize(forks_) < rows) forks_.push_back(store_.fork(base_));
    std::vector<KvStore::Append> appends;
    for (int64_t r = 0; r < rows; ++r) appends.push_back(extend(forks_[r], 1));
    const KvStore::Plan plan = store_.plan(appends);
    store_.apply(plan);
    const int64_t n = shape_.head_dim, cols = (shape_.heads + 2 * shape_.kv_heads) * n;
    std::normal_distribution<float> normal;
    queries_.resize(rows * cols);
    for (float& x : queries_) x = normal(random_) * 0.25f;
    std::vector<float> qkv;
    out_.resize(rows * shape_.heads * n);
    double seconds = 0;
    store_.begin_pass(order_);
    for (const int64_t layer : order_) {
      qkv = queries_;
      std::vector<AttentionSegment> segments;
      for (int64_t r = 0; r < rows; ++r) {
        const KvView view = store_.view(forks_[r], layer);
        AttentionSegment& segment = segments.emplace_back();
        segment.first_row = r;
        segment.rows = 1;
        segment.position = store_.length(forks_[r]);
        segment.first_position = view.first_position;
        segment.sealed = view.sealed;
        segment.stream = view.stream;
        segment.first_open = view.first_open;
        segment.open = view.open;
      }
      AttentionInput input;
      input.qkv = {qkv.data(), rows, cols};
      input.heads = shape_.heads;
      input.layout = store_.geometry().layout;
      input.sealed = store_.geometry().sealed_layout();
      input.segments = segments;
      seconds +=
          seconds_of([&] { backend_.attention({out_.data(), rows, shape_.heads * n}, input); });
    }
    if (check_next_) check();
    store_.commit(plan);
    return seconds;
  }

  // The largest difference of the next step's outputs from double, for the queries of one KV head.
  double check_step() {
    check_next_ = true;
    step(1);
    check_next_ = false;
    return worst_;
  }

  int64_t page_bytes() const { return static_cast<int64_t>(pages_.bytes()); }
  KvStatistics statistics() const { return store_.statistics(); }

 private:
  KvStore::Append extend(KvStore::Sequence sequence, int64_t count) {
    KvStore::Append append{sequence, count, {}};
    if (!text_) return append;
    const auto length = static_cast<size_t>(store_.length(sequence) + count);
    if (ids_.size() < length) ids_.resize(length, 1);
    append.text.tokens = ids_;
    return append;
  }

  // The last step's first row in the last layer, before it is committed.
  void check() {
    const int64_t n = shape_.head_dim, group = shape_.heads / shape_.kv_heads;
    const int64_t head = shape_.kv_heads - 1, layer = order_.back();
    std::vector<std::vector<double>> q(group, std::vector<double>(n));
    for (int64_t g = 0; g < group; ++g)
      for (int64_t c = 0; c < n; ++c)
        q[g][c] = queries_[(head * group + g) * n + c] / std::sqrt(static_cast<double>(n));
    const KvView view = store_.view(forks_[0], layer);
    std::vector<DoubleAttention> parts(pool_.lanes(), DoubleAttention(group, n));
    std::vector<int64_t> differing(pool_.lanes());
    pool_.run([&](Lane& lane) {
      std::vector<uint64_t> page(pages_.bytes() / 8);
      const Part part = lane.part(tokens_ / kPageTokens);
      for (int64_t index = part.begin; index < part.end; ++index) {
        pages_.fill(page.data(), layer, index);
        const void* held = view.sealed[index];
        differing[lane.id()] +=
            held != nullptr && std::memcmp(held, page.data(), pages_.bytes()) != 0;
        parts[lane.id()].add(
            q, kPageTokens,
            [&](int64_t t, int64_t c) { return pages_.key(page.data(), head, t, c); },
            [&](int64_t t, int64_t c) { return pages_.value(page.data(), head, t, c); });
      }
    });
    const int64_t changed = std::accumulate(differing.begin(), differing.end(), int64_t{0});
    if (changed != 0)
      fail(ErrorCode::kInternal, "[kv-decode] ", changed, " pages are not as they were written");
    const KvPageLayout& open = store_.geometry().layout;
    const void* own = view.open[tokens_ / kPageTokens - view.first_open];
    parts[0].add(
        q, store_.length(forks_[0]) + 1 - tokens_,
        [&](int64_t t, int64_t c) {
          return ProceduralPages::element(own, open.key_offset(head), open.key_index(t, c));
        },
        [&](int64_t t, int64_t c) {
          return ProceduralPages::element(own, open.value_offset(head), open.value_index(t, c));
        });
    worst_ = 0;
    for (int64_t g = 0; g < group; ++g) {
      for (size_t i = 1; i < parts.size(); ++i)
        if (parts[i].l[g] > 0) parts[0].merge(g, parts[i].m[g], parts[i].l[g], parts[i].o[g]);
      for (int64_t c = 0; c < n; ++c)
        worst_ = std::max(
            worst_, std::fabs(out_[(head * group + g) * n + c] - parts[0].o[g][c] / parts[0].l[g]));
    }
  }

  Geometry shape_;
  ProceduralPages pages_;
  bool text_;
  KvStore store_;
  Backend& backend_;
  ThreadPool& pool_;
  KvStore::Sequence base_;
  std::vector<KvStore::Sequence> forks_;
  std::vector<int64_t> order_;
  std::vector<int32_t> ids_;
  std::vector<float> queries_, out_;
  std::mt19937 random_{1};
  int64_t tokens_ = 0;
  bool check_next_ = false;
  double worst_ = 0;
};

// What a value may be off by, of a magnitude of 2 at most: by the whole numbers of queries and
// weights in sealed pages (kernels/kernel_table.h: some of 2^-15), by roundings of fp32 in open
// ones.
double bound_of(KvSeal seal) { return seal == KvSeal::kNone ? 0x1p-17 : 0x1p-13; }

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

}  // namespace

int run_kv_decode(int argc, char** argv) {
  const Arguments arguments(
      "kv-decode",
      {{"geom", "NAME", "shape of the layers: scout (default) or ledger"},
       {"layers", "N", "layers that keep everything (default 1)"},
       {"tokens", "N", "length of the cache, whole pages of 256 (default 131072)"},
       {"kv", "FORMAT", "bf16, int8 (default) or int4"},
       {"rows", "N,...", "sequences that share the cache, one new token of each (default 1)"},
       {"ram", "MIB", "memory for the cache, in MiB (default: no bound)"},
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
  const Geometry& shape = named(kGeometries, "geom", arguments.text("geom", "scout"));
  const CacheFormat& format = named(kFormats, "kv", arguments.text("kv", "int8"));
  const int64_t layers = arguments.integer("layers", 1, 1, 48);
  const int64_t tokens = arguments.integer("tokens", 131072, kPageTokens, int64_t{1} << 26) /
                         kPageTokens * kPageTokens;
  const int64_t rounds = arguments.integer("rounds", 5, 1, 1000);
  const int64_t ram = arguments.integer("ram", 0, 0, int64_t{1} << 30) << 20;
  const std::vector<int64_t> rows = numbers_of(arguments.text("rows", "1"));
  const auto threads = static_cast<int>(arguments.integer("threads", 0, 1, ThreadPool::kMaxLanes));
  const std::string isa = arguments.text("isa", "");

  ThreadPool pool(threads);
  const KernelTable kernels = resolve_isa(isa);
  const std::unique_ptr<Backend> backend = make_backend("cpu", {isa, pool.lanes()});
  const KvGeometry geometry{{DType::kBF16, shape.kv_heads, shape.head_dim},
                            std::vector<int64_t>(static_cast<size_t>(layers), 0),
                            format.seal};
  KvStoreOptions options;
  options.disk = arguments.text("disk", "");
  Cache cache(shape, geometry, ram, options, *backend, pool);
  const double filled = seconds_of([&] { cache.fill(tokens); });

  Ceilings ceilings(kernels, pool);
  std::vector<std::vector<double>> seconds(rows.size());
  for (const int64_t count : rows) cache.step(count);  // pages of their own
  const KvStatistics before = cache.statistics();
  for (int64_t round = 0; round < rounds; ++round) {
    ceilings.sample();
    for (size_t i = 0; i < rows.size(); ++i) seconds[i].push_back(cache.step(rows[i]));
  }
  const KvStatistics after = cache.statistics();
  const double error = cache.check_step();
  if (!(error <= bound_of(format.seal)))
    fail(ErrorCode::kInternal, "[kv-decode] an output is off by ", error, ", at most ",
         bound_of(format.seal), " was expected");

  const double bytes = static_cast<double>(layers * (tokens / kPageTokens) * cache.page_bytes());
  Report report;
  report.fact("processor", processor_name());
  report.fact("isa", std::string(kernels.isa));
  report.fact("threads", static_cast<int64_t>(pool.lanes()));
  report.fact("rounds", rounds);
  report.fact("shape", std::string(shape.name));
  report.fact("layers", layers);
  report.fact("tokens", tokens);
  report.fact("kv", std::string(format.name));
  report.fact("cache GB", bytes / 1e9);
  report.fact("seconds to fill", filled);
  report.fact("read GB/s", ceilings.read() / 1e9);
  report.fact("off from double by, in 1e-6", error * 1e6);
  if (!options.disk.empty()) {
    const double steps = static_cast<double>(rounds) * static_cast<double>(rows.size());
    report.fact("GB from disk a step",
                static_cast<double>(after.read_bytes - before.read_bytes) / steps / 1e9);
    report.fact("seconds waited for disk a step",
                (after.waited_seconds - before.waited_seconds) / steps);
  }
  report.fact("peak resident GiB, ceilings' 1 GiB included",
              static_cast<double>(peak_resident_bytes()) / (1 << 30));
  for (size_t i = 0; i < rows.size(); ++i) {
    const double step = median(seconds[i]);
    report.row({{"rows", rows[i]},
                {"ms a step", step * 1e3},
                {"tokens/s", static_cast<double>(rows[i]) / step},
                {"cache GB/s", bytes / step / 1e9},
                {"% of read", 100 * bytes / step / ceilings.read()},
                {"x of the first", step / median(seconds[0])}});
  }
  report.print(std::cout, arguments.has("json"));
  return 0;
}

}  // namespace puna::bench
