// puna-bench ops: every heavy kernel at the shapes of Llama 4 Scout, beside the machine's ceilings.
#include <algorithm>
#include <iostream>
#include <limits>
#include <string>
#include <vector>

#include "backend/kv_layout.h"
#include "bench.h"
#include "kernels/cpu/dispatch.h"
#include "platform/system.h"
#include "quant/format.h"

namespace puna::bench {
namespace {

// Llama 4 Scout: 40 heads over 8 KV heads of 128 channels.
constexpr int64_t kKvHeads = 8, kGroup = 5, kHeadDim = 128;
constexpr int64_t kPromptRows = 512;

enum class Bound { kRead, kBf16, kF32, kInt8 };

struct KernelCase {
  Case timing;
  std::string shape;
  Bound bound;
};

struct Machine {
  const KernelTable& kernels;
  ThreadPool& pool;
  const std::byte* memory;  // Ceilings::kBytes
};

// How a product is called, by element type.
struct Bf16 {
  using Element = uint16_t;
  static constexpr const char* kName = "gemm_bf16";
  static constexpr Bound kBound = Bound::kBf16;
  static constexpr Element kOne = 0x3f80;
  static auto gemm(const KernelTable& kernels) { return kernels.gemm_bf16; }
};
struct F32 {
  using Element = float;
  static constexpr const char* kName = "gemm_f32";
  static constexpr Bound kBound = Bound::kF32;
  static constexpr Element kOne = 1.0f;
  static auto gemm(const KernelTable& kernels) { return kernels.gemm_f32; }
};

std::string product_shape(int64_t rows, int64_t outputs, int64_t cols) {
  return std::to_string(rows) + " x " + std::to_string(cols) + " -> " + std::to_string(outputs);
}

// out = x W^T with W [outputs][cols]. One row is bound by reading W: then as many matrices as fill
// the memory are read one after the other, as the layers of a model would be.
template <class Type>
KernelCase product(const Machine& machine, int64_t rows, int64_t outputs, int64_t cols) {
  using Element = typename Type::Element;
  const int64_t panels = outputs / kPanelRows, panel_elements = cols * kPanelRows;
  const int64_t bytes = panels * panel_elements * static_cast<int64_t>(sizeof(Element));
  const bool one = rows == 1;
  const int64_t matrices = one ? Ceilings::kBytes / bytes : 1;
  const auto* weights = reinterpret_cast<const Element*>(machine.memory);

  auto run = [machine, rows, outputs, cols, panels, panel_elements, matrices, weights,
              x = std::vector<Element>(rows * cols, Type::kOne),
              out = std::vector<float>(rows * outputs)]() mutable {
    for (int64_t matrix = 0; matrix < matrices; ++matrix) {
      machine.pool.run([&](const Lane& lane) {
        const Part part = lane.part(panels, kStripPanels);
        for (int64_t panel = part.begin; panel < part.end; panel += kStripPanels) {
          Type::gemm(machine.kernels)(out.data() + panel * kPanelRows, outputs, x.data(), cols,
                                      weights + (matrix * panels + panel) * panel_elements, nullptr,
                                      rows, cols,
                                      std::min(kStripPanels, part.end - panel) * kPanelRows);
        }
      });
    }
  };
  const double work = one ? static_cast<double>(bytes) * matrices : 2.0 * rows * outputs * cols;
  return {{Type::kName, work, run, {}},
          product_shape(rows, outputs, cols),
          one ? Bound::kRead : Type::kBound};
}

// The same with weights in panels of `format`, any bytes of which are weights. gemm(out, panel)
// multiplies all rows with one panel.
template <class Gemm>
KernelCase panel_product(const Machine& machine, std::string name, Bound bound, WeightFormat format,
                         int64_t rows, int64_t outputs, int64_t cols, Gemm gemm) {
  const int64_t panels = outputs / kPanelRows;
  const auto bytes = static_cast<int64_t>(panel_bytes(format, cols));
  const bool one = rows == 1;
  const int64_t matrices = one ? Ceilings::kBytes / (panels * bytes) : 1;

  auto run = [machine, gemm, panels, bytes, matrices,
              out = std::vector<float>(rows * outputs)]() mutable {
    for (int64_t matrix = 0; matrix < matrices; ++matrix) {
      machine.pool.run([&](const Lane& lane) {
        const Part part = lane.part(panels);
        for (int64_t panel = part.begin; panel < part.end; ++panel)
          gemm(out.data() + panel * kPanelRows, machine.memory + (matrix * panels + panel) * bytes);
      });
    }
  };
  const double work =
      one ? static_cast<double>(panels * bytes * matrices) : 2.0 * rows * outputs * cols;
  return {{std::move(name), work, run, {}},
          product_shape(rows, outputs, cols),
          one ? Bound::kRead : bound};
}

KernelCase quantized_product(const Machine& machine, WeightFormat format, int64_t rows,
                             int64_t outputs, int64_t cols) {
  const int64_t groups = cols / group_of(format), spans = cols / kActivationGroup;
  const auto gemm = machine.kernels.gemm_quantized[quantized_index(format)];
  return panel_product(
      machine, std::string("gemm_quantized ") + name_of(format), Bound::kInt8, format, rows,
      outputs, cols,
      [=, codes = std::vector<int8_t>(rows * cols, 1),
       scales = std::vector<float>(rows * spans, 1.0f),
       sums = std::vector<int32_t>(rows * groups, static_cast<int32_t>(cols / groups))](
          float* out, const void* panel) {
        gemm(out, outputs, {codes.data(), scales.data(), sums.data(), cols, spans, groups}, panel,
             nullptr, rows, kPanelRows);
      });
}

KernelCase fp8_product(const Machine& machine, int64_t rows, int64_t outputs, int64_t cols) {
  const auto gemm = machine.kernels.gemm_fp8;
  return panel_product(
      machine, "gemm_fp8", Bound::kF32, WeightFormat::kFP8, rows, outputs, cols,
      [=, x = std::vector<float>(rows * cols, 1.0f)](float* out, const void* panel) {
        gemm(out, outputs, x.data(), cols, panel, nullptr, rows, cols, kPanelRows);
      });
}

// The state of the queries of one head, and memory for a kernel to work in.
struct Queries {
  std::vector<float> m, l, o;
  Memory scratch;

  Queries(int64_t rows, size_t scratch_bytes)
      : m(rows), l(rows), o(rows * kHeadDim), scratch(scratch_bytes) {}
  void reset() {
    std::fill(m.begin(), m.end(), -std::numeric_limits<float>::infinity());
    std::fill(l.begin(), l.end(), 0.0f);
    std::fill(o.begin(), o.end(), 0.0f);
  }
};

// Attention of `positions` new tokens over the pages of `context` in one layer, `work` operations.
// The lanes share the KV heads; layers of pages lie one after the other in memory. attend(queries,
// head, page, number of the page, whether it is the last) computes one head of one page. Decoding,
// one position, is bound by reading.
template <class Attend>
KernelCase attention_over(const Machine& machine, std::string name, Bound bound, double work,
                          int64_t page_bytes, size_t scratch_bytes, int64_t positions,
                          int64_t context, Attend attend) {
  const int64_t pages = context / kPageTokens, layer_bytes = pages * page_bytes;
  const bool decode = positions == 1;
  const int64_t layers = decode ? Ceilings::kBytes / layer_bytes : 1;

  auto run = [=] {
    machine.pool.run([&](Lane& lane) {
      const Part heads = lane.part(kKvHeads);
      Queries queries(positions * kGroup, scratch_bytes);
      for (int64_t layer = 0; layer < layers; ++layer) {
        for (int64_t head = heads.begin; head < heads.end; ++head) {
          queries.reset();
          for (int64_t page = 0; page < pages; ++page)
            attend(queries, head, machine.memory + layer * layer_bytes + page * page_bytes, page,
                   page + 1 == pages);
        }
      }
    });
  };
  return {{std::move(name), decode ? static_cast<double>(layer_bytes) * layers : work, run, {}},
          std::to_string(positions) + " of " + std::to_string(context) + " tokens",
          decode ? Bound::kRead : bound};
}

// Of the last `positions` of `context`.
KernelCase attention(const Machine& machine, DType dtype, int64_t positions, int64_t context) {
  const KvPageLayout layout{.dtype = dtype, .kv_heads = kKvHeads, .head_dim = kHeadDim};
  const int64_t rows = positions * kGroup;
  const auto attend =
      dtype == DType::kF32 ? machine.kernels.attend_page_f32 : machine.kernels.attend_page_bf16;
  // Each row and visible token: head_dim multiplies and adds for the score, as many for the value.
  const double seen = positions * (context - (positions - 1) / 2.0);
  return attention_over(
      machine, std::string("attend_page_") + (dtype == DType::kF32 ? "f32" : "bf16"), Bound::kF32,
      4.0 * kHeadDim * kGroup * kKvHeads * seen, static_cast<int64_t>(layout.page_bytes()),
      rows * kPageTokens * sizeof(float), positions, context,
      [=, q = std::vector<float>(rows * kHeadDim, 0.1f)](
          Queries& queries, int64_t head, const std::byte* start, int64_t page, bool) {
        std::vector<int32_t> visible(rows);
        for (int64_t row = 0; row < rows; ++row) {
          const int64_t tokens = context - positions + row / kGroup + 1 - page * kPageTokens;
          visible[row] = static_cast<int32_t>(std::clamp<int64_t>(tokens, 0, kPageTokens));
        }
        attend({.q = q.data(),
                .q_stride = kHeadDim,
                .visible = visible.data(),
                .k = start + layout.key_offset(head),
                .v = start + layout.value_offset(head),
                .next = nullptr,
                .rows = static_cast<int32_t>(rows),
                .head_dim = kHeadDim,
                .tokens = kPageTokens,
                .m = queries.m.data(),
                .l = queries.l.data(),
                .o = queries.o.data(),
                .scores = static_cast<float*>(queries.scratch.data())});
      });
}

// The same over sealed pages, all of which every row sees. Any bytes are codes; so that scores and
// outputs are numbers, the scales are the lowest of bfloat16's that memory of codes may hold:
// normal numbers from 2^-7 to 2^-5.
KernelCase sealed_attention(const Machine& machine, KvSeal format, int64_t positions,
                            int64_t context) {
  const KvSealedLayout layout{format, kKvHeads, kHeadDim};
  const int64_t rows = positions * kGroup;
  const auto attend = format == KvSeal::kInt8 ? machine.kernels.attend_sealed_int8
                                              : machine.kernels.attend_sealed_int4;
  return attention_over(
      machine, std::string("attend_sealed_") + (format == KvSeal::kInt8 ? "int8" : "int4"),
      Bound::kInt8, 4.0 * kHeadDim * kGroup * kKvHeads * positions * context,
      static_cast<int64_t>(layout.page_bytes()), rows * kSealedScratch, positions, context,
      [=, q = std::vector<float>(rows * kHeadDim, 0.1f)](
          Queries& queries, int64_t head, const std::byte* page, int64_t, bool is_last) {
        const auto* start = reinterpret_cast<const uint8_t*>(page);
        const uint8_t* next = is_last ? nullptr : start + layout.page_bytes();
        const auto scales = [&](size_t offset) {
          return reinterpret_cast<const uint16_t*>(start + offset);
        };
        attend({.q = q.data(),
                .q_stride = kHeadDim,
                .upper = start + layout.upper_offset(head),
                .lower = start + layout.lower_offset(head),
                .values = start + layout.value_offset(head),
                .key_scales = scales(layout.key_scale_offset(head)),
                .value_scales = scales(layout.value_scale_offset(head)),
                .next_upper = next ? next + layout.upper_offset(head) : nullptr,
                .next_lower = next ? next + layout.lower_offset(head) : nullptr,
                .next_key_scales =
                    next ? reinterpret_cast<const uint16_t*>(next + layout.key_scale_offset(head))
                         : nullptr,
                .rows = static_cast<int32_t>(rows),
                .head_dim = kHeadDim,
                .m = queries.m.data(),
                .l = queries.l.data(),
                .o = queries.o.data(),
                .scratch = queries.scratch.data()});
      });
}

}  // namespace

int run_ops(int argc, char** argv) {
  const Arguments arguments("ops",
                            {{"threads", "N", "compute threads (default: the usable cores)"},
                             {"isa", "NAME", "instruction set (default: the best)"},
                             {"only", "TEXT", "only kernels whose name and shape contain this"},
                             {"rounds", "N", "rounds of which the medians are taken (default 7)"},
                             {"json", nullptr, "print JSON"}},
                            argc, argv);
  if (arguments.wants_help()) {
    std::cout << arguments.help();
    return 0;
  }
  const KernelTable kernels = resolve_isa(arguments.text("isa", ""));
  ThreadPool pool(static_cast<int>(arguments.integer("threads", 0, 1, ThreadPool::kMaxLanes)));
  const int64_t rounds = arguments.integer("rounds", 7, 1, 1000);
  Ceilings ceilings(kernels, pool);
  const Machine machine{kernels, pool, static_cast<const std::byte*>(ceilings.memory())};

  std::vector<KernelCase> cases;
  for (int64_t rows : {int64_t{1}, kPromptRows}) {
    cases.push_back(product<Bf16>(machine, rows, 5120, 5120));
    cases.push_back(product<Bf16>(machine, rows, 16384, 5120));
    cases.push_back(product<Bf16>(machine, rows, 5120, 8192));
    cases.push_back(product<F32>(machine, rows, 5120, 5120));
    for (const WeightFormat format :
         {WeightFormat::kInt8G32, WeightFormat::kInt4G32, WeightFormat::kInt4G128,
          WeightFormat::kInt4MinG32, WeightFormat::kInt4K, WeightFormat::kInt6K})
      cases.push_back(quantized_product(machine, format, rows, 16384, 5120));
    cases.push_back(fp8_product(machine, rows, 16384, 5120));
  }
  for (DType dtype : {DType::kBF16, DType::kF32}) {
    cases.push_back(attention(machine, dtype, 1, 8192));
    cases.push_back(attention(machine, dtype, kPromptRows, 4096));
  }
  // Prompts come in tasks of as many rows as stay in the second cache (backend/cpu/attention.h).
  for (KvSeal format : {KvSeal::kInt8, KvSeal::kInt4}) {
    cases.push_back(sealed_attention(machine, format, 1, 8192));
    cases.push_back(sealed_attention(machine, format, 32, 4096));
  }

  const std::string only = arguments.text("only", "");
  std::erase_if(cases, [&](const KernelCase& kernel) {
    return (kernel.timing.name + " " + kernel.shape).find(only) == std::string::npos;
  });

  for (int64_t round = 0; round < rounds; ++round) {
    ceilings.sample();
    for (KernelCase& kernel : cases) kernel.timing.sample();
  }

  Report report;
  report.fact("processor", processor_name());
  report.fact("isa", std::string(kernels.isa));
  report.fact("threads", static_cast<int64_t>(pool.lanes()));
  report.fact("rounds", rounds);
  report.fact("read GB/s", ceilings.read() / 1e9);
  report.fact("bf16 peak GFLOP/s", ceilings.bf16() / 1e9);
  report.fact("f32 peak GFLOP/s", ceilings.f32() / 1e9);
  report.fact("int8 peak GOP/s", ceilings.int8() / 1e9);
  for (const KernelCase& kernel : cases) {
    const double ceiling = kernel.bound == Bound::kRead   ? ceilings.read()
                           : kernel.bound == Bound::kBf16 ? ceilings.bf16()
                           : kernel.bound == Bound::kInt8 ? ceilings.int8()
                                                          : ceilings.f32();
    report.row({{"kernel", kernel.timing.name},
                {"shape", kernel.shape},
                {"median", kernel.timing.median_rate() / 1e9},
                {"best", kernel.timing.best_rate() / 1e9},
                {"unit", std::string(kernel.bound == Bound::kRead   ? "GB/s"
                                     : kernel.bound == Bound::kInt8 ? "GOP/s"
                                                                    : "GFLOP/s")},
                {"% of ceiling", 100 * kernel.timing.median_rate() / ceiling}});
  }
  report.print(std::cout, arguments.has("json"));
  return 0;
}

}  // namespace puna::bench
