#include "io/gguf.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>

#include "io/message.h"

namespace puna {

namespace {

namespace fs = std::filesystem;

constexpr std::string_view kMagic = "GGUF";
constexpr uint64_t kMaxNameBytes = 65535;  // of keys, the specification's bound
constexpr uint64_t kDefaultAlignment = 32, kMaxAlignment = uint64_t{1} << 24;
constexpr int kMaxSplits = 99999;  // five digits

struct TypeInfo {
  const char* name;
  uint64_t bytes;  // of one, 0: as long as it says itself
};

TypeInfo info_of(GgufType type) {
  switch (type) {
    case GgufType::kU8:
      return {"uint8", 1};
    case GgufType::kI8:
      return {"int8", 1};
    case GgufType::kU16:
      return {"uint16", 2};
    case GgufType::kI16:
      return {"int16", 2};
    case GgufType::kU32:
      return {"uint32", 4};
    case GgufType::kI32:
      return {"int32", 4};
    case GgufType::kF32:
      return {"float32", 4};
    case GgufType::kBool:
      return {"bool", 1};
    case GgufType::kText:
      return {"string", 0};
    case GgufType::kArray:
      return {"array", 0};
    case GgufType::kU64:
      return {"uint64", 8};
    case GgufType::kI64:
      return {"int64", 8};
    case GgufType::kF64:
      return {"float64", 8};
  }
  return {"?", 0};
}

// Tensor types by their number in the file. `read` is false for those that are only named.
struct TensorType {
  uint32_t number;
  const char* name;
  DType dtype = DType::kF32;
  bool read = false;
};
constexpr TensorType kTensorTypes[] = {
    {0, "F32", DType::kF32, true},
    {1, "F16", DType::kF16, true},
    {2, "Q4_0", DType::kQ4_0, true},
    {3, "Q4_1", DType::kQ4_1, true},
    {6, "Q5_0", DType::kQ5_0, true},
    {7, "Q5_1", DType::kQ5_1, true},
    {8, "Q8_0", DType::kQ8_0, true},
    {9, "Q8_1"},
    {10, "Q2_K", DType::kQ2_K, true},
    {11, "Q3_K", DType::kQ3_K, true},
    {12, "Q4_K", DType::kQ4_K, true},
    {13, "Q5_K", DType::kQ5_K, true},
    {14, "Q6_K", DType::kQ6_K, true},
    {15, "Q8_K"},
    {16, "IQ2_XXS"},
    {17, "IQ2_XS"},
    {18, "IQ3_XXS"},
    {19, "IQ1_S"},
    {20, "IQ4_NL", DType::kIQ4_NL, true},
    {21, "IQ3_S"},
    {22, "IQ2_S"},
    {23, "IQ4_XS", DType::kIQ4_XS, true},
    {24, "I8", DType::kI8, true},
    {25, "I16", DType::kI16, true},
    {26, "I32", DType::kI32, true},
    {27, "I64", DType::kI64, true},
    {28, "F64", DType::kF64, true},
    {29, "IQ1_M"},
    {30, "BF16", DType::kBF16, true},
    {34, "TQ1_0"},
    {35, "TQ2_0"},
    {39, "MXFP4"},
    {40, "NVFP4"},
};

template <class T>
T load(const std::byte* data) {  // little-endian, as the machines that puna runs on
  T value;
  std::memcpy(&value, data, sizeof(T));
  return value;
}

int64_t clamped(uint64_t value) {
  return static_cast<int64_t>(
      std::min(value, static_cast<uint64_t>(std::numeric_limits<int64_t>::max())));
}

// Reads a file from front to back. Every length is checked against what is left before it is used.
class Cursor {
 public:
  explicit Cursor(const GgufFile& gguf, const MappedFile& file)
      : gguf_(gguf), begin_(file.data()), at_(file.data()), end_(file.data() + file.size()) {}

  uint64_t offset() const { return static_cast<uint64_t>(at_ - begin_); }
  uint64_t left() const { return static_cast<uint64_t>(end_ - at_); }
  uint64_t size() const { return static_cast<uint64_t>(end_ - begin_); }

  const std::byte* skip(uint64_t bytes, const std::string& what) {
    if (bytes > left()) {
      gguf_.refuse(ErrorCode::kModelFormat, what, " at byte ", offset(), " needs ", bytes,
                   " bytes, the file has ", left(), " left; it is truncated or damaged");
    }
    const std::byte* data = at_;
    at_ += bytes;
    return data;
  }
  template <class T>
  T number(const std::string& what) {
    return load<T>(skip(sizeof(T), what));
  }
  std::string_view text(const std::string& what) {
    const auto length = number<uint64_t>("the length of " + what);
    return {reinterpret_cast<const char*>(skip(length, what)), length};
  }
  // A number of things of at least `least` bytes each.
  uint64_t count(const char* what, uint64_t least) {
    const auto count = number<uint64_t>(std::string("the number of ") + what);
    if (count > left() / least) {
      gguf_.refuse(ErrorCode::kModelFormat, "it claims ", count, " ", what, ", and ", left(),
                   " bytes are left; it is truncated or damaged");
    }
    return count;
  }
  GgufType type(const std::string& what) {
    const auto number = this->number<uint32_t>("the type of " + what);
    if (number > static_cast<uint32_t>(GgufType::kF64)) {
      gguf_.refuse(ErrorCode::kModelFormat, what, " has the unknown type ", number);
    }
    return static_cast<GgufType>(number);
  }

 private:
  const GgufFile& gguf_;
  const std::byte *begin_, *at_, *end_;
};

GgufValue read_value(Cursor& cursor, const GgufFile& gguf, const std::string& what) {
  GgufValue value;
  value.type = cursor.type(what);
  if (value.type == GgufType::kArray) {
    value.array = true;
    value.type = cursor.type("the elements of " + what);
    if (value.type == GgufType::kArray) {
      gguf.refuse(ErrorCode::kUnsupported, what, " is an array of arrays, which is not read");
    }
    const uint64_t least = std::max<uint64_t>(info_of(value.type).bytes, 1);
    value.count = cursor.count(("elements of " + what).c_str(), least);
  }
  if (value.type == GgufType::kText) {
    value.data = cursor.skip(0, what);
    const std::string part = value.array ? "a text of " + what : what;
    for (uint64_t i = 0; i < value.count; ++i) cursor.text(part);
    return value;
  }
  value.data = cursor.skip(value.count * info_of(value.type).bytes, what);
  if (value.type != GgufType::kBool) return value;
  for (uint64_t i = 0; i < value.count; ++i) {
    if (load<uint8_t>(value.data + i) > 1) {
      gguf.refuse(ErrorCode::kModelFormat, what, " is neither true nor false");
    }
  }
  return value;
}

std::map<std::string, GgufValue> read_metadata(Cursor& cursor, const GgufFile& gguf,
                                               uint64_t count) {
  std::map<std::string, GgufValue> metadata;
  for (uint64_t i = 0; i < count; ++i) {
    const std::string_view key = cursor.text("key " + std::to_string(i));
    const std::string what = "key " + printable(key);
    if (key.empty() || key.size() > kMaxNameBytes) {
      gguf.refuse(ErrorCode::kModelFormat, "key ", i, " has ", key.size(),
                  " bytes; it must have 1 to ", kMaxNameBytes);
    }
    const GgufValue value = read_value(cursor, gguf, what);
    if (!metadata.emplace(key, value).second) {
      gguf.refuse(ErrorCode::kModelFormat, what, " is there twice");
    }
  }
  return metadata;
}

struct TensorExtent {
  uint64_t begin, end;
  const std::string* name;
};

DType read_dtype(const GgufFile& gguf, uint32_t number, const std::string& title) {
  for (const TensorType& type : kTensorTypes) {
    if (type.number != number) continue;
    if (type.read) return type.dtype;
    gguf.refuse(ErrorCode::kUnsupported, title, " has the type ", type.name,
                ", which this version does not read; use a file of another quantisation, such as "
                "Q4_K_M");
  }
  gguf.refuse(ErrorCode::kUnsupported, title, " has the unknown type ", number,
              "; this version does not read it");
}

// One tensor; its place is checked when all are known.
std::pair<TensorRef, uint64_t> read_tensor(Cursor& cursor, const GgufFile& gguf,
                                           const std::string& title) {
  TensorRef tensor;
  const auto rank = cursor.number<uint32_t>("the rank of " + title);
  if (rank > static_cast<uint32_t>(TensorRef::kMaxRank)) {
    gguf.refuse(ErrorCode::kModelFormat, title, " has ", rank, " dimensions; at most ",
                TensorRef::kMaxRank, " are allowed");
  }
  tensor.rank = static_cast<int>(rank);
  uint64_t elements = 1;
  for (int i = tensor.rank - 1; i >= 0; --i) {  // the innermost dimension comes first
    const auto length = cursor.number<uint64_t>("a dimension of " + title);
    if (length > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) ||
        // Of a tensor of nothing, too, the other dimensions are multiplied later.
        __builtin_mul_overflow(elements, std::max<uint64_t>(length, 1), &elements) ||
        elements > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) / sizeof(double)) {
      gguf.refuse(ErrorCode::kModelFormat, title, " has a dimension of ", length,
                  ", with which its size overflows");
    }
    tensor.shape[i] = static_cast<int64_t>(length);
  }
  tensor.dtype = read_dtype(gguf, cursor.number<uint32_t>("the type of " + title), title);
  const int64_t block = puna::info_of(tensor.dtype).block_elements;
  const int64_t row = rank == 0 ? 1 : tensor.shape[rank - 1];
  if (row % block != 0) {
    gguf.refuse(ErrorCode::kModelFormat, title, " has rows of ", row, " elements; ",
                name_of(tensor.dtype), " needs multiples of ", block);
  }
  return {tensor, cursor.number<uint64_t>("the offset of " + title)};
}

// Within the data, aligned, and apart from each other.
void check_places(const GgufFile& gguf, std::vector<TensorExtent>& extents, uint64_t data_bytes,
                  uint64_t alignment) {
  for (const TensorExtent& extent : extents) {
    const std::string title = "tensor " + printable(*extent.name);
    if (extent.begin % alignment != 0) {
      gguf.refuse(ErrorCode::kModelFormat, title, " begins at byte ", extent.begin,
                  " of the data, which is not aligned to ", alignment);
    }
    if (extent.end > data_bytes || extent.end < extent.begin) {
      gguf.refuse(ErrorCode::kModelFormat, title, " lies at bytes ", extent.begin, " to ",
                  extent.end, " of the data, which has ", data_bytes,
                  "; the file is truncated or damaged: complete the download");
    }
  }
  std::sort(extents.begin(), extents.end(), [](const TensorExtent& a, const TensorExtent& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  for (size_t i = 1; i < extents.size(); ++i) {
    if (extents[i].begin >= extents[i - 1].end) continue;
    gguf.refuse(ErrorCode::kModelFormat, "tensor ", printable(*extents[i].name), " begins at byte ",
                extents[i].begin, " of the data and overlaps ", printable(*extents[i - 1].name),
                ", which ends at byte ", extents[i - 1].end);
  }
}

// The parts of PREFIX-00001-of-00002.gguf, or nothing if a name is not of this form.
struct SplitName {
  std::string prefix;
  int number = 0, count = 0;
};
std::optional<SplitName> split_name(const std::string& name) {
  constexpr std::string_view kForm = "-00001-of-00001.gguf";
  if (name.size() <= kForm.size()) return std::nullopt;
  const std::string_view tail = std::string_view(name).substr(name.size() - kForm.size());
  int numbers[2] = {0, 0};
  for (size_t i = 0; i < kForm.size(); ++i) {
    const bool first = i >= 1 && i < 6, second = i >= 10 && i < 15;
    if (!first && !second) {
      if (tail[i] != kForm[i]) return std::nullopt;
    } else {
      if (tail[i] < '0' || tail[i] > '9') return std::nullopt;
      int& number = numbers[second];
      number = number * 10 + (tail[i] - '0');
    }
  }
  return SplitName{name.substr(0, name.size() - kForm.size()), numbers[0], numbers[1]};
}

}  // namespace

GgufFile::GgufFile(const std::string& path) : file_(path) {
  Cursor cursor(*this, file_);
  const std::string_view whole(reinterpret_cast<const char*>(file_.data()), file_.size());
  if (whole.starts_with("version https://git-lfs")) {
    refuse(ErrorCode::kModelFormat,
           "this is a pointer of Git LFS, not the file itself; fetch it with git lfs pull");
  }
  if (!whole.starts_with(kMagic)) {
    refuse(ErrorCode::kModelFormat, "it does not begin with GGUF; it is no GGUF file, or damaged");
  }
  cursor.skip(kMagic.size(), "the mark GGUF");
  const auto version = cursor.number<uint32_t>("the version");
  if (version != 2 && version != 3) {
    const bool big_endian = version == 2u << 24 || version == 3u << 24;
    refuse(ErrorCode::kUnsupported, "it has version ", version,
           big_endian
               ? " in the wrong byte order: it was written for a big-endian machine; convert "
                 "the model again for a little-endian one"
               : "; versions 2 and 3 are read");
  }
  // The least that a tensor takes is its name's length, rank, type and offset; a key, its own
  // length, a type and a byte.
  const uint64_t tensor_count = cursor.count("tensors", 8 + 4 + 4 + 8);
  const uint64_t key_count = cursor.count("keys", 8 + 1 + 4 + 1);
  metadata_ = read_metadata(cursor, *this, key_count);

  uint64_t alignment = kDefaultAlignment;
  if (const auto given = integer("general.alignment")) {
    alignment = static_cast<uint64_t>(*given);
    if (*given < 8 || alignment > kMaxAlignment || (alignment & (alignment - 1)) != 0) {
      refuse(ErrorCode::kModelFormat, "general.alignment is ", *given,
             "; it must be a power of 2 from 8 to ", kMaxAlignment);
    }
  }
  std::vector<TensorExtent> extents;
  for (uint64_t i = 0; i < tensor_count; ++i) {
    const std::string_view name = cursor.text("the name of tensor " + std::to_string(i));
    const std::string title = "tensor " + printable(name);
    if (name.empty() || name.size() > kMaxNameBytes) {
      refuse(ErrorCode::kModelFormat, "the name of tensor ", i, " has ", name.size(),
             " bytes; it must have 1 to ", kMaxNameBytes);
    }
    const auto [tensor, offset] = read_tensor(cursor, *this, title);
    const auto [place, added] = tensors_.emplace(name, tensor);
    if (!added) refuse(ErrorCode::kModelFormat, title, " is there twice");
    uint64_t end = 0;
    if (__builtin_add_overflow(offset, tensor.bytes(), &end)) {
      refuse(ErrorCode::kModelFormat, title, " begins at byte ", offset,
             " of the data, with which its end overflows");
    }
    extents.push_back({offset, end, &place->first});
  }
  if (tensors_.empty()) return;  // the first part of a split may hold metadata alone
  const uint64_t data_begin = (cursor.offset() + alignment - 1) / alignment * alignment;
  if (data_begin > cursor.size()) {
    refuse(ErrorCode::kModelFormat, "it ends at byte ", cursor.size(),
           ", before its data; it is truncated");
  }
  check_places(*this, extents, cursor.size() - data_begin, alignment);
  for (const TensorExtent& extent : extents) {
    tensors_.at(*extent.name).data = file_.data() + data_begin + extent.begin;
  }
}

const GgufValue* GgufFile::find(const std::string& key) const {
  const auto found = metadata_.find(key);
  return found == metadata_.end() ? nullptr : &found->second;
}

void GgufFile::wrong_type(const std::string& key, const GgufValue& value,
                          const char* wanted) const {
  refuse(ErrorCode::kModelFormat, "key ", key, " is ",
         value.array ? "an array of " : "of the type ", info_of(value.type).name, "; it must be ",
         wanted);
}

const GgufValue* GgufFile::find_single(const std::string& key, const char* wanted) const {
  const GgufValue* value = find(key);
  if (value && value->array) wrong_type(key, *value, wanted);
  return value;
}

int64_t GgufFile::integer_at(const std::string& key, const GgufValue& value, uint64_t i) const {
  const std::byte* data = value.data + i * info_of(value.type).bytes;
  switch (value.type) {
    case GgufType::kU8:
    case GgufType::kBool:
      return load<uint8_t>(data);
    case GgufType::kI8:
      return load<int8_t>(data);
    case GgufType::kU16:
      return load<uint16_t>(data);
    case GgufType::kI16:
      return load<int16_t>(data);
    case GgufType::kU32:
      return load<uint32_t>(data);
    case GgufType::kI32:
      return load<int32_t>(data);
    case GgufType::kU64:
      return clamped(load<uint64_t>(data));
    case GgufType::kI64:
      return load<int64_t>(data);
    default:
      wrong_type(key, value, "a whole number");
  }
}

double GgufFile::number_at(const std::string& key, const GgufValue& value, uint64_t i) const {
  if (value.type == GgufType::kF32) return load<float>(value.data + i * sizeof(float));
  if (value.type == GgufType::kF64) return load<double>(value.data + i * sizeof(double));
  if (value.type == GgufType::kText || value.type == GgufType::kBool) {
    wrong_type(key, value, "a number");
  }
  return static_cast<double>(integer_at(key, value, i));
}

std::optional<int64_t> GgufFile::integer(const std::string& key) const {
  const GgufValue* value = find_single(key, "a whole number");
  if (!value) return std::nullopt;
  if (value->type == GgufType::kBool) wrong_type(key, *value, "a whole number");
  return integer_at(key, *value, 0);
}

std::optional<double> GgufFile::number(const std::string& key) const {
  const GgufValue* value = find_single(key, "a number");
  if (!value) return std::nullopt;
  return number_at(key, *value, 0);
}

std::optional<bool> GgufFile::flag(const std::string& key) const {
  const GgufValue* value = find_single(key, "true or false");
  if (!value) return std::nullopt;
  if (value->type != GgufType::kBool) wrong_type(key, *value, "true or false");
  return integer_at(key, *value, 0) != 0;
}

std::optional<std::string_view> GgufFile::text(const std::string& key) const {
  const GgufValue* value = find_single(key, "a string");
  if (!value) return std::nullopt;
  return texts(key)->front();
}

std::optional<std::vector<int64_t>> GgufFile::integers(const std::string& key) const {
  const GgufValue* value = find(key);
  if (!value) return std::nullopt;
  std::vector<int64_t> all;
  for (uint64_t i = 0; i < value->count; ++i) all.push_back(integer_at(key, *value, i));
  return all;
}

std::optional<std::vector<double>> GgufFile::numbers(const std::string& key) const {
  const GgufValue* value = find(key);
  if (!value) return std::nullopt;
  std::vector<double> all;
  for (uint64_t i = 0; i < value->count; ++i) all.push_back(number_at(key, *value, i));
  return all;
}

std::optional<std::vector<std::string_view>> GgufFile::texts(const std::string& key) const {
  const GgufValue* value = find(key);
  if (!value) return std::nullopt;
  if (value->type != GgufType::kText) wrong_type(key, *value, "strings");
  std::vector<std::string_view> all;
  const std::byte* at = value->data;
  for (uint64_t i = 0; i < value->count; ++i) {
    const auto length = load<uint64_t>(at);
    all.emplace_back(reinterpret_cast<const char*>(at + sizeof(length)), length);
    at += sizeof(length) + length;
  }
  return all;
}

bool is_gguf(const std::string& path) {
  std::error_code ignored;
  if (!fs::is_regular_file(path, ignored)) return false;
  if (path.ends_with(".gguf")) return true;
  char magic[4] = {};
  std::ifstream file(path, std::ios::binary);
  return file.read(magic, sizeof(magic)) && std::string_view(magic, sizeof(magic)) == kMagic;
}

std::vector<std::string> gguf_parts(const std::string& path) {
  const std::optional<SplitName> split = split_name(path);
  if (!split || split->count < 1 || split->count > kMaxSplits || split->number < 1 ||
      split->number > split->count) {
    return {path};
  }
  std::vector<std::string> parts, absent;
  for (int i = 1; i <= split->count; ++i) {
    char tail[32];
    std::snprintf(tail, sizeof(tail), "-%05d-of-%05d.gguf", i, split->count);
    parts.push_back(split->prefix + tail);
    std::error_code ignored;
    if (!fs::exists(parts.back(), ignored)) absent.push_back(parts.back());
  }
  if (!absent.empty()) {
    fail(ErrorCode::kModelNotFound, "[gguf] ", printable(path, 400), " is one of ", split->count,
         " parts, ", absent.size(), " absent: ", listing(absent, 3), "; complete the download");
  }
  return parts;
}

}  // namespace puna
