// Quantised weights in the backends: packing from any source, products against double, and fused
// operations against what they are made of, bit for bit.
#include <algorithm>

#include "backend_fixture.h"
#include "quant/blocks.h"
#include "quant/encode.h"

namespace {

using namespace fixture;

std::vector<WeightFormat> encodable_formats() {
  std::vector<WeightFormat> formats = all_formats();
  std::erase_if(formats, [](WeightFormat format) { return !can_encode(format); });
  return formats;
}

constexpr DType kBlockedTypes[] = {DType::kQ4_0, DType::kQ4_1, DType::kQ5_0,   DType::kQ5_1,
                                   DType::kQ8_0, DType::kQ2_K, DType::kQ3_K,   DType::kQ4_K,
                                   DType::kQ5_K, DType::kQ6_K, DType::kIQ4_NL, DType::kIQ4_XS};

WeightRef load_as(Backend& backend, const Matrix& matrix, WeightFormat format,
                  const float* importance = nullptr) {
  const MatrixSource part = matrix.source();
  return backend.load_matrix({&part, 1}, {format, importance});
}

// Blocks with random codes and scales of sensible size: the fp16 scales are what is not random.
std::vector<uint8_t> random_blocks(std::mt19937& random, DType dtype, int64_t elements) {
  const DTypeInfo info = info_of(dtype);
  std::vector<uint8_t> bytes(bytes_of(dtype, elements));
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  const auto place = [&](size_t block, size_t offset) {
    const uint16_t half = f16_of_float(randoms(random, 1, 0.01f)[0]);
    std::memcpy(bytes.data() + block * info.block_bytes + offset, &half, 2);
  };
  for (size_t block = 0; block * info.block_bytes < bytes.size(); ++block) {
    switch (dtype) {
      case DType::kQ2_K:
        place(block, 80), place(block, 82);
        break;
      case DType::kQ3_K:
        place(block, 108);
        break;
      case DType::kQ6_K:
        place(block, 208);
        break;
      case DType::kQ4_1:
      case DType::kQ5_1:
      case DType::kQ4_K:
      case DType::kQ5_K:
        place(block, 0), place(block, 2);
        break;
      default:
        place(block, 0);
    }
  }
  return bytes;
}

// out = x W^T for fp32 x by the definition, with x quantised as the format's products do (fp8's do
// not).
void check_product(const std::string& what, Backend& backend, const WeightRef& weight,
                   const std::vector<float>& values, std::mt19937& random) {
  const bool plain = takes_fp32(weight.format);
  const int64_t rows = 3, cols = weight.cols, group = plain ? cols : group_of(weight.format);
  const int64_t padded = plain ? cols : padded_cols(weight.format, cols), groups = padded / group;
  const int64_t spans = (padded + kActivationGroup - 1) / kActivationGroup;
  const std::vector<float> x = randoms(random, rows * cols);
  std::vector<float> got(rows * weight.rows), expected(got.size());
  std::vector<double> bound(got.size());
  backend.matmul({got.data(), rows, weight.rows}, {x.data(), rows, cols}, weight, {});
  std::vector<int8_t> codes(padded);
  std::vector<float> scales(spans);
  std::vector<int32_t> sums(groups);
  for (int64_t r = 0; r < rows; ++r) {
    resolve_isa("scalar").quantize_row(codes.data(), scales.data(), sums.data(),
                                       x.data() + r * cols, cols, padded, group);
    for (int64_t n = 0; n < weight.rows; ++n) {
      double sum = 0, size = 0;
      for (int64_t c = 0; c < cols; ++c) {
        const double activation =
            plain ? static_cast<double>(x[r * cols + c])
                  : static_cast<double>(codes[c]) * scales[c / kActivationGroup];
        const double term = activation * values[n * cols + c];
        sum += term;
        size += std::abs(term);
      }
      expected[r * weight.rows + n] = static_cast<float>(sum);
      // Three roundings a group (one a column without groups), two of each decoded weight, one of
      // the expectation.
      const int64_t roundings = plain ? cols : 3 * groups;
      bound[r * weight.rows + n] = 2 * size * static_cast<double>(roundings + 4) * kEps + 1e-30;
    }
  }
  check_close(what, got, expected, bound);
}

TEST(packed_rows_are_what_was_quantised) {
  std::mt19937 random(1);
  for (const WeightFormat format : encodable_formats()) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      const Matrix matrix = random_matrix(random, 150, 300, dtype);
      std::vector<float> importance = randoms(random, matrix.cols);
      for (float& value : importance) value = std::abs(value);
      const WeightRef truth = load_as(ref(), matrix, format, importance.data());
      const auto* values = static_cast<const float*>(truth.data.get());
      for (std::vector<Named>& same_isa : subjects()) {
        for (Named& cpu : same_isa) {
          const WeightRef weight = load_as(*cpu.backend, matrix, format, importance.data());
          CHECK_EQ(weight.bytes, packed_bytes(format, 150, 300));
          std::vector<float> row(matrix.cols);
          for (int64_t r = 0; r < matrix.rows; ++r) {
            unpack_row(format, weight.data.get(), r, matrix.cols, row.data());
            check_same_bits(cpu.name, row.data(), values + r * matrix.cols, row.size());
          }
        }
      }
    }
  }
}

// A transposed source, as the fused experts of a checkpoint are, gives the same bytes.
TEST(transposed_sources_pack_alike) {
  std::mt19937 random(2);
  const Matrix plain = random_matrix(random, 600, 290, DType::kBF16);
  std::vector<uint16_t> turned(plain.bits.size());
  for (int64_t r = 0; r < plain.rows; ++r)
    for (int64_t c = 0; c < plain.cols; ++c)
      turned[c * plain.rows + r] = plain.bits[r * plain.cols + c];
  const MatrixSource parts[] = {{DType::kBF16, turned.data(), 70, plain.cols, 1, plain.rows},
                                {DType::kBF16, turned.data() + 70, 530, plain.cols, 1, plain.rows}};
  Backend& backend = *subjects()[0].back().backend;
  for (const WeightFormat format : encodable_formats()) {
    const WeightRef one = load_as(backend, plain, format);
    const WeightRef two = backend.load_matrix(parts, {format});
    CHECK(std::memcmp(one.data.get(), two.data.get(), one.bytes) == 0);
  }
}

TEST(products_with_quantised_weights) {
  std::mt19937 random(3);
  for (const WeightFormat format : encodable_formats()) {
    const Matrix matrix = random_matrix(random, 130, 333, DType::kF32);
    const WeightRef truth = load_as(ref(), matrix, format);
    const auto* data = static_cast<const float*>(truth.data.get());
    const std::vector<float> values(data, data + matrix.rows * matrix.cols);
    for (std::vector<Named>& same_isa : subjects())
      check_product(same_isa.back().name + " " + name_of(format), *same_isa.back().backend,
                    load_as(*same_isa.back().backend, matrix, format), values, random);
  }
}

TEST(blocks_of_gguf_files_keep_their_values) {
  std::mt19937 random(4);
  const int64_t rows = 100, cols = 512;
  for (const DType dtype : kBlockedTypes) {
    const std::vector<uint8_t> blocks = random_blocks(random, dtype, rows * cols);
    std::vector<float> values(rows * cols);
    decode_elements(dtype, blocks.data(), 0, rows * cols, values.data());
    const MatrixSource part{dtype, blocks.data(), rows, cols, cols, 1};
    const WeightRef truth = ref().load_matrix({&part, 1});
    check_same_bits(name_of(dtype), values.data(), static_cast<const float*>(truth.data.get()),
                    values.size());
    for (std::vector<Named>& same_isa : subjects()) {
      Backend& backend = *same_isa.back().backend;
      const WeightRef weight = backend.load_matrix({&part, 1});
      CHECK(weight.format == exact_format(dtype));
      std::vector<float> row(cols);
      for (int64_t r = 0; r < rows; ++r) {
        unpack_row(weight.format, weight.data.get(), r, cols, row.data());
        check_same_bits(name_of(dtype), row.data(), values.data() + r * cols, cols);
      }
      check_product(same_isa.back().name + " " + name_of(dtype), backend, weight, values, random);
      // Requantised: the values are decoded first.
      const WeightRef int8 = backend.load_matrix({&part, 1}, {WeightFormat::kInt8G32});
      CHECK(int8.format == WeightFormat::kInt8G32);
      // The embedding reads rows where they lie.
      TensorRef table{dtype, 2, {rows, cols}, blocks.data()};
      const int32_t ids[] = {99, 0, 17};
      std::vector<float> embedded(3 * cols);
      backend.embed({embedded.data(), 3, cols}, table, ids);
      for (int64_t i = 0; i < 3; ++i)
        check_same_bits("embed", embedded.data() + i * cols, values.data() + ids[i] * cols, cols);
    }
  }
}

TEST(a_packed_matrix_is_adopted_where_it_lies) {
  std::mt19937 random(5);
  for (const WeightFormat format : encodable_formats()) {
    const Matrix matrix = random_matrix(random, 70, 130, DType::kF32);
    Backend& backend = *subjects()[0].back().backend;
    const WeightRef packed = load_as(backend, matrix, format);
    const WeightRef adopted = backend.adopt_matrix(format, 70, 130, packed.data);
    CHECK(adopted.data.get() == packed.data.get());
    CHECK_EQ(adopted.bytes, packed.bytes);
    const WeightRef again = ref().adopt_matrix(format, 70, 130, packed.data);
    const WeightRef truth = load_as(ref(), matrix, format);
    check_same_bits(name_of(format), static_cast<const float*>(again.data.get()),
                    static_cast<const float*>(truth.data.get()), 70 * 130);
    const auto* bytes = static_cast<const char*>(packed.data.get());
    const std::shared_ptr<const void> odd(packed.data, bytes + 2);
    CHECK_THROWS(ErrorCode::kInternal, backend.adopt_matrix(format, 70, 130, odd));
  }
}

// mlp and moe are the products they are made of; 1, 2 and 3 threads and any batch agree.
TEST(fused_operations_are_their_parts) {
  std::mt19937 random(6);
  const int64_t hidden = 90, width = 77, experts = 5, top_k = 2;
  const WeightFormat formats[][2] = {{WeightFormat::kInt4G32, WeightFormat::kInt8G32},
                                     {WeightFormat::kInt4MinG64, WeightFormat::kInt4G128},
                                     {WeightFormat::kInt8G32, WeightFormat::kF32},
                                     {WeightFormat::kInt5G32, WeightFormat::kInt5MinG32}};
  for (const auto& [up_format, down_format] : formats) {
    std::vector<Matrix> up, down;
    for (int64_t e = 0; e <= experts; ++e) {
      up.push_back(random_matrix(random, 2 * width, hidden, DType::kF32));
      down.push_back(random_matrix(random, hidden, width, DType::kF32));
    }
    const Matrix router = random_matrix(random, experts, hidden, DType::kF32);
    for (std::vector<Named>& same_isa : subjects()) {
      const KernelTable kernels =
          resolve_isa(same_isa[0].name.substr(5, same_isa[0].name.find(',') - 5));
      for (const int64_t rows : {1, 2, 9}) {
        const std::vector<float> x = randoms(random, rows * hidden);
        const std::vector<float> before = randoms(random, rows * hidden);
        std::vector<float> one, all;
        for (Named& cpu : same_isa) {
          Backend& backend = *cpu.backend;
          MoeWeights weights;
          weights.top_k = top_k;
          weights.router = load_as(backend, router, WeightFormat::kF32);
          weights.shared_gate_up = load_as(backend, up[experts], up_format);
          weights.shared_down = load_as(backend, down[experts], down_format);
          for (int64_t e = 0; e < experts; ++e) {
            weights.gate_up.push_back(load_as(backend, up[e], up_format));
            weights.down.push_back(load_as(backend, down[e], down_format));
          }
          std::vector<float> got = before;
          backend.moe({got.data(), rows, hidden}, {x.data(), rows, hidden}, weights);
          std::vector<float> expected = before;
          const auto add_expert = [&](float* out, const float* in, const WeightRef& gate_up,
                                      const WeightRef& to) {
            std::vector<float> both(2 * width);
            backend.matmul({both.data(), 1, 2 * width}, {in, 1, hidden}, gate_up, {});
            kernels.silu_mul(both.data(), both.data(), both.data() + width, width);
            backend.matmul({out, 1, hidden}, {both.data(), 1, width}, to, {.accumulate = true});
          };
          for (int64_t r = 0; r < rows; ++r) {
            float* out = expected.data() + r * hidden;
            std::vector<float> logits(experts), scaled(hidden);
            backend.matmul({logits.data(), 1, experts}, {x.data() + r * hidden, 1, hidden},
                           weights.router, {});
            add_expert(out, x.data() + r * hidden, weights.shared_gate_up, weights.shared_down);
            for (int64_t e = 0; e < experts; ++e) {
              const auto better = std::count_if(logits.begin(), logits.end(),
                                                [&](float other) { return other > logits[e]; });
              if (better >= top_k) continue;
              const auto score =
                  static_cast<float>(1.0 / (1.0 + std::exp(-static_cast<double>(logits[e]))));
              kernels.scale(scaled.data(), x.data() + r * hidden, score, hidden);
              add_expert(out, scaled.data(), weights.gate_up[e], weights.down[e]);
            }
          }
          check_same_bits(cpu.name + " moe", got.data(), expected.data(), got.size());
          std::vector<float> dense = before, parts = before;
          backend.mlp({dense.data(), rows, hidden}, {x.data(), rows, hidden}, weights.gate_up[0],
                      weights.down[0]);
          for (int64_t r = 0; r < rows; ++r)
            add_expert(parts.data() + r * hidden, x.data() + r * hidden, weights.gate_up[0],
                       weights.down[0]);
          check_same_bits(cpu.name + " mlp", dense.data(), parts.data(), dense.size());
          got.insert(got.end(), dense.begin(), dense.end());
          if (one.empty()) one = got;
          check_same_bits(cpu.name + " threads", got.data(), one.data(), got.size());
        }
      }
    }
  }
}

TEST(what_cannot_be_packed_is_refused) {
  std::mt19937 random(7);
  const Matrix matrix = random_matrix(random, 8, 64, DType::kF32);
  std::vector<uint8_t> blocks(8 * 34 * 2);
  for (Backend* backend : {&ref(), subjects()[0][0].backend.get()}) {
    CHECK_THROWS(ErrorCode::kUnsupported, load_as(*backend, matrix, WeightFormat::kInt4K));
    CHECK_THROWS(ErrorCode::kUnsupported, load_as(*backend, matrix, WeightFormat::kTable4K));
    CHECK_THROWS(ErrorCode::kUnsupported, load_as(*backend, matrix, WeightFormat::kBF16));
    MatrixSource part{DType::kQ8_0, blocks.data(), 8, 64, 64, 1};
    CHECK_THROWS(ErrorCode::kUnsupported, backend->load_matrix({&part, 1}, {WeightFormat::kF32}));
    part.cols = 63;
    CHECK_THROWS(ErrorCode::kInternal, backend->load_matrix({&part, 1}));
    part.cols = 64;
    part.col_stride = 8;
    CHECK_THROWS(ErrorCode::kInternal, backend->load_matrix({&part, 1}));
  }
}

}  // namespace
