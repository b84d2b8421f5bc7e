#include "backend/ref/ref_backend.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <set>
#include <utility>

#include "backend/checks.h"
#include "backend/kv_seal.h"
#include "backend/source.h"
#include "base/error.h"
#include "base/half.h"
#include "quant/blocks.h"
#include "quant/encode.h"

namespace puna {
namespace {

using Doubles = std::vector<double>;

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }
double silu(double x) { return x * sigmoid(x); }
double gelu(double x) { return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0))); }

const float* values_of(const WeightRef& weight) {  // [rows][cols]
  return static_cast<const float*>(weight.data.get());
}

Doubles widened(const float* x, int64_t n) { return Doubles(x, x + n); }

// W x
Doubles product(const WeightRef& weight, const Doubles& x) {
  Doubles out(weight.rows);
  for (int64_t r = 0; r < weight.rows; ++r) {
    const float* row = values_of(weight) + r * weight.cols;
    for (int64_t c = 0; c < weight.cols; ++c) out[r] += x[c] * row[c];
  }
  return out;
}

// down(silu(gate(x)) * up(x))
Doubles feed_forward(const WeightRef& gate_up, const WeightRef& down, const Doubles& x) {
  const Doubles both = product(gate_up, x);
  const int64_t width = gate_up.rows / 2;
  Doubles activated(width);
  for (int64_t i = 0; i < width; ++i) activated[i] = silu(both[i]) * both[width + i];
  return product(down, activated);
}

void rotate(Doubles& head, const float* cos, const float* sin) {
  for (size_t i = 0; i < head.size() / 2; ++i) {
    const double a = head[2 * i], b = head[2 * i + 1];
    head[2 * i] = a * cos[i] - b * sin[i];
    head[2 * i + 1] = a * sin[i] + b * cos[i];
  }
}

double mean_square(const Doubles& x) {
  return std::inner_product(x.begin(), x.end(), x.begin(), 0.0) / static_cast<double>(x.size());
}

void normalise(Doubles& head, double eps) {
  const double factor = 1.0 / std::sqrt(mean_square(head) + eps);
  for (double& value : head) value *= factor;
}

void softmax(Doubles& scores) {
  const double largest = *std::max_element(scores.begin(), scores.end());
  double sum = 0;
  for (double& score : scores) sum += score = std::exp(score - largest);
  for (double& score : scores) score /= sum;
}

// Element `index` of the page part (keys or values) at `data`, fp32 or bfloat16.
float float_at(DType dtype, const void* data, int64_t index) {
  return dtype == DType::kF32 ? static_cast<const float*>(data)[index]
                              : float_of_bf16(static_cast<const uint16_t*>(data)[index]);
}

void store(DType dtype, void* data, int64_t index, double value) {
  const auto rounded = static_cast<float>(value);
  if (dtype == DType::kF32)
    static_cast<float*>(data)[index] = rounded;
  else
    static_cast<uint16_t*>(data)[index] = bf16_of_float(rounded);
}

// Replaces a row by what a format makes of it.
void quantize_values(WeightFormat format, const float* importance, float* row, int64_t cols) {
  if (format == WeightFormat::kFP8) {
    float most = 0;
    for (int64_t c = 0; c < cols; ++c) most = std::fmax(most, fp8_finite(std::fabs(row[c])));
    const float scale = fp8_scale(most);
    for (int64_t c = 0; c < cols; ++c)
      row[c] = scale * float_of_e4m3(fp8_code(fp8_finite(row[c]), scale));
    return;
  }
  with_traits(format, [&](auto traits) {
    using Format = decltype(traits);
    RowBlock block{};
    for (int64_t first = 0; first < cols; first += Format::kBlock) {
      const int64_t count = std::min(Format::kBlock, cols - first);
      encode_block(format, row + first, importance ? importance + first : nullptr, count, &block);
      for (int64_t c = 0; c < count; ++c) row[first + c] = weight_of<Format>(block, c);
    }
  });
}

class RefBackend final : public Backend {
 public:
  const char* name() const override { return "ref"; }
  std::string description() const override { return "ref (double precision, 1 thread)"; }

  Buffer allocate(size_t bytes) override {
    if (bytes == 0) return Buffer();
    void* data = std::calloc(bytes, 1);
    if (data == nullptr)
      fail(ErrorCode::kOutOfMemory, "[ref] the system refused ", bytes, " bytes");
    return Buffer(data, bytes, std::free);
  }

  void copy(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }

  // Quantised weights are kept as the values that they stand for; the reference does not round
  // activations.
  WeightRef load_matrix(std::span<const MatrixSource> parts,
                        const MatrixOptions& options) override {
    const MatrixShape shape = check_matrix_parts(parts, options);
    WeightRef weight;
    weight.format = target_format(shape, options);
    auto values = std::make_shared<std::vector<float>>();
    values->reserve(static_cast<size_t>(shape.rows * shape.cols));
    for (const MatrixSource& part : parts) {
      for (int64_t r = 0; r < part.rows; ++r) {
        const size_t row = values->size();
        values->resize(row + static_cast<size_t>(part.cols));
        float* to = values->data() + row;
        read_elements(part, r, 1, 0, part.cols, to, part.cols);
        if (can_encode(weight.format) && weight.format != exact_format(part.dtype))
          quantize_values(weight.format, options.importance, to, part.cols);
      }
    }
    weight.rows = shape.rows;
    weight.cols = shape.cols;
    weight.bytes = values->size() * sizeof(float);
    weight.data = std::shared_ptr<const void>(values, values->data());
    return weight;
  }

  WeightRef adopt_matrix(WeightFormat format, int64_t rows, int64_t cols,
                         std::shared_ptr<const void> data) override {
    check_adopted(format, rows, cols, data.get());
    auto values = std::make_shared<std::vector<float>>(static_cast<size_t>(rows * cols));
    for (int64_t r = 0; r < rows; ++r)
      unpack_row(format, data.get(), r, cols, values->data() + r * cols);
    WeightRef weight{format, rows, cols, values->size() * sizeof(float), {}};
    weight.data = std::shared_ptr<const void>(values, values->data());
    return weight;
  }

  VectorRef load_vector(std::span<const TensorRef> parts) override {
    const int64_t size = check_vector_parts(parts);
    auto values = std::make_shared<std::vector<float>>();
    values->resize(static_cast<size_t>(size));
    float* to = values->data();
    for (const TensorRef& part : parts) {
      decode_elements(part.dtype, part.data, 0, part.elements(), to);
      to += part.elements();
    }
    return {size, std::shared_ptr<const float>(values, values->data())};
  }

  void to_host(float* out, ConstRows x) override {
    for (int64_t r = 0; r < x.rows; ++r) std::copy_n(x.row(r), x.cols, out + r * x.cols);
  }

  void from_host(Rows out, const float* x) override {
    for (int64_t r = 0; r < out.rows; ++r) std::copy_n(x + r * out.cols, out.cols, out.row(r));
  }

  void embed(Rows out, const TensorRef& table, std::span<const int32_t> ids) override {
    check_embed(out, table, ids);
    for (int64_t r = 0; r < out.rows; ++r)
      decode_elements(table.dtype, table.data, ids[r] * out.cols, out.cols, out.row(r));
  }

  void gather(Rows out, ConstRows x, std::span<const int32_t> index) override {
    check_gather(out, x, index);
    for (int64_t r = 0; r < out.rows; ++r) std::copy_n(x.row(index[r]), x.cols, out.row(r));
  }

  void scatter(Rows out, ConstRows x, std::span<const int32_t> index) override {
    check_scatter(out, x, index);
    for (int64_t r = 0; r < x.rows; ++r) std::copy_n(x.row(r), x.cols, out.row(index[r]));
  }

  void rms_norm(Rows out, ConstRows x, const VectorRef& weight, float eps) override {
    check_rms_norm(out, x, weight);
    for (int64_t r = 0; r < x.rows; ++r) {
      Doubles row = widened(x.row(r), x.cols);
      normalise(row, eps);
      for (int64_t c = 0; c < x.cols; ++c)
        out.row(r)[c] = static_cast<float>(row[c] * weight.get()[c]);
    }
  }

  void layer_norm(Rows out, ConstRows x, const VectorRef& weight, const VectorRef& bias,
                  float eps) override {
    check_layer_norm(out, x, weight, bias);
    for (int64_t r = 0; r < x.rows; ++r) {
      Doubles row = widened(x.row(r), x.cols);
      const double mean =
          std::accumulate(row.begin(), row.end(), 0.0) / static_cast<double>(x.cols);
      for (double& value : row) value -= mean;
      normalise(row, eps);
      for (int64_t c = 0; c < x.cols; ++c)
        out.row(r)[c] = static_cast<float>(row[c] * weight.get()[c] + bias.get()[c]);
    }
  }

  void matmul(Rows out, ConstRows x, const WeightRef& weight,
              const MatmulOptions& options) override {
    check_matmul(out, x, weight, options);
    for (int64_t r = 0; r < x.rows; ++r) {
      const Doubles sums = product(weight, widened(x.row(r), x.cols));
      for (int64_t c = 0; c < out.cols; ++c) {
        double value = sums[c];
        if (options.bias != nullptr) value += options.bias->get()[c];
        if (options.gelu) value = gelu(value);
        if (options.accumulate) value += out.row(r)[c];
        out.row(r)[c] = static_cast<float>(value);
      }
    }
  }

  void mlp(Rows residual, ConstRows x, const WeightRef& gate_up, const WeightRef& down) override {
    check_mlp(residual, x, gate_up, down);
    for (int64_t r = 0; r < x.rows; ++r) {
      const Doubles out = feed_forward(gate_up, down, widened(x.row(r), x.cols));
      for (int64_t c = 0; c < x.cols; ++c)
        residual.row(r)[c] = static_cast<float>(residual.row(r)[c] + out[c]);
    }
  }

  void moe(Rows residual, ConstRows x, const MoeWeights& weights) override {
    check_moe(residual, x, weights);
    const auto experts = static_cast<int64_t>(weights.gate_up.size());
    for (int64_t r = 0; r < x.rows; ++r) {
      const Doubles row = widened(x.row(r), x.cols);
      const Doubles logits = product(weights.router, row);
      std::vector<int64_t> order(experts);
      std::iota(order.begin(), order.end(), int64_t{0});
      // A NaN counts as the smallest logit: it must not break the ordering.
      const auto key = [&](int64_t e) { return std::isnan(logits[e]) ? -INFINITY : logits[e]; };
      std::stable_sort(order.begin(), order.end(),
                       [&](int64_t a, int64_t b) { return key(a) > key(b); });
      order.resize(weights.top_k);
      std::sort(order.begin(), order.end());

      Doubles sum = feed_forward(weights.shared_gate_up, weights.shared_down, row);
      for (const int64_t e : order) {
        Doubles scaled = row;
        for (double& value : scaled) value *= sigmoid(logits[e]);
        const Doubles out = feed_forward(weights.gate_up[e], weights.down[e], scaled);
        for (int64_t c = 0; c < x.cols; ++c) sum[c] += out[c];
      }
      for (int64_t c = 0; c < x.cols; ++c)
        residual.row(r)[c] = static_cast<float>(residual.row(r)[c] + sum[c]);
    }
  }

  void attention(Rows out, const AttentionInput& input) override {
    check_attention(out, input);
    for (const AttentionSegment& segment : input.segments) {
      for (int64_t i = 0; i < segment.rows; ++i) append(input, segment, i);
      if (input.sealed.format != KvSeal::kNone) seal(input, segment);
    }
    const Streamed streamed = read_streams(input);
    for (int64_t i = 0; i < out.rows; ++i) {
      const int64_t row = input.queries ? (*input.queries)[i] : i;
      const AttentionSegment* segment = &input.segments[0];
      while (row >= segment->first_row + segment->rows) ++segment;
      if (segment->mode != nullptr && segment->mode->kind != AttentionMode::Kind::kExact) {
        // Nothing is left out here, whatever is allowed.
        const int64_t pages =
            (segment->position + row - segment->first_row - segment->first_position) / kPageTokens;
        segment->report->pages += pages * input.layout.kv_heads;
        segment->report->read += pages * input.layout.kv_heads;
      }
      for (int64_t head = 0; head < input.heads; ++head)
        attend(out.row(i), input, *segment, streamed, row, head);
    }
  }

  void vision_attention(Rows out, Rows qkv, int64_t tiles, int64_t tokens, int64_t heads,
                        const float* cos, const float* sin, DType operands) override {
    check_vision_attention(out, qkv, tiles, tokens, heads, cos, sin, operands);
    const int64_t head_dim = qkv.cols / (3 * heads);
    const double scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
    const auto turned = [&](int64_t tile, int64_t token, int64_t column) {
      Doubles head = widened(qkv.row(tile * tokens + token) + column, head_dim);
      rotate(head, cos + token * (head_dim / 2), sin + token * (head_dim / 2));
      return head;
    };
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t head = 0; head < heads; ++head) {
        std::vector<Doubles> keys;
        for (int64_t t = 0; t < tokens; ++t)
          keys.push_back(turned(tile, t, (heads + head) * head_dim));
        for (int64_t i = 0; i < tokens; ++i) {
          const Doubles query = turned(tile, i, head * head_dim);
          Doubles weights(tokens);
          for (int64_t t = 0; t < tokens; ++t)
            weights[t] =
                scale * std::inner_product(query.begin(), query.end(), keys[t].begin(), 0.0);
          softmax(weights);
          for (int64_t c = 0; c < head_dim; ++c) {
            double sum = 0;
            for (int64_t t = 0; t < tokens; ++t)
              sum += weights[t] * qkv.row(tile * tokens + t)[(2 * heads + head) * head_dim + c];
            out.row(tile * tokens + i)[head * head_dim + c] = static_cast<float>(sum);
          }
        }
      }
  }

  void unfold(Rows out, const float* pixels, int64_t tiles, int64_t size, int64_t patch) override {
    check_unfold(out, pixels, tiles, size, patch);
    const int64_t grid = size / patch;
    for (int64_t r = 0; r < out.rows; ++r)
      for (int64_t c = 0; c < out.cols; ++c) {
        const int64_t tile = r / (grid * grid), channel = c / (patch * patch);
        const int64_t y = r / grid % grid * patch + c / patch % patch;
        const int64_t x = r % grid * patch + c % patch;
        out.row(r)[c] = pixels[((tile * 3 + channel) * size + y) * size + x];
      }
  }

  void pixel_shuffle(Rows out, ConstRows x, int64_t tiles, int64_t grid, int64_t factor) override {
    check_pixel_shuffle(out, x, tiles, grid, factor);
    const int64_t small = grid / factor;
    for (int64_t r = 0; r < out.rows; ++r)
      for (int64_t c = 0; c < out.cols; ++c) {
        const int64_t tile = r / (small * small), neighbour = c / x.cols;
        const int64_t patch_y = r / small % small * factor + neighbour / factor;
        const int64_t patch_x = r % small * factor + neighbour % factor;
        out.row(r)[c] = x.row((tile * grid + patch_y) * grid + patch_x)[c % x.cols];
      }
  }

 private:
  // One head of row `row` of qkv, from `column`, after RoPE and (if wanted) QK norm.
  static Doubles rotated_head(const AttentionInput& input, int64_t row, int64_t column) {
    const int64_t head_dim = input.layout.head_dim;
    Doubles head = widened(input.qkv.row(row) + column, head_dim);
    if (input.cos != nullptr)
      rotate(head, input.cos + row * (head_dim / 2), input.sin + row * (head_dim / 2));
    if (input.qk_norm) normalise(head, input.qk_norm_eps);
    return head;
  }

  // Keys and values of the segment's row i into its page.
  static void append(const AttentionInput& input, const AttentionSegment& segment, int64_t i) {
    const KvPageLayout& layout = input.layout;
    const int64_t token = segment.position + i - segment.first_position;
    auto* page = static_cast<char*>(segment.open[token / kPageTokens - segment.first_open]);
    for (int64_t head = 0; head < layout.kv_heads; ++head) {
      const int64_t row = segment.first_row + i;
      const int64_t key_column = (input.heads + head) * layout.head_dim;
      const float* value =
          input.qkv.row(row) + (input.heads + layout.kv_heads + head) * layout.head_dim;
      const Doubles key = rotated_head(input, row, key_column);
      for (int64_t c = 0; c < layout.head_dim; ++c) {
        store(layout.dtype, page + layout.key_offset(head),
              layout.key_index(token % kPageTokens, c), key[c]);
        store(layout.dtype, page + layout.value_offset(head),
              layout.value_index(token % kPageTokens, c), value[c]);
      }
    }
  }

  // The pages that these rows fill.
  static void seal(const AttentionInput& input, const AttentionSegment& segment) {
    const int64_t first = segment.position - segment.first_position;
    for (int64_t page = first / kPageTokens; page < (first + segment.rows) / kPageTokens; ++page)
      for (int64_t head = 0; head < input.layout.kv_heads; ++head)
        seal_head(segment.sealed[page], input.sealed, segment.open[page - segment.first_open],
                  input.layout, head);
  }

  // Copies of the pages that come through streams, by stream and index.
  using Streamed = std::map<std::pair<const KvStream*, int64_t>, std::vector<char>>;
  static Streamed read_streams(const AttentionInput& input) {
    const size_t bytes = input.sealed.format == KvSeal::kNone ? input.layout.page_bytes()
                                                              : input.sealed.page_bytes();
    Streamed pages;
    std::map<KvStream*, std::set<int64_t>> wanted;
    for (const AttentionSegment& segment : input.segments) {
      int64_t last = -1;  // row of the segment that is wanted
      for (int64_t i = 0; i < segment.rows; ++i) {
        const auto row = static_cast<int32_t>(segment.first_row + i);
        if (!input.queries || std::binary_search(input.queries->begin(), input.queries->end(), row))
          last = i;
      }
      const int64_t seen = segment.position - segment.first_position + last;
      if (last < 0 || segment.stream == nullptr) continue;
      for (int64_t page = 0; page < seen / kPageTokens; ++page)
        if (page < std::ssize(segment.sealed) && segment.sealed[page] == nullptr)
          wanted[segment.stream].insert(page);
    }
    for (const auto& [stream, indices] : wanted)
      for (const int64_t index : indices) {
        const auto* data = static_cast<const char*>(stream->wait(index));
        pages[{stream, index}].assign(data, data + bytes);
        stream->passed(index + 1);
      }
    return pages;
  }

  // One query head of row `row`; a page before its own is read in the form it is kept in.
  static void attend(float* out, const AttentionInput& input, const AttentionSegment& segment,
                     const Streamed& streamed, int64_t row, int64_t head) {
    const KvPageLayout& layout = input.layout;
    const int64_t kv_head = head / (input.heads / layout.kv_heads);
    const int64_t seen = segment.position + row - segment.first_row - segment.first_position + 1;
    const int64_t own = (seen - 1) / kPageTokens;
    Doubles query = rotated_head(input, row, head * layout.head_dim);
    double scale = 1.0 / std::sqrt(static_cast<double>(layout.head_dim));
    if (input.temperature != nullptr) scale *= input.temperature[row];

    const bool seals = input.sealed.format != KvSeal::kNone;
    const auto page_of = [&](int64_t token) {
      const int64_t page = token / kPageTokens;
      if (page == own || (!seals && page >= segment.first_open))
        return static_cast<const char*>(segment.open[page - segment.first_open]);
      if (segment.sealed[page] != nullptr) return static_cast<const char*>(segment.sealed[page]);
      return streamed.at({segment.stream, page}).data();
    };
    const auto key = [&](int64_t token, int64_t c) -> double {
      const char* page = page_of(token);
      const int64_t t = token % kPageTokens;
      if (seals && token / kPageTokens < own) return sealed_key(page, input.sealed, kv_head, t, c);
      return float_at(layout.dtype, page + layout.key_offset(kv_head), layout.key_index(t, c));
    };
    const auto value = [&](int64_t token, int64_t c) -> double {
      const char* page = page_of(token);
      const int64_t t = token % kPageTokens;
      if (seals && token / kPageTokens < own)
        return sealed_value(page, input.sealed, kv_head, t, c);
      return float_at(layout.dtype, page + layout.value_offset(kv_head), layout.value_index(t, c));
    };

    Doubles weights(seen);
    for (int64_t t = 0; t < seen; ++t)
      for (int64_t c = 0; c < layout.head_dim; ++c) weights[t] += query[c] * key(t, c) * scale;
    softmax(weights);
    Doubles sum(layout.head_dim);
    for (int64_t t = 0; t < seen; ++t)
      for (int64_t c = 0; c < layout.head_dim; ++c) sum[c] += weights[t] * value(t, c);
    std::copy(sum.begin(), sum.end(), out + head * layout.head_dim);
  }
};

}  // namespace

std::unique_ptr<Backend> make_ref_backend(const BackendOptions&) {
  return std::make_unique<RefBackend>();
}

BackendStatus ref_status() { return {"ref", true, "double precision, for tests"}; }

}  // namespace puna
