#include "backend/checks.h"

#include <algorithm>
#include <sstream>
#include <string>

#include "base/error.h"
#include "quant/blocks.h"
#include "quant/encode.h"

namespace puna {
namespace {

std::string shape(int64_t rows, int64_t cols) {
  std::ostringstream text;
  text << "(" << rows << ", " << cols << ")";
  return text.str();
}

void check_rows(const char* where, const char* name, ConstRows x, int64_t rows, int64_t cols) {
  if (x.rows != rows || x.cols != cols)
    fail(ErrorCode::kInternal, "[", where, "] ", name, " is ", shape(x.rows, x.cols), ", expected ",
         shape(rows, cols));
  if (x.rows > 0 && (x.data == nullptr || x.stride < x.cols))
    fail(ErrorCode::kInternal, "[", where, "] ", name, " ", shape(x.rows, x.cols),
         " has no memory or rows that overlap (stride ", x.stride, ")");
}

void check_weight(const char* where, const char* name, const WeightRef& weight, int64_t rows,
                  int64_t cols) {
  if (weight.rows != rows || weight.cols != cols || weight.data == nullptr)
    fail(ErrorCode::kInternal, "[", where, "] ", name, " is ", shape(weight.rows, weight.cols),
         ", expected ", shape(rows, cols));
}

void check_vector(const char* where, const char* name, const VectorRef& vector, int64_t size) {
  if (vector.size != size || vector.data == nullptr)
    fail(ErrorCode::kInternal, "[", where, "] ", name, " has ", vector.size, " elements, expected ",
         size);
}

void check_float(const char* where, DType dtype) {
  if (dtype != DType::kF32 && dtype != DType::kF16 && dtype != DType::kBF16)
    fail(ErrorCode::kUnsupported, "[", where, "] ", name_of(dtype),
         " is not supported; float32, float16 and bfloat16 are");
}

void check_index(const char* where, std::span<const int32_t> index, int64_t rows) {
  for (const int32_t i : index)
    if (i < 0 || i >= rows)
      fail(ErrorCode::kInternal, "[", where, "] index ", i, " is outside the ", rows, " rows");
}

// Every page that the rows of the segment read or write is there. `reads`: attention of a row is
// wanted; otherwise earlier pages need not be there.
void check_pages(const AttentionSegment& segment, bool seals, bool reads) {
  const int64_t first = segment.position - segment.first_position;
  const int64_t tokens = first + segment.rows, own = first / kPageTokens;
  const int64_t pages = pages_for(tokens);
  const auto open = static_cast<int64_t>(segment.open.size());
  const auto sealed = static_cast<int64_t>(segment.sealed.size());
  if (segment.first_position < 0 || first < 0 || segment.first_open < 0 ||
      segment.first_open > own || pages - segment.first_open > open)
    fail(ErrorCode::kInternal, "[attention] positions ", segment.first_position, " to ",
         segment.position + segment.rows, " do not fit ", open, " pages of ", kPageTokens,
         " that are open from page ", segment.first_open, " on");
  const int64_t past = seals ? tokens / kPageTokens : segment.first_open;
  if (past > sealed)
    fail(ErrorCode::kInternal, "[attention] ", past, " sealed pages are needed, there are ",
         sealed);
  if (!segment.key_scales.empty() && segment.key_scales.size() != segment.sealed.size())
    fail(ErrorCode::kInternal, "[attention] key scales of ", segment.key_scales.size(), " of ",
         sealed, " sealed pages");
  const auto missing = [](std::span<void* const> table, int64_t begin, int64_t end) {
    const auto part = table.subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin));
    return std::find(part.begin(), part.end(), nullptr) != part.end();
  };
  // What comes through a stream is null; what is written here cannot come through one.
  const bool open_missing =
      missing(segment.open, (seals ? own : segment.first_open) - segment.first_open,
              pages - segment.first_open);
  if (open_missing || (reads && segment.stream == nullptr && missing(segment.sealed, 0, past)) ||
      (seals && past > own && missing(segment.sealed, own, past)))
    fail(ErrorCode::kInternal, "[attention] a page is missing");
}

void check_feed_forward(const char* where, const char* name, const WeightRef& gate_up,
                        const WeightRef& down, int64_t hidden) {
  const std::string prefix = name;
  if (gate_up.rows % 2 != 0)
    fail(ErrorCode::kInternal, "[", where, "] ", prefix, "gate_up has ", gate_up.rows,
         " rows, expected gate and up of the same size");
  check_weight(where, (prefix + "gate_up").c_str(), gate_up, gate_up.rows, hidden);
  check_weight(where, (prefix + "down").c_str(), down, hidden, gate_up.rows / 2);
}

void check_expert_matrices(const char* where, std::span<const WeightRef> gate_up,
                           std::span<const WeightRef> down, int64_t hidden) {
  if (down.size() != gate_up.size())
    fail(ErrorCode::kInternal, "[", where, "] ", gate_up.size(), " experts have gate_up, ",
         down.size(), " have down");
  for (size_t e = 0; e < gate_up.size(); ++e) {
    check_feed_forward(where, "expert ", gate_up[e], down[e], hidden);
    if (gate_up[e].rows != gate_up[0].rows || gate_up[e].format != gate_up[0].format ||
        down[e].format != down[0].format)
      fail(ErrorCode::kInternal, "[", where, "] expert ", e,
           " differs from expert 0 in size or format");
  }
}

}  // namespace

MatrixShape check_matrix_parts(std::span<const MatrixSource> parts, const MatrixOptions& options) {
  if (parts.empty()) fail(ErrorCode::kInternal, "[load_matrix] no parts");
  MatrixShape whole{0, parts[0].cols, parts[0].dtype};
  // What is quantised anew may come from any types.
  const bool any_types = options.format && can_encode(*options.format);
  for (const MatrixSource& part : parts) {
    const int64_t block = info_of(part.dtype).block_elements;
    const bool scaled = part.dtype == DType::kF8E4M3;
    if (block == 1 && !scaled) check_float("load_matrix", part.dtype);
    if (scaled && (part.scales.data == nullptr || part.scales.rows_each < 1))
      fail(ErrorCode::kInternal, "[load_matrix] a part is ", name_of(part.dtype),
           " without scales");
    if (scaled) check_float("load_matrix", part.scales.dtype);
    if (part.cols != whole.cols || (part.dtype != whole.dtype && !any_types))
      fail(ErrorCode::kInternal, "[load_matrix] a part is ", name_of(part.dtype), " ",
           shape(part.rows, part.cols), ", the first has ", name_of(whole.dtype), " and ",
           whole.cols, " columns");
    if (part.rows < 1 || part.cols < 1 || part.data == nullptr)
      fail(ErrorCode::kInternal, "[load_matrix] a part ", shape(part.rows, part.cols),
           " is empty or has no memory");
    if (block > 1 &&
        (part.col_stride != 1 || part.cols % block != 0 || part.row_stride % block != 0))
      fail(ErrorCode::kInternal, "[load_matrix] rows of ", part.cols, " columns are not whole ",
           "blocks of ", block, " ", name_of(part.dtype));
    whole.rows += part.rows;
  }
  return whole;
}

WeightFormat target_format(const MatrixShape& shape, const MatrixOptions& options) {
  const std::optional<WeightFormat> exact = exact_format(shape.dtype);
  const WeightFormat format = options.format.value_or(exact.value_or(WeightFormat::kF32));
  const bool possible = !is_quantized(format) || format == exact || can_encode(format);
  if (!possible)
    fail(ErrorCode::kUnsupported, "[load_matrix] ", name_of(shape.dtype),
         " weights cannot be quantised to ", name_of(format));
  if (format == WeightFormat::kF32 && (is_blocked(shape.dtype) || shape.dtype == DType::kF8E4M3))
    fail(ErrorCode::kUnsupported, "[load_matrix] ", name_of(shape.dtype),
         " weights are not unpacked to fp32; leave the format out to keep them as stored");
  if (format == WeightFormat::kBF16 && shape.dtype != DType::kBF16)
    fail(ErrorCode::kUnsupported, "[load_matrix] ", name_of(shape.dtype),
         " weights are not packed as bf16; leave the format out to keep them as stored");
  return format;
}

void check_adopted(WeightFormat format, int64_t rows, int64_t cols, const void* data) {
  constexpr uintptr_t kAlignment = 64;
  if (rows < 1 || cols < 1 || data == nullptr ||
      reinterpret_cast<uintptr_t>(data) % kAlignment != 0)
    fail(ErrorCode::kInternal, "[adopt_matrix] ", name_of(format), " ", shape(rows, cols),
         " is empty or not aligned to ", kAlignment, " bytes");
}

int64_t check_vector_parts(std::span<const TensorRef> parts) {
  int64_t size = 0;
  for (const TensorRef& part : parts) {
    check_float("load_vector", part.dtype);
    if (part.elements() > 0 && part.data == nullptr)
      fail(ErrorCode::kInternal, "[load_vector] a part ", part.shape_string(), " has no memory");
    size += part.elements();
  }
  if (size == 0) fail(ErrorCode::kInternal, "[load_vector] no elements");
  return size;
}

void check_embed(ConstRows out, const TensorRef& table, std::span<const int32_t> ids) {
  if (!is_blocked(table.dtype)) check_float("embed", table.dtype);
  if (table.rank != 2 || table.data == nullptr)
    fail(ErrorCode::kInternal, "[embed] the table is ", table.shape_string(),
         ", expected (vocabulary, hidden)");
  check_rows("embed", "out", out, static_cast<int64_t>(ids.size()), table.shape[1]);
  for (const int32_t id : ids)
    if (id < 0 || id >= table.shape[0])
      fail(ErrorCode::kInvalidRequest, "[embed] token id ", id, " is outside the vocabulary of ",
           table.shape[0], " (0 to ", table.shape[0] - 1, ")");
}

void check_gather(ConstRows out, ConstRows x, std::span<const int32_t> index) {
  check_rows("gather", "x", x, x.rows, x.cols);
  check_rows("gather", "out", out, static_cast<int64_t>(index.size()), x.cols);
  check_index("gather", index, x.rows);
}

void check_scatter(ConstRows out, ConstRows x, std::span<const int32_t> index) {
  check_rows("scatter", "out", out, out.rows, out.cols);
  check_rows("scatter", "x", x, static_cast<int64_t>(index.size()), out.cols);
  check_index("scatter", index, out.rows);
}

void check_rms_norm(ConstRows out, ConstRows x, const VectorRef& weight) {
  check_rows("rms_norm", "x", x, x.rows, x.cols);
  check_rows("rms_norm", "out", out, x.rows, x.cols);
  check_vector("rms_norm", "weight", weight, x.cols);
}

void check_layer_norm(ConstRows out, ConstRows x, const VectorRef& weight, const VectorRef& bias) {
  check_rows("layer_norm", "x", x, x.rows, x.cols);
  check_rows("layer_norm", "out", out, x.rows, x.cols);
  check_vector("layer_norm", "weight", weight, x.cols);
  check_vector("layer_norm", "bias", bias, x.cols);
}

void check_matmul(ConstRows out, ConstRows x, const WeightRef& weight,
                  const MatmulOptions& options) {
  if (x.cols != weight.cols || weight.data == nullptr)
    fail(ErrorCode::kInternal, "[matmul] x is ", shape(x.rows, x.cols),
         ", the weight wants k = ", weight.cols);
  check_rows("matmul", "x", x, x.rows, x.cols);
  check_rows("matmul", "out", out, x.rows, weight.rows);
  if (options.bias != nullptr) check_vector("matmul", "bias", *options.bias, weight.rows);
}

void check_mlp(ConstRows residual, ConstRows x, const WeightRef& gate_up, const WeightRef& down) {
  check_rows("mlp", "x", x, x.rows, x.cols);
  check_rows("mlp", "residual", residual, x.rows, x.cols);
  check_feed_forward("mlp", "", gate_up, down, x.cols);
}

void check_moe(ConstRows residual, ConstRows x, const MoeWeights& weights) {
  check_rows("moe", "x", x, x.rows, x.cols);
  check_rows("moe", "residual", residual, x.rows, x.cols);
  const auto experts = static_cast<int64_t>(weights.gate_up.size());
  check_weight("moe", "router", weights.router, experts, x.cols);
  if (weights.router.format != WeightFormat::kF32)
    fail(ErrorCode::kInternal, "[moe] the router is not float32");
  if (weights.top_k < 1 || weights.top_k > experts)
    fail(ErrorCode::kInternal, "[moe] top_k is ", weights.top_k, " of ", experts, " experts");
  check_feed_forward("moe", "shared_", weights.shared_gate_up, weights.shared_down, x.cols);
  check_expert_matrices("moe", weights.gate_up, weights.down, x.cols);
}

void check_experts(ConstRows out, ConstRows x, const Routing& routing,
                   std::span<const WeightRef> gate_up, std::span<const WeightRef> down) {
  const int64_t slots = std::ssize(routing.row);
  check_rows("experts", "x", x, x.rows, x.cols);
  check_rows("experts", "out", out, slots, x.cols);
  check_expert_matrices("experts", gate_up, down, x.cols);
  if (routing.offset.size() != gate_up.size() + 1 || routing.offset.back() != slots)
    fail(ErrorCode::kInternal, "[experts] the routing is of ", routing.offset.size(),
         " - 1 experts and ", slots, " slots, there are ", gate_up.size(), " experts");
  for (const int64_t row : routing.row)
    if (row < 0 || row >= x.rows)
      fail(ErrorCode::kInternal, "[experts] row ", row, " of ", x.rows, " rows");
}

void check_attention(ConstRows out, const AttentionInput& input) {
  const KvPageLayout& layout = input.layout;
  if (layout.dtype != DType::kF32 && layout.dtype != DType::kBF16)
    fail(ErrorCode::kUnsupported, "[attention] pages of ", name_of(layout.dtype),
         "; float32 and bfloat16 are supported");
  if (layout.kv_heads < 1 || layout.head_dim < 1 || input.heads < 1 ||
      input.heads % layout.kv_heads != 0)
    fail(ErrorCode::kInternal, "[attention] ", input.heads, " query heads of ", layout.head_dim,
         " share ", layout.kv_heads, " KV heads");
  if ((input.cos == nullptr) != (input.sin == nullptr) ||
      (input.cos != nullptr && layout.head_dim % 2 != 0))
    fail(ErrorCode::kInternal, "[attention] RoPE needs cos, sin and an even head_dim (",
         layout.head_dim, ")");
  const KvSealedLayout& sealed = input.sealed;
  const bool seals = sealed.format != KvSeal::kNone;
  if (seals && (sealed.kv_heads != layout.kv_heads || sealed.head_dim != layout.head_dim))
    fail(ErrorCode::kInternal, "[attention] open pages have ", layout.kv_heads, " heads of ",
         layout.head_dim, ", sealed ones ", sealed.kv_heads, " of ", sealed.head_dim);
  if (seals && layout.head_dim > kSealedMostDim)
    fail(ErrorCode::kUnsupported, "[attention] heads of ", layout.head_dim,
         " channels cannot be sealed into fewer bits, only up to ", kSealedMostDim,
         "; keep the KV cache in bf16");
  const ConstRows qkv = input.qkv;
  check_rows("attention", "qkv", qkv, qkv.rows,
             (input.heads + 2 * layout.kv_heads) * layout.head_dim);
  int64_t wanted = qkv.rows;
  if (input.queries) {
    wanted = static_cast<int64_t>(input.queries->size());
    check_index("attention", *input.queries, qkv.rows);
    for (int64_t i = 1; i < wanted; ++i)
      if ((*input.queries)[i - 1] >= (*input.queries)[i])
        fail(ErrorCode::kInternal, "[attention] the wanted rows are not in ascending order");
  }
  check_rows("attention", "out", out, wanted, input.heads * layout.head_dim);

  int64_t next_row = 0;
  for (const AttentionSegment& segment : input.segments) {
    if (segment.first_row != next_row || segment.rows < 1 || segment.rows > qkv.rows - next_row)
      fail(ErrorCode::kInternal, "[attention] a segment has rows ", segment.first_row, " + ",
           segment.rows, ", expected to begin at ", next_row, " of ", qkv.rows);
    next_row += segment.rows;
    check_pages(segment, seals, wanted > 0);
    if (segment.mode != nullptr && segment.report == nullptr)
      fail(ErrorCode::kInternal, "[attention] a mode without a report");
  }
  if (next_row != qkv.rows)
    fail(ErrorCode::kInternal, "[attention] the segments cover ", next_row, " of ", qkv.rows,
         " rows");
}

void check_vision_attention(ConstRows out, ConstRows qkv, int64_t tiles, int64_t tokens,
                            int64_t heads, const float* cos, const float* sin, DType operands) {
  if (tiles < 0 || tokens < 1 || heads < 1 || qkv.cols % (3 * heads) != 0 ||
      qkv.cols / (3 * heads) % 2 != 0)
    fail(ErrorCode::kInternal, "[vision_attention] qkv has ", qkv.cols, " columns for ", heads,
         " heads of queries, keys and values");
  if (cos == nullptr || sin == nullptr) fail(ErrorCode::kInternal, "[vision_attention] no angles");
  if (operands != DType::kF32 && operands != DType::kBF16)
    fail(ErrorCode::kInternal, "[vision_attention] operands are float32 or bfloat16");
  check_rows("vision_attention", "qkv", qkv, tiles * tokens, qkv.cols);
  check_rows("vision_attention", "out", out, tiles * tokens, qkv.cols / 3);
}

void check_argmax(std::span<const int32_t> out, ConstRows x) {
  check_rows("argmax", "x", x, std::ssize(out), std::max<int64_t>(x.cols, 1));
}

void check_candidates(ConstRows x, std::span<const double> temperatures) {
  check_rows("candidates", "x", x, std::ssize(temperatures), std::max<int64_t>(x.cols, 1));
}

void check_unfold(ConstRows out, const float* pixels, int64_t tiles, int64_t size, int64_t patch) {
  if (tiles < 0 || patch < 1 || size < 1 || size % patch != 0 || (tiles > 0 && pixels == nullptr))
    fail(ErrorCode::kInternal, "[unfold] ", tiles, " tiles of ", size, " pixels in patches of ",
         patch);
  const int64_t grid = size / patch;
  check_rows("unfold", "out", out, tiles * grid * grid, 3 * patch * patch);
}

void check_pixel_shuffle(ConstRows out, ConstRows x, int64_t tiles, int64_t grid, int64_t factor) {
  if (tiles < 0 || grid < 1 || factor < 1 || grid % factor != 0)
    fail(ErrorCode::kInternal, "[pixel_shuffle] a grid of ", grid, " by a factor of ", factor);
  const int64_t small = grid / factor;
  check_rows("pixel_shuffle", "x", x, tiles * grid * grid, x.cols);
  check_rows("pixel_shuffle", "out", out, tiles * small * small, factor * factor * x.cols);
}

}  // namespace puna
