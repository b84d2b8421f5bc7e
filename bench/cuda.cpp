// The CUDA backend on a GPU: whether it is right, and how fast, beside what the GPU's memory can
// do.
//
// Right is: the bits of the CPU for products with quantised weights, and for all else the double
// precision of `ref` within what the arithmetic may lose. Fast is: bytes that an operation must
// read and write, and operations, over its time, beside what the device reads and multiplies at
// best in the same run. What is timed is a graph of many in a row, so the host's part is not in it.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <random>
#include <span>
#include <string>

#include "backend/backend.h"
#include "base/error.h"
#include "base/half.h"
#include "bench.h"
#include "device_ceilings.h"
#include "engine/factory.h"
#include "quant/encode.h"

namespace puna::bench {
namespace {

constexpr double kEpsBF16 = 1.0 / 256;

std::vector<float> randoms(std::mt19937& random, int64_t count, float sigma = 1) {
  std::normal_distribution<float> normal(0, sigma);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

// Rows in a backend's memory.
struct Placed {
  Placed(Backend& backend, int64_t rows, int64_t cols)
      : backend(backend),
        buffer(backend.allocate(static_cast<size_t>(rows * cols) * sizeof(float))),
        rows(buffer.floats(), rows, cols) {}
  Placed(Backend& backend, int64_t rows, const std::vector<float>& values)
      : Placed(backend, rows, std::ssize(values) / rows) {
    backend.from_host(this->rows, values.data());
  }
  std::vector<float> values() const {
    std::vector<float> host(static_cast<size_t>(rows.rows * rows.cols));
    backend.to_host(host.data(), rows);
    return host;
  }

  Backend& backend;
  Buffer buffer;
  Rows rows;
};

// A random matrix of fp32, as a checkpoint holds it.
struct Source {
  Source(std::mt19937& random, int64_t rows, int64_t cols)
      : rows(rows),
        cols(cols),
        values(randoms(random, rows * cols, 1 / std::sqrt(static_cast<float>(cols)))) {}
  WeightRef load(Backend& backend, WeightFormat format) const {
    const MatrixSource part{DType::kF32, values.data(), rows, cols, cols, 1};
    return backend.load_matrix({&part, 1}, {format});
  }

  int64_t rows, cols;
  std::vector<float> values;
};

// --- right ---------------------------------------------------------------------------------------

// Largest difference, as a share of the largest value.
double difference(const std::vector<float>& a, const std::vector<float>& b) {
  double most = 0, largest = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double apart = std::abs(static_cast<double>(a[i]) - b[i]);
    if (!(apart <= most)) most = apart;  // NaN, too
    largest = std::max(largest, std::abs(static_cast<double>(b[i])));
  }
  return most / largest;
}

class Checks {
 public:
  Checks(Backend& gpu, Backend& cpu, Backend& ref) : gpu_(gpu), cpu_(cpu), ref_(ref) {}

  void products() {
    for (const WeightFormat format : all_formats()) {
      if (is_quantized(format) && !can_encode(format)) continue;
      if (format == WeightFormat::kBF16) continue;  // from bfloat16 alone; see experts()
      // The last are many enough for the largest tiles on every device.
      for (const int64_t count : {1, 5, 40, 2000}) {
        const Source weight(random_, count < 2000 ? 200 : 1300, 520);
        if (count == 2000 && !is_quantized(format)) continue;
        const std::vector<float> x = randoms(random_, count * weight.cols);
        const auto run = [&](Backend& backend) {
          const Placed in(backend, count, x), out(backend, count, weight.rows);
          backend.matmul(out.rows, in.rows, weight.load(backend, format));
          return out.values();
        };
        // Sums of fp32 in another order; equal where they are whole numbers.
        const bool exact = is_quantized(format);
        add(std::string("product ") + name_of(format) + " x " + std::to_string(count), run,
            exact ? cpu_ : ref_, exact ? 0 : 1e-5);
      }
    }
    // bfloat16, of calls that say that they have many rows, and of the same rows in calls that do
    // not: whether the bits are equal decides whether every product may be by warpgroups.
    const Source source(random_, 1300, 520);
    std::vector<uint16_t> halves;
    for (const float value : source.values) halves.push_back(bf16_of_float(value));
    const int64_t count = 2000;
    std::vector<float> x = randoms(random_, count * source.cols);
    for (float& value : x) value = float_of_bf16(bf16_of_float(value));
    const auto run = [&](Backend& backend, int64_t each, bool many_rows) {
      const MatrixSource part{DType::kBF16, halves.data(), source.rows,
                              source.cols,  source.cols,   1};
      const WeightRef weight = backend.load_matrix({&part, 1}, {WeightFormat::kBF16});
      const Placed in(backend, count, x), out(backend, count, source.rows);
      for (int64_t first = 0; first < count; first += each) {
        const int64_t rows = std::min(each, count - first);
        backend.matmul(out.rows.slice(first, rows), in.rows.slice(first, rows), weight,
                       {.many_rows = many_rows});
      }
      return out.values();
    };
    const std::vector<float> many = run(gpu_, count, true), expected = run(ref_, count, false);
    compare("product bf16 x 2000, of many rows", many, expected, ref_.name(), 1e-5);
    for (const int64_t each : {int64_t{16}, int64_t{64}, int64_t{577}, count}) {
      const std::string calls = "product bf16 in calls of " + std::to_string(each);
      if (each > 16) compare(calls + ", of many rows", run(gpu_, each, true), many, "one call", 0);
      const std::vector<float> plain = run(gpu_, each, false);
      compare(calls, plain, expected, ref_.name(), 1e-5);
      int64_t other = 0;
      for (size_t i = 0; i < many.size(); ++i) other += plain[i] != many[i];
      std::cerr << "       its bits and those of many rows are "
                << (other == 0 ? "equal"
                               : "not equal in " + std::to_string(other) + " of " +
                                     std::to_string(many.size()))
                << "\n";
    }
  }

  void experts() {
    const int64_t hidden = 256, width = 192, experts = 6;
    const Source router(random_, experts, hidden);
    std::vector<Source> up, down;
    for (int64_t e = 0; e <= experts; ++e) {
      up.emplace_back(random_, 2 * width, hidden);
      down.emplace_back(random_, hidden, width);
    }
    const std::vector<float> scale = randoms(random_, hidden);
    const TensorRef norm{DType::kF32, 1, {hidden}, scale.data()};
    // Of two rows the router, and what makes its rows, are a kernel of their own.
    for (const auto& [top_k, rows] :
         {std::array<int64_t, 2>{1, 33}, std::array<int64_t, 2>{2, 33}, {1, 2}}) {
      const std::vector<float> x = randoms(random_, rows * hidden);
      const auto compute = [&](Backend& backend, WeightFormat format, bool on_host) {
        MoeWeights weights;
        weights.router = router.load(backend, WeightFormat::kF32);
        weights.shared_gate_up = up[experts].load(backend, format);
        weights.shared_down = down[experts].load(backend, format);
        Backend& place = on_host ? backend.host() : backend;
        for (int64_t e = 0; e < experts; ++e) {
          weights.gate_up.push_back(up[e].load(place, format));
          weights.down.push_back(down[e].load(place, format));
        }
        weights.top_k = top_k;
        weights.experts_on_host = on_host;
        const Placed in(backend, rows, x), normed(backend, rows, hidden),
            out(backend, rows, hidden);
        const VectorRef factors = backend.load_vector({&norm, 1});
        // Twice, so that what passes between host and device is used again.
        for (int i = 0; i < 2; ++i) {
          backend.rms_norm(normed.rows, in.rows, factors, 1e-5f);
          backend.moe(out.rows, normed.rows, weights);
        }
        return out.values();
      };
      const std::string name =
          "experts, top " + std::to_string(top_k) + " x " + std::to_string(rows);
      for (const bool on_host : {false, true})
        add(
            name + (on_host ? ", on the host" : ""),
            [&](Backend& backend) { return compute(backend, WeightFormat::kF32, on_host); }, ref_,
            1e-5);
      // The same bits wherever they are.
      compare(name + ", int4 on the host", compute(gpu_, WeightFormat::kInt4G32, true),
              compute(gpu_, WeightFormat::kInt4G32, false), gpu_.name(), 0);
    }
  }

  void norms() {
    const int64_t rows = 7, cols = 5120;
    const std::vector<float> x = randoms(random_, rows * cols), weight = randoms(random_, cols);
    const TensorRef part{DType::kF32, 1, {cols}, weight.data()};
    const auto run = [&](Backend& backend) {
      const Placed in(backend, rows, x), out(backend, rows, cols);
      backend.rms_norm(out.rows, in.rows, backend.load_vector({&part, 1}), 1e-5f);
      return out.values();
    };
    add("rms_norm", run, ref_, 1e-5);
  }

  // What the vision tower does with two tiles, smaller than Llama 4's, with heads as it has them.
  void vision() {
    const int64_t tiles = 2, tokens = 290, heads = 4, dim = 88, width = heads * dim;
    const int64_t rows = tiles * tokens;
    const auto rounded = [&](int64_t count) {
      std::vector<float> values = randoms(random_, count);
      for (float& value : values) value = float_of_bf16(bf16_of_float(value));
      return values;
    };
    const std::vector<float> x = rounded(rows * width), factors = randoms(random_, 4 * width);
    const std::vector<float> offsets = randoms(random_, 4 * width);
    const auto vector = [](Backend& backend, const std::vector<float>& values, int64_t count) {
      const TensorRef part{DType::kF32, 1, {count}, values.data()};
      return backend.load_vector({&part, 1});
    };
    const auto norm = [&](Backend& backend) {
      const Placed in(backend, rows, x), out(backend, rows, width);
      backend.layer_norm(out.rows, in.rows, vector(backend, factors, width),
                         vector(backend, offsets, width), 1e-5f);
      return out.values();
    };
    add("layer_norm", norm, ref_, 1e-5);

    const std::vector<float> qkv = randoms(random_, rows * 3 * width);
    std::vector<float> cos, sin;
    for (int64_t i = 0; i < tokens * dim / 2; ++i) {
      cos.push_back(std::cos(static_cast<float>(i % 97)));
      sin.push_back(std::sin(static_cast<float>(i % 97)));
    }
    for (const DType operands : {DType::kF32, DType::kBF16}) {
      const auto attend = [&](Backend& backend) {
        const Placed in(backend, rows, qkv), out(backend, rows, width);
        backend.vision_attention(out.rows, in.rows, tiles, tokens, heads, cos.data(), sin.data(),
                                 operands);
        return out.values();
      };
      const bool exact = operands == DType::kF32;
      add(std::string("attention of patches in ") + (exact ? "fp32" : "bf16"), attend, ref_,
          exact ? 1e-5 : 2 * kEpsBF16);
    }

    // The results of one product are the operand of the next; a value beside a rounding.
    std::vector<uint16_t> up, down;
    for (int64_t i = 0; i < 4 * width * width; ++i) {
      const float sigma = 1 / std::sqrt(static_cast<float>(width));
      up.push_back(bf16_of_float(randoms(random_, 1, sigma)[0]));
      down.push_back(bf16_of_float(randoms(random_, 1, sigma)[0]));
    }
    const auto multiply = [&](Backend& backend) {
      const auto load = [&](const std::vector<uint16_t>& values, int64_t out, int64_t in) {
        const MatrixSource part{DType::kBF16, values.data(), out, in, in, 1};
        return backend.load_matrix({&part, 1}, {WeightFormat::kBF16});
      };
      const VectorRef inner = vector(backend, offsets, 4 * width);
      const VectorRef outer = vector(backend, factors, width);
      const Placed in(backend, rows, x), hidden(backend, rows, 4 * width);
      const Placed out(backend, rows, x);  // a residual
      backend.matmul(hidden.rows, in.rows, load(up, 4 * width, width),
                     {.bias = &inner, .gelu = true, .many_rows = true, .passing = true});
      backend.matmul(out.rows, hidden.rows, load(down, width, 4 * width),
                     {.bias = &outer, .accumulate = true, .many_rows = true});
      return out.values();
    };
    add("products of patches, with bias and GELU", multiply, ref_, kEpsBF16);

    const int64_t size = 112, patch = 14, grid = size / patch, factor = 2;
    const std::vector<float> pixels = randoms(random_, tiles * 3 * size * size);
    const auto move = [&](Backend& backend) {
      const Placed patches(backend, tiles * grid * grid, 3 * patch * patch);
      const Placed joined(backend, tiles * grid * grid / (factor * factor),
                          patches.rows.cols * factor * factor);
      backend.unfold(patches.rows, pixels.data(), tiles, size, patch);
      backend.pixel_shuffle(joined.rows, patches.rows, tiles, grid, factor);
      return joined.values();
    };
    add("patches of pixels, joined", move, ref_, 0);
  }

  void attention() {
    const int64_t heads = 10, kv_heads = 2, dim = 128, tokens = 700;
    const std::vector<float> qkv = randoms(random_, tokens * (heads + 2 * kv_heads) * dim);
    for (const KvSeal seal : {KvSeal::kNone, KvSeal::kInt8, KvSeal::kInt4}) {
      const auto run = [&](Backend& backend) {
        const Placed in(backend, tokens, qkv), out(backend, tokens, heads * dim);
        AttentionInput input;
        input.heads = heads;
        input.layout = {DType::kBF16, kv_heads, dim};
        input.sealed = {seal, kv_heads, dim};
        input.qk_norm = true;
        input.qk_norm_eps = 1e-5f;
        std::vector<Buffer> buffers;
        const auto pages = [&](int64_t count, size_t bytes) {
          std::vector<void*> table;
          for (int64_t i = 0; i < count; ++i) {
            buffers.push_back(backend.allocate(bytes));
            table.push_back(buffers.back().data());
          }
          return table;
        };
        const auto open = pages(tokens / kPageTokens + 1, input.layout.page_bytes());
        const auto sealed = pages(seal == KvSeal::kNone ? 0 : tokens / kPageTokens,
                                  seal == KvSeal::kNone ? 0 : input.sealed.page_bytes());
        AttentionSegment segment;
        // The last rows one by one, as they are decoded.
        constexpr int64_t kDecoded = 3;
        for (int64_t first = 0; first < tokens; first += segment.rows) {
          segment.rows = first == 0 ? tokens - kDecoded : 1;
          segment.position = first;
          segment.first_open = first / kPageTokens;
          segment.open = std::span(open).subspan(static_cast<size_t>(segment.first_open));
          segment.sealed = seal == KvSeal::kNone
                               ? std::span(open).first(static_cast<size_t>(segment.first_open))
                               : std::span(sealed);
          input.segments = {&segment, 1};
          input.qkv = in.rows.slice(first, segment.rows);
          backend.attention(out.rows.slice(first, segment.rows), input);
        }
        return out.values();
      };
      const char* const names[] = {"bf16", "int8", "int4"};
      // A key on the other side of a rounding.
      add(std::string("attention over ") + names[static_cast<int>(seal)] + " pages", run, ref_,
          2 * kEpsBF16);
    }
  }

  // The column of the largest element, and the candidates that a draw needs, of each row.
  void choice() {
    const int64_t rows = 5, cols = 202048;
    std::vector<float> x = randoms(random_, rows * cols, 3);
    for (int64_t r = 0; r < rows; ++r)  // ties
      x[static_cast<size_t>(r * cols + cols / 2)] = x[static_cast<size_t>(r * cols + 77 * r)] = 20;
    const auto largest = [&](Backend& backend) {
      const Placed in(backend, rows, x);
      std::vector<int32_t> columns(rows);
      backend.argmax(columns, in.rows);
      return std::vector<float>(columns.begin(), columns.end());
    };
    add("argmax", largest, cpu_, 0);
    const double temperature = 0.6;
    const Placed in(gpu_, rows, x);
    const auto all = gpu_.candidates(in.rows, std::vector<double>(rows, temperature));
    std::vector<float> got, expected;
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<Candidate> found = all[static_cast<size_t>(r)].largest, order;
      double total = 0;
      for (int64_t c = 0; c < cols; ++c) {
        const float logit = x[static_cast<size_t>(r * cols + c)];
        order.push_back({logit, static_cast<int32_t>(c)});
        total += std::exp((static_cast<double>(logit) - 20) / temperature);
      }
      std::sort(order.begin(), order.end(), is_likelier);
      std::sort(found.begin(), found.end(), is_likelier);
      const Candidates& of = all[static_cast<size_t>(r)];
      got.push_back(std::abs(of.total - total) <= of.error * total && !found.empty() ? 1.0f : 0.0f);
      expected.push_back(1);
      for (size_t i = 0; i < found.size(); ++i) {
        got.push_back(static_cast<float>(found[i].id));
        expected.push_back(static_cast<float>(order[i].id));
      }
    }
    compare("candidates", got, expected, "a sorted row", 0);
  }

  int failures() const { return failures_; }

 private:
  void add(const std::string& name, const std::function<std::vector<float>(Backend&)>& run,
           Backend& truth, double tolerance) {
    compare(name, run(gpu_), run(truth), truth.name(), tolerance);
  }
  void compare(const std::string& name, const std::vector<float>& got,
               const std::vector<float>& expected, const char* truth, double tolerance) {
    const double apart = difference(got, expected);
    const bool right = apart <= tolerance;
    failures_ += !right;
    std::cerr << (right ? "right  " : "WRONG  ") << name << ": " << apart << " from " << truth
              << ", " << tolerance << " allowed\n";
  }

  Backend &gpu_, &cpu_, &ref_;
  std::mt19937 random_{std::random_device{}()};
  int failures_ = 0;
};

// --- fast ----------------------------------------------------------------------------------------

class Timings {
 public:
  Timings(Backend& gpu, const DeviceCeilings& ceilings, bool small)
      : gpu_(gpu), ceilings_(ceilings), small_(small) {}

  // A product with so many sets of weights that none is in a cache when its turn comes.
  void product(Report& report, const std::string& name, int64_t rows, int64_t cols,
               WeightFormat format) {
    if (small_) {
      rows = rows / 64 + 1;
      cols = cols / 64 + 1;
    }
    // Random bytes are as good as weights, and are there at once.
    constexpr size_t kAlignment = 64;
    const size_t size = packed_bytes(format, rows, cols);
    std::vector<uint64_t> words(size / sizeof(uint64_t) + kAlignment);
    for (uint64_t& word : words) word = words_();
    void* place = words.data();
    size_t space = words.size() * sizeof(uint64_t);
    std::align(kAlignment, size, place, space);
    std::vector<WeightRef> sets;
    constexpr int64_t kAtLeast = int64_t{512} << 20;
    do
      sets.push_back(gpu_.adopt_matrix(format, rows, cols, {std::shared_ptr<const void>(), place}));
    while (!small_ && std::ssize(sets) * static_cast<int64_t>(size) < kAtLeast);
    for (const int64_t count : {1, 8, 64, 512, 2048}) {
      if (count > 512 && rows * cols > (int64_t{1} << 28)) continue;  // a head is for few rows
      const Placed x(gpu_, count, randoms(random_, count * cols)), out(gpu_, count, rows);
      const double seconds = seconds_each([&](int64_t i) {
        gpu_.matmul(out.rows, x.rows, sets[static_cast<size_t>(i % std::ssize(sets))]);
      });
      const double bytes =
          static_cast<double>(size) + 4.0 * static_cast<double>(count * (rows + cols));
      row(report, name + " " + name_of(format), count, seconds, bytes,
          2.0 * static_cast<double>(count * rows * cols));
    }
  }

  // Until the host has it: what a token is chosen by, beside the whole rows. Logits are as widely
  // apart as a model's, so that there are candidates.
  void choice(Report& report) {
    const int64_t cols = small_ ? 3000 : 202048;
    for (const int64_t count : {1, 8, 64}) {
      const Placed x(gpu_, count, randoms(random_, count * cols, 3));
      const auto in_rows = [&](const std::string& name, const std::function<void()>& run) {
        const double seconds = seconds_each([&](int64_t) { run(); });
        row(report, name, count, seconds, 4.0 * static_cast<double>(count * cols), 0);
      };
      std::vector<int32_t> columns(static_cast<size_t>(count));
      in_rows("argmax", [&] { gpu_.argmax(columns, x.rows); });
      const std::vector<double> temperatures(columns.size(), 0.6);
      in_rows("candidates", [&] { gpu_.candidates(x.rows, temperatures); });
      std::vector<float> host(static_cast<size_t>(count * cols));
      in_rows("logits to the host", [&] { gpu_.to_host(host.data(), x.rows); });
    }
  }

  // `rows` rows after `depth` tokens, on a layer that keeps everything, or after the full pages of
  // a chunk. Pages are of so many sets that none is in a cache when its turn comes.
  void attention(Report& report, int64_t rows, int64_t depth, KvSeal seal) {
    if (small_) depth = depth / 1000 / kPageTokens * kPageTokens;
    if (small_) rows = std::min<int64_t>(rows, 20);
    const int64_t heads = 40, kv_heads = 8, dim = 128;
    AttentionInput input;
    input.heads = heads;
    input.layout = {DType::kBF16, kv_heads, dim};
    input.sealed = {seal, kv_heads, dim};
    const bool seals = seal != KvSeal::kNone;
    const int64_t own = (depth + rows - 1) / kPageTokens + 1 - depth / kPageTokens;
    const size_t page_bytes = seals ? input.sealed.page_bytes() : input.layout.page_bytes();
    const int64_t before = depth / kPageTokens;
    struct Cache {
      std::vector<Buffer> buffers;
      std::vector<void*> sealed, open;
    };
    std::vector<Cache> caches;
    int64_t bytes = 0;
    constexpr int64_t kAtLeast = int64_t{512} << 20;
    do {
      Cache& cache = caches.emplace_back();
      const auto page = [&](std::vector<void*>& pages, size_t size) {
        cache.buffers.push_back(gpu_.allocate(size));
        pages.push_back(cache.buffers.back().data());
        bytes += static_cast<int64_t>(size);
      };
      for (int64_t i = 0; i < before; ++i) page(cache.sealed, page_bytes);
      for (int64_t i = 0; i < own; ++i) page(cache.open, input.layout.page_bytes());
      for (int64_t i = 0; seals && i < own; ++i) page(cache.sealed, page_bytes);
    } while (!small_ && bytes < kAtLeast);
    const Placed qkv(gpu_, rows, randoms(random_, rows * (heads + 2 * kv_heads) * dim));
    const Placed out(gpu_, rows, heads * dim);
    input.qkv = qkv.rows;
    AttentionSegment segment;
    segment.rows = rows;
    segment.position = depth;
    segment.first_open = before;
    input.segments = {&segment, 1};
    const double seconds = seconds_each([&](int64_t i) {
      Cache& cache = caches[static_cast<size_t>(i % std::ssize(caches))];
      // Sealed: those that are full after this.
      const int64_t full = seals ? (depth + rows) / kPageTokens : before;
      segment.sealed = std::span(cache.sealed).first(static_cast<size_t>(full));
      segment.open = cache.open;
      gpu_.attention(out.rows, input);
    });
    double seen = 0;  // by all rows together
    for (int64_t r = 0; r < rows; ++r) seen += static_cast<double>(depth + r + 1);
    const double read = static_cast<double>(before) * static_cast<double>(page_bytes) +
                        static_cast<double>(own) * static_cast<double>(input.layout.page_bytes());
    row(report,
        std::string("attention after ") + std::to_string(depth) + ", " +
            (seal == KvSeal::kNone   ? "bf16"
             : seal == KvSeal::kInt8 ? "int8"
                                     : "int4"),
        rows, seconds, read, 4.0 * seen * static_cast<double>(heads * dim));
  }

 private:
  // Seconds of run(i), of many in a row.
  double seconds_each(const std::function<void(int64_t)>& run) {
    const auto batch = [&](int64_t count) {
      return seconds_of([&] {
        for (int64_t i = 0; i < count; ++i) run(i);
        float waited = 0;
        gpu_.to_host(&waited, {mark_.rows.data, 1, 1});
      });
    };
    batch(1);
    const double once = batch(1);
    constexpr double kBatchSeconds = 0.05;
    const int64_t count =
        small_ ? 1 : std::clamp<int64_t>(static_cast<int64_t>(kBatchSeconds / once), 3, 1000);
    std::vector<double> each;
    for (int round = 0; round < (small_ ? 1 : 5); ++round)
      each.push_back(batch(count) / static_cast<double>(count));
    return median(each);
  }

  void row(Report& report, const std::string& name, int64_t rows, double seconds, double bytes,
           double operations) const {
    report.row({{"operation", name},
                {"rows", rows},
                {"us", seconds * 1e6},
                {"GB/s", bytes / seconds / 1e9},
                {"% of read", 100 * bytes / seconds / ceilings_.read()},
                {"TOP/s", operations / seconds / 1e12},
                {"% of int8", 100 * operations / seconds / ceilings_.int8()}});
  }

  Backend& gpu_;
  const DeviceCeilings& ceilings_;
  bool small_;
  std::mt19937 random_{1};
  std::mt19937_64 words_{1};
  Placed mark_{gpu_, 1, 1};
};

}  // namespace

int run_cuda(int argc, char** argv) {
  const Arguments arguments(
      "cuda",
      {{"device", "N", "which GPU (default: 0)"},
       {"check", nullptr, "only whether results are right"},
       {"time", nullptr, "only the timings, right or not"},
       {"only", "NAME", "products, experts, norms, attention, vision or choice"},
       {"warpgroups", nullptr, "products of many rows by warpgroups (Hopper)"},
       {"small", nullptr, "tiny shapes, to see that it runs"},
       {"json", nullptr, "the timings as JSON"},
       {"help", nullptr, "this text"}},
      argc, argv);
  if (arguments.wants_help()) {
    std::cout << arguments.help();
    return 0;
  }
  const auto ordinal = static_cast<int>(arguments.integer("device", 0, 0, 1000));
  const std::string device = "cuda:" + std::to_string(ordinal);
  const std::string only = arguments.text("only", "");
  for (const char* name : {"products", "experts", "norms", "attention", "vision", "choice", ""}) {
    if (only == name) break;
    if (*name == '\0')
      fail(ErrorCode::kInvalidRequest, "--only is '", only,
           "'; it must be products, experts, norms, attention, vision or choice");
  }
  const auto wanted = [&](const char* name) { return only.empty() || only == name; };
  if (arguments.has("warpgroups")) setenv("PUNA_CUDA_PRODUCTS", "warpgroups", 1);
  const auto gpu = make_backend(device, {}), cpu = make_backend("cpu", {});
  const auto ref = make_backend("ref", {});
  if (!arguments.has("time")) {
    Checks checks(*gpu, *cpu, *ref);
    if (wanted("products")) checks.products();
    if (wanted("experts")) checks.experts();
    if (wanted("norms")) checks.norms();
    if (wanted("attention")) checks.attention();
    if (wanted("vision")) checks.vision();
    if (wanted("choice")) checks.choice();
    if (arguments.has("check") || checks.failures() > 0) return checks.failures() > 0 ? 1 : 0;
  }

  const DeviceCeilings ceilings(ordinal, arguments.has("small"));
  Timings timings(*gpu, ceilings, arguments.has("small"));
  Report report;
  report.fact("device", gpu->description());
  report.fact("read GB/s", ceilings.read() / 1e9);
  report.fact("copy GB/s", ceilings.copy() / 1e9);
  report.fact("int8 TOP/s", ceilings.int8() / 1e12);
  report.fact("bf16 TFLOP/s", ceilings.bf16() / 1e12);
  const WeightFormat int4 = WeightFormat::kInt4G128, int8 = WeightFormat::kInt8G32;
  if (wanted("products")) {
    timings.product(report, "q, k and v", 7168, 5120, int8);
    timings.product(report, "attention's output", 5120, 5120, int8);
    timings.product(report, "gate and up", 16384, 5120, int4);
    timings.product(report, "down", 5120, 8192, int4);
    timings.product(report, "head", 202048, 5120, int8);
  }
  if (wanted("attention")) {
    for (const KvSeal seal : {KvSeal::kNone, KvSeal::kInt8, KvSeal::kInt4})
      for (const int64_t depth : {7936, 131072, 1048576}) timings.attention(report, 1, depth, seal);
    for (const auto [rows, depth] : {std::array<int64_t, 2>{2048, 0}, {512, 7680}, {2048, 131072}})
      timings.attention(report, rows, depth, KvSeal::kNone);
    timings.attention(report, 2048, 131072, KvSeal::kInt8);
  }
  if (wanted("choice")) timings.choice(report);
  report.print(std::cout, arguments.has("json"));
  return 0;
}

}  // namespace puna::bench
