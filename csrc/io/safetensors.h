// One safetensors file: mapped, validated once and wholly, then views of its tensors.
// Format: 8 bytes little-endian header length, JSON header, data
// (github.com/huggingface/safetensors).
#pragma once

#include <cstddef>
#include <map>
#include <string>

#include "base/tensor.h"
#include "platform/mmap.h"

namespace puna {

constexpr size_t kSafetensorsLengthBytes = 8;  // of the header's length, little-endian

class SafetensorsFile {
 public:
  // Throws ModelNotFound, or ModelFormat naming the file, the tensor, what was expected and found.
  explicit SafetensorsFile(const std::string& path);

  const std::string& path() const { return file_.path(); }
  const MappedFile& mapping() const { return file_; }
  // Views are valid as long as this object.
  const std::map<std::string, TensorRef>& tensors() const { return tensors_; }
  // The header's __metadata__.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  MappedFile file_;
  std::map<std::string, TensorRef> tensors_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace puna
