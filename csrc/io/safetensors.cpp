#include "io/safetensors.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <set>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "io/json_file.h"
#include "io/message.h"

namespace puna {

namespace {

using nlohmann::json;

// The bound of the reference implementation.
constexpr uint64_t kMaxHeaderBytes = 100'000'000;
// What stands in the place of a file that was cloned without its contents.
constexpr std::string_view kGitLfsPointer = "version https://git-lfs";

struct Extent {
  uint64_t begin, end;
  const std::string* name;
};

// Reads and checks one file's header; every message names the file.
class Header {
 public:
  explicit Header(const MappedFile& file) : file_(file) {
    const std::string_view whole(reinterpret_cast<const char*>(file.data()), file.size());
    if (whole.starts_with(kGitLfsPointer)) {
      bad("this is a pointer of Git LFS, not the file itself; fetch it with git lfs pull");
    }
    if (whole.size() < kSafetensorsLengthBytes) {
      bad("the file has ", whole.size(), " bytes, the length of its header alone needs ",
          kSafetensorsLengthBytes);
    }
    for (size_t i = 0; i < kSafetensorsLengthBytes; ++i) {
      header_bytes_ |= static_cast<uint64_t>(std::to_integer<uint8_t>(file.data()[i])) << (8 * i);
    }
    if (header_bytes_ > kMaxHeaderBytes || header_bytes_ > whole.size() - kSafetensorsLengthBytes) {
      bad("the header claims ", header_bytes_, " bytes, the file has ", whole.size(),
          " in all, and a header has at most ", kMaxHeaderBytes,
          "; the file is truncated or no safetensors file");
    }
    data_bytes_ = whole.size() - kSafetensorsLengthBytes - header_bytes_;
    json_ =
        parse_json(whole.substr(kSafetensorsLengthBytes, header_bytes_), file.path() + " (header)");
    if (!json_.is_object()) bad("the header is no JSON object");
  }

  std::map<std::string, std::string> metadata() const {
    const auto found = json_.find("__metadata__");
    if (found == json_.end()) return {};
    check_metadata(*found);
    return found->get<std::map<std::string, std::string>>();
  }

  std::map<std::string, TensorRef> tensors() const {
    std::map<std::string, TensorRef> all;
    std::vector<Extent> extents;
    for (const auto& [name, entry] : json_.items()) {
      if (name == "__metadata__") {
        check_metadata(entry);
        continue;
      }
      const auto placed = all.emplace(name, tensor(name, entry)).first;
      const json& offsets = entry["data_offsets"];
      extents.push_back({offsets[0].get<uint64_t>(), offsets[1].get<uint64_t>(), &placed->first});
    }
    check_tiling(extents);
    return all;
  }

 private:
  template <class... Parts>
  [[noreturn]] void bad(const Parts&... parts) const {
    fail(ErrorCode::kModelFormat, "[safetensors] ", file_.path(), ": ", parts...);
  }

  void check_metadata(const json& entry) const {
    const bool ok = entry.is_object() && std::all_of(entry.begin(), entry.end(),
                                                     [](const json& v) { return v.is_string(); });
    if (!ok) bad("__metadata__ is no object of strings");
  }

  DType dtype(const std::string& name, const std::string& text) const {
    static const std::map<std::string, DType> kKnown = {
        {"F64", DType::kF64},   {"F32", DType::kF32},        {"F16", DType::kF16},
        {"BF16", DType::kBF16}, {"F8_E4M3", DType::kF8E4M3}, {"F8_E5M2", DType::kF8E5M2},
        {"I64", DType::kI64},   {"I32", DType::kI32},        {"I16", DType::kI16},
        {"I8", DType::kI8},     {"U8", DType::kU8},          {"BOOL", DType::kBool}};
    static const std::set<std::string> kOthers = {"U16",         "U32",         "U64", "F8_E8M0",
                                                  "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4",  "F6_E2M3",
                                                  "F6_E3M2",     "C64"};
    const auto found = kKnown.find(text);
    if (found != kKnown.end()) return found->second;
    if (kOthers.contains(text)) {
      fail(ErrorCode::kUnsupported, "[safetensors] ", file_.path(), ": tensor ", printable(name),
           " has the dtype ", text, ", which this version does not read; use the bf16 checkpoint");
    }
    bad("tensor ", printable(name), " has the unknown dtype ", printable(text));
  }

  TensorRef tensor(const std::string& name, const json& entry) const {
    const std::string title = "tensor " + printable(name);
    if (!entry.is_object() || !entry.contains("dtype") || !entry.contains("shape") ||
        !entry.contains("data_offsets") || !entry["dtype"].is_string() ||
        !entry["shape"].is_array() || !entry["data_offsets"].is_array() ||
        entry["data_offsets"].size() != 2) {
      bad(title, " needs a dtype, a shape and two data_offsets");
    }
    const json &shape = entry["shape"], &offsets = entry["data_offsets"];
    TensorRef tensor;
    tensor.dtype = dtype(name, entry["dtype"].get<std::string>());
    if (shape.size() > TensorRef::kMaxRank) {
      bad(title, " has ", shape.size(), " dimensions, at most ", TensorRef::kMaxRank,
          " are supported");
    }
    // Signed, as TensorRef counts; a zero does not excuse the dimensions before it.
    auto bytes = static_cast<int64_t>(size_of(tensor.dtype));
    for (const json& extent : shape) {
      if (!extent.is_number_unsigned()) bad(title, " has a dimension that is no whole number");
      const auto length = extent.get<uint64_t>();
      if (length > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) ||
          __builtin_mul_overflow(bytes, static_cast<int64_t>(length), &bytes)) {
        bad(title, " has the shape ", printable(shape.dump()), ", which overflows");
      }
      tensor.shape[tensor.rank++] = static_cast<int64_t>(length);
    }
    if (!offsets[0].is_number_unsigned() || !offsets[1].is_number_unsigned()) {
      bad(title, " has data_offsets that are no whole numbers");
    }
    const auto begin = offsets[0].get<uint64_t>(), end = offsets[1].get<uint64_t>();
    if (begin > end || end > data_bytes_) {
      bad(title, " lies at bytes ", begin, " to ", end, ", the file has ", data_bytes_,
          " bytes of data; it is truncated or damaged");
    }
    if (end - begin != static_cast<uint64_t>(bytes)) {
      bad(title, " of ", name_of(tensor.dtype), " ", tensor.shape_string(), " needs ", bytes,
          " bytes, its data_offsets give ", end - begin);
    }
    const uint64_t place = kSafetensorsLengthBytes + header_bytes_ + begin;
    // Mappings begin at a page, so that the place in the file tells the alignment in memory.
    if (place % size_of(tensor.dtype) != 0) {
      bad(title, " begins at byte ", place, ", which is not aligned to its ", size_of(tensor.dtype),
          "-byte elements; write the file again with a current version of safetensors");
    }
    tensor.data = file_.data() + place;
    return tensor;
  }

  // Tensors tile the data without gaps or overlaps; one of no bytes may stand anywhere between.
  void check_tiling(std::vector<Extent>& extents) const {
    std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) {
      return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
    });
    uint64_t end = 0;
    for (const Extent& extent : extents) {
      const std::string name = printable(*extent.name);
      if (extent.begin < end) {
        bad("tensor ", name, " begins at byte ", extent.begin, " and overlaps the one before it, ",
            "which ends at byte ", end);
      }
      if (extent.begin > end) {
        bad("bytes ", end, " to ", extent.begin, " of the data, before tensor ", name,
            ", belong to no tensor");
      }
      end = extent.end;
    }
    if (end != data_bytes_) {
      bad("the tensors end at byte ", end, " of the data, which has ", data_bytes_);
    }
  }

  const MappedFile& file_;
  json json_;
  uint64_t header_bytes_ = 0, data_bytes_ = 0;
};

}  // namespace

SafetensorsFile::SafetensorsFile(const std::string& path) : file_(path) {
  const Header header(file_);
  tensors_ = header.tensors();
  metadata_ = header.metadata();
}

}  // namespace puna
