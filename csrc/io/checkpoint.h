// A Hugging Face checkpoint directory: model.safetensors, or shards with an index.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/tensor.h"
#include "io/safetensors.h"

namespace puna {

class Checkpoint {
 public:
  // Opens and validates every file. Throws ModelNotFound saying what was looked for and what lies
  // there instead, or ModelFormat.
  explicit Checkpoint(const std::string& directory);

  const std::string& directory() const { return directory_; }
  // Views are valid as long as this object.
  const std::map<std::string, TensorRef>& tensors() const { return tensors_; }
  // What the files say of themselves; of a key that several have, the first file's value.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  // The file that holds a tensor.
  const std::string& file_of(const std::string& tensor) const { return files_.at(tensor); }

 private:
  void add(std::unique_ptr<SafetensorsFile> file);
  void add_shards(const std::string& index_path);

  std::string directory_;
  std::vector<std::unique_ptr<SafetensorsFile>> shards_;
  std::map<std::string, TensorRef> tensors_;
  std::map<std::string, std::string> files_, metadata_;
};

// Throws ModelNotFound (or Unsupported, for formats we know but cannot read) unless `directory`
// holds a config.json; the message says what was found there.
void require_checkpoint_directory(const std::string& directory);

}  // namespace puna
