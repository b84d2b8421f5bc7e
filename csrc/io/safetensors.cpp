#include "io/safetensors.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "base/error.h"
#include "io/json_file.h"

namespace puna {

namespace {

using nlohmann::json;

// The bound of the reference implementation.
constexpr uint64_t kMaxHeaderBytes = 100'000'000;

std::optional<DType> dtype_of(const std::string& name) {
  static const std::map<std::string, DType> kNames = {
      {"F64", DType::kF64},   {"F32", DType::kF32},        {"F16", DType::kF16},
      {"BF16", DType::kBF16}, {"F8_E4M3", DType::kF8E4M3}, {"F8_E5M2", DType::kF8E5M2},
      {"I64", DType::kI64},   {"I32", DType::kI32},        {"I16", DType::kI16},
      {"I8", DType::kI8},     {"U8", DType::kU8},          {"BOOL", DType::kBool}};
  const auto found = kNames.find(name);
  if (found == kNames.end()) return std::nullopt;
  return found->second;
}

struct Extent {
  uint64_t begin, end;
  const std::string* name;
};

}  // namespace

SafetensorsFile::SafetensorsFile(const std::string& path) : file_(path) {
  const auto bad = [&](const auto&... parts) {
    fail(ErrorCode::kModelFormat, "[safetensors] ", path, ": ", parts...);
  };
  if (file_.size() < 8) bad("the file has ", file_.size(), " bytes, its header alone needs 8");
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, file_.data(), 8);
  if (header_bytes > kMaxHeaderBytes || header_bytes > file_.size() - 8) {
    bad("the header claims ", header_bytes, " bytes, the file has ", file_.size(),
        "; it is truncated or no safetensors file");
  }
  const std::string_view text(reinterpret_cast<const char*>(file_.data()) + 8, header_bytes);
  const json header = parse_json(text, path + " (header)");
  if (!header.is_object()) bad("the header is no JSON object");
  const std::byte* data = file_.data() + 8 + header_bytes;
  const uint64_t data_bytes = file_.size() - 8 - header_bytes;

  std::vector<Extent> extents;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    if (!entry.is_object() || !entry.contains("dtype") || !entry.contains("shape") ||
        !entry.contains("data_offsets") || !entry["dtype"].is_string() ||
        !entry["shape"].is_array() || !entry["data_offsets"].is_array() ||
        entry["data_offsets"].size() != 2) {
      bad("tensor ", name, " needs a dtype, a shape and two data_offsets");
    }
    const auto dtype_name = entry["dtype"].get<std::string>();
    const std::optional<DType> dtype = dtype_of(dtype_name);
    if (!dtype) bad("tensor ", name, " has the unknown dtype ", dtype_name);
    TensorRef tensor;
    tensor.dtype = *dtype;
    if (entry["shape"].size() > TensorRef::kMaxRank) {
      bad("tensor ", name, " has ", entry["shape"].size(), " dimensions, at most ",
          TensorRef::kMaxRank, " are supported");
    }
    uint64_t bytes = size_of(*dtype);
    for (const json& extent : entry["shape"]) {
      if (!extent.is_number_unsigned())
        bad("tensor ", name, " has a dimension that is no whole number");
      const auto length = extent.get<uint64_t>();
      if (length > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) ||
          __builtin_mul_overflow(bytes, length, &bytes)) {
        bad("tensor ", name, " has the shape ", entry["shape"].dump(), ", which overflows");
      }
      tensor.shape[tensor.rank++] = static_cast<int64_t>(length);
    }
    const json& offsets = entry["data_offsets"];
    if (!offsets[0].is_number_unsigned() || !offsets[1].is_number_unsigned()) {
      bad("tensor ", name, " has data_offsets that are no whole numbers");
    }
    const auto begin = offsets[0].get<uint64_t>(), end = offsets[1].get<uint64_t>();
    if (begin > end || end > data_bytes) {
      bad("tensor ", name, " lies at bytes ", begin, " to ", end, ", the file has data for ",
          data_bytes);
    }
    if (end - begin != bytes) {
      bad("tensor ", name, " of ", dtype_name, " ", tensor.shape_string(), " needs ", bytes,
          " bytes, its data_offsets give ", end - begin);
    }
    tensor.data = data + begin;
    if (reinterpret_cast<uintptr_t>(tensor.data) % size_of(*dtype) != 0) {
      bad("tensor ", name, " begins at byte ", begin, " of data that begins at byte ",
          8 + header_bytes, ", which is not aligned to its ", size_of(*dtype),
          "-byte elements; write the file again with safetensors");
    }
    const auto placed = tensors_.emplace(name, tensor).first;
    extents.push_back({begin, end, &placed->first});
  }
  // Tensors tile the data without gaps or overlaps; an extent of no bytes may stand anywhere
  // between.
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  uint64_t end = 0;
  for (const Extent& extent : extents) {
    if (extent.begin < end)
      bad("tensor ", *extent.name, " overlaps the one before it, which ends at byte ", end);
    if (extent.begin > end)
      bad("bytes ", end, " to ", extent.begin, " before tensor ", *extent.name, " belong to none");
    end = extent.end;
  }
  if (end != data_bytes) bad("the tensors end at byte ", end, ", the data at byte ", data_bytes);
}

}  // namespace puna
