// The tensors of a model by name, out of all of its files: a Hugging Face directory with
// model.safetensors or shards with an index, or a GGUF file with its other parts and, for images,
// the file of its vision tower.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/tensor.h"
#include "io/gguf.h"
#include "io/safetensors.h"

namespace puna {

class Checkpoint {
 public:
  // Opens and validates every file. Throws ModelNotFound saying what was looked for and what lies
  // there instead, or ModelFormat. `projector` is the GGUF file of the vision tower; if empty, it
  // is looked for beside a GGUF file (*mmproj*.gguf, of the same width).
  explicit Checkpoint(const std::string& path, const std::string& projector = "");

  const std::string& path() const { return path_; }
  // The file whose metadata describe the model, and that of its vision tower; null for a directory
  // and where there is none.
  const GgufFile* gguf() const { return gguf_.empty() ? nullptr : gguf_.front().get(); }
  const GgufFile* projector() const { return projector_.get(); }
  // Of all that were found, if a choice had to be made.
  const std::vector<std::string>& warnings() const { return warnings_; }
  // Views are valid as long as this object.
  const std::map<std::string, TensorRef>& tensors() const { return tensors_; }
  // What the files say of themselves; of a key that several have, the first file's value.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  // Of `bytes` of a tensor at `data`: starts to read them from the file.
  void will_read(const void* data, size_t bytes) const;
  // Lets go of the memory that its mapped pages occupy; it has been read and will not soon be
  // again.
  void release(const void* data, size_t bytes) const;
  // The file that holds a tensor.
  const std::string& file_of(const std::string& tensor) const { return files_.at(tensor); }

 private:
  // Calls action(file, offset) for the file that holds what `data` points to.
  template <class Action>
  void in_mapping_of(const void* data, const Action& action) const;
  void add(const std::string& file, const std::map<std::string, TensorRef>& tensors);
  void add_shard(const std::string& path);
  void add_shards(const std::string& index_path);
  void add_gguf();
  void add_projector(const std::string& given);

  std::string path_;
  std::vector<std::unique_ptr<SafetensorsFile>> shards_;
  std::vector<std::unique_ptr<GgufFile>> gguf_;  // the parts of the text model, in order
  std::unique_ptr<GgufFile> projector_;
  std::map<std::string, TensorRef> tensors_;
  std::map<std::string, std::string> files_, metadata_;
  std::vector<std::string> warnings_;
};

// Throws ModelNotFound (or Unsupported, for formats we know but cannot read) unless `directory`
// holds a config.json; the message says what was found there.
void require_checkpoint_directory(const std::string& directory);

}  // namespace puna
