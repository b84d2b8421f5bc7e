// Element types as they occur in checkpoint files and in memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace puna {

enum class DType : uint8_t {
  kF64,
  kF32,
  kF16,
  kBF16,
  kF8E4M3,
  kF8E5M2,
  kI64,
  kI32,
  kI16,
  kI8,
  kU8,
  kBool,
  // GGUF's quantised types: elements lie in blocks with scales of their own.
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ8_0,
  kQ2_K,
  kQ3_K,
  kQ4_K,
  kQ5_K,
  kQ6_K,
  kIQ4_NL,
  kIQ4_XS,
};

// A type's name, and the smallest run of elements that occupies whole bytes. Plain types have
// blocks of one element.
struct DTypeInfo {
  const char* name;
  int64_t block_elements;
  size_t block_bytes;
};

constexpr DTypeInfo info_of(DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return {"float64", 1, 8};
    case DType::kF32:
      return {"float32", 1, 4};
    case DType::kF16:
      return {"float16", 1, 2};
    case DType::kBF16:
      return {"bfloat16", 1, 2};
    case DType::kF8E4M3:
      return {"float8_e4m3", 1, 1};
    case DType::kF8E5M2:
      return {"float8_e5m2", 1, 1};
    case DType::kI64:
      return {"int64", 1, 8};
    case DType::kI32:
      return {"int32", 1, 4};
    case DType::kI16:
      return {"int16", 1, 2};
    case DType::kI8:
      return {"int8", 1, 1};
    case DType::kU8:
      return {"uint8", 1, 1};
    case DType::kBool:
      return {"bool", 1, 1};
    case DType::kQ4_0:
      return {"Q4_0", 32, 18};
    case DType::kQ4_1:
      return {"Q4_1", 32, 20};
    case DType::kQ5_0:
      return {"Q5_0", 32, 22};
    case DType::kQ5_1:
      return {"Q5_1", 32, 24};
    case DType::kQ8_0:
      return {"Q8_0", 32, 34};
    case DType::kQ2_K:
      return {"Q2_K", 256, 84};
    case DType::kQ3_K:
      return {"Q3_K", 256, 110};
    case DType::kQ4_K:
      return {"Q4_K", 256, 144};
    case DType::kQ5_K:
      return {"Q5_K", 256, 176};
    case DType::kQ6_K:
      return {"Q6_K", 256, 210};
    case DType::kIQ4_NL:
      return {"IQ4_NL", 32, 18};
    case DType::kIQ4_XS:
      return {"IQ4_XS", 256, 136};
  }
  return {"?", 1, 1};
}

constexpr const char* name_of(DType dtype) { return info_of(dtype).name; }
constexpr bool is_blocked(DType dtype) { return info_of(dtype).block_elements > 1; }
// The blocked type of a name, if it is one's.
constexpr std::optional<DType> blocked_type(std::string_view name) {
  for (int i = static_cast<int>(DType::kQ4_0); i <= static_cast<int>(DType::kIQ4_XS); ++i)
    if (name == name_of(static_cast<DType>(i))) return static_cast<DType>(i);
  return std::nullopt;
}
// Bytes of one element of a plain type.
constexpr size_t size_of(DType dtype) { return info_of(dtype).block_bytes; }
// Bytes of `elements`, whole blocks of them.
constexpr size_t bytes_of(DType dtype, int64_t elements) {
  const DTypeInfo info = info_of(dtype);
  return static_cast<size_t>(elements / info.block_elements) * info.block_bytes;
}

}  // namespace puna
