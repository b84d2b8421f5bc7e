// One GGUF file, version 2 or 3: mapped, validated once and wholly, then views of its metadata and
// tensors. Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/tensor.h"
#include "platform/mmap.h"

namespace puna {

// The type of a metadata value, numbered as in the file.
enum class GgufType : uint32_t {
  kU8,
  kI8,
  kU16,
  kI16,
  kU32,
  kI32,
  kF32,
  kBool,
  kText,
  kArray,
  kU64,
  kI64,
  kF64,
};

// A metadata value, still in the file: nothing is copied, however long an array is.
struct GgufValue {
  GgufType type = GgufType::kU8;  // of the value, or of the elements of an array
  bool array = false;
  uint64_t count = 1;
  const std::byte* data = nullptr;
};

class GgufFile {
 public:
  // Throws ModelNotFound, ModelFormat naming the file, the place and the numbers, or Unsupported
  // naming a version, or a tensor and its type, that cannot be read.
  explicit GgufFile(const std::string& path);

  const std::string& path() const { return file_.path(); }
  const MappedFile& mapping() const { return file_; }
  // Views are valid as long as this object. Shapes are row-major: the file's dimensions reversed.
  const std::map<std::string, TensorRef>& tensors() const { return tensors_; }

  bool has(const std::string& key) const { return metadata_.contains(key); }
  // The value of a key, or nothing if there is no such key. Throw ModelFormat naming the key if it
  // is of another type. Integers of any width are one type; an unsigned one above int64's largest
  // reads as that.
  std::optional<int64_t> integer(const std::string& key) const;
  std::optional<double> number(const std::string& key) const;  // an integer too
  std::optional<bool> flag(const std::string& key) const;
  std::optional<std::string_view> text(const std::string& key) const;
  // An array; a single value is an array of one. Flags are 0 and 1.
  std::optional<std::vector<int64_t>> integers(const std::string& key) const;
  std::optional<std::vector<double>> numbers(const std::string& key) const;
  std::optional<std::vector<std::string_view>> texts(const std::string& key) const;

  // Refuses the file; the message names it.
  template <class... Parts>
  [[noreturn]] void refuse(ErrorCode code, const Parts&... parts) const {
    fail(code, "[gguf] ", path(), ": ", parts...);
  }

 private:
  const GgufValue* find(const std::string& key) const;
  const GgufValue* find_single(const std::string& key, const char* wanted) const;
  [[noreturn]] void wrong_type(const std::string& key, const GgufValue& value,
                               const char* wanted) const;
  int64_t integer_at(const std::string& key, const GgufValue& value, uint64_t i) const;
  double number_at(const std::string& key, const GgufValue& value, uint64_t i) const;

  MappedFile file_;
  std::map<std::string, GgufValue> metadata_;
  std::map<std::string, TensorRef> tensors_;
};

// Whether a path is that of a GGUF file, by its name or its first bytes.
bool is_gguf(const std::string& path);

// The files of a model that was split into NAME-00001-of-0000N.gguf and so on, in order, from the
// path of any of them; or the path alone if it is not so named. Throws ModelNotFound naming those
// that are absent.
std::vector<std::string> gguf_parts(const std::string& path);

}  // namespace puna
