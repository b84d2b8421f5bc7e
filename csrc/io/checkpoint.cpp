#include "io/checkpoint.h"

#include <algorithm>
#include <filesystem>
#include <set>

#include "base/error.h"
#include "io/json_file.h"
#include "io/message.h"

namespace puna {

namespace fs = std::filesystem;

namespace {

constexpr const char* kConfig = "config.json";
constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";

std::vector<std::string> entries_of(const fs::path& directory) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator entry(directory, error), end; !error && entry != end;
       entry.increment(error)) {
    names.push_back(entry->path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

bool is_there(const fs::path& path) {
  std::error_code ignored;
  return fs::exists(path, ignored);
}

// What a person may have meant by a path at which there is no directory.
[[noreturn]] void refuse_path(const fs::path& path) {
  const std::string shown = printable(path.string(), 400);
  const fs::path parent = path.has_parent_path() ? path.parent_path() : fs::path(".");
  if (is_there(path)) {
    if (is_gguf(path.string())) {
      fail(ErrorCode::kUnsupported, "[load] ", shown,
           " is a GGUF file; what is asked for needs a Hugging Face directory");
    }
    fail(ErrorCode::kModelNotFound, "[load] ", shown,
         " is a file, and no GGUF file; give one, or the directory that holds ", kConfig,
         is_there(parent / kConfig) ? ": " + printable(parent.string(), 400) : "");
  }
  const std::vector<std::string> beside = entries_of(parent);
  const std::string nearest = nearest_name(path.filename().string(), beside);
  std::string found = " is empty or not there";
  if (!nearest.empty()) {
    found = " holds " + printable(nearest);
  } else if (!beside.empty()) {
    found = " holds " + listing(beside);
  }
  const char* const wanted = path.extension() == ".gguf" ? "file " : "directory ";
  fail(
      ErrorCode::kModelNotFound, "[load] there is no ", wanted, shown, "; ",
      printable(parent.string(), 400), found,
      ". Models are not downloaded: give a local Hugging Face directory, a GGUF file, or \"demo\"");
}

// A directory without the files we read: says which other kind of model lies in it, if any.
[[noreturn]] void refuse_contents(const fs::path& path, const std::string& looked_for) {
  const std::string shown = printable(path.string(), 400);
  const std::vector<std::string> names = entries_of(path);
  for (const std::string& name : names) {
    if (is_there(path / name / kConfig)) {
      fail(ErrorCode::kModelNotFound, "[load] ", shown, " has no ", looked_for, ", but ",
           printable(name), " in it has a ", kConfig, "; give ",
           printable((path / name).string(), 400));
    }
  }
  // For example the directory original/ of a download.
  if (is_there(path.parent_path() / kConfig)) {
    fail(ErrorCode::kModelNotFound, "[load] ", shown, " has no ", looked_for,
         ", but the directory above it has a ", kConfig, "; give ",
         printable(path.parent_path().string(), 400));
  }
  for (const std::string& name : names) {
    const auto unsupported = [&](const char* what) {
      fail(ErrorCode::kUnsupported, "[load] ", shown, " has no ", looked_for, "; it holds ", what,
           " (", printable(name), "). Give the Hugging Face version, with ", kConfig,
           " and safetensors");
    };
    if (name == "adapter_config.json") unsupported("a LoRA adapter, not a model");
    if (name == "params.json" || name.ends_with(".pth")) unsupported("Meta's own format");
    if (name.ends_with(".gguf") && name.find("mmproj") == std::string::npos) {
      fail(ErrorCode::kModelNotFound, "[load] ", shown, " has no ", looked_for,
           ", but a GGUF file; give ", printable((path / name).string(), 400));
    }
    if (name.ends_with(".bin")) unsupported("PyTorch pickles, which puna does not read");
  }
  fail(ErrorCode::kModelNotFound, "[load] ", shown, " has no ", looked_for, "; it holds ",
       names.empty() ? "nothing" : listing(names));
}

// Where the index puts each tensor. Shards are files of the directory itself: a name that leads
// elsewhere is refused.
std::map<std::string, std::string> read_index(const std::string& path) {
  const nlohmann::json index = read_json(path);
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
    fail(ErrorCode::kModelFormat, "[load] ", path, " has no weight_map");
  }
  std::map<std::string, std::string> shard_of;
  for (const auto& [tensor, shard] : index["weight_map"].items()) {
    const std::string name = shard.is_string() ? shard.get<std::string>() : "";
    const bool plain =
        name.ends_with(".safetensors") && std::none_of(name.begin(), name.end(), [](char c) {
          return c == '/' || c == '\\' || static_cast<unsigned char>(c) < 0x20;
        });
    if (!plain) {
      fail(ErrorCode::kModelFormat, "[load] ", path, " puts tensor ", printable(tensor), " into ",
           shard.is_string() ? printable(name) : shard.type_name(),
           ", which is no .safetensors file of this directory");
    }
    shard_of[tensor] = name;
  }
  return shard_of;
}

}  // namespace

void require_checkpoint_directory(const std::string& directory) {
  fs::path path = fs::path(directory).lexically_normal();
  if (!path.has_filename() && path.has_relative_path()) path = path.parent_path();  // "model/"
  std::error_code ignored;
  if (!fs::is_directory(path, ignored)) refuse_path(path);
  if (!is_there(path / kConfig)) refuse_contents(path, kConfig);
}

Checkpoint::Checkpoint(const std::string& path, const std::string& projector) : path_(path) {
  if (is_gguf(path)) {
    add_gguf();
    add_projector(projector);
    return;
  }
  require_checkpoint_directory(path);
  if (!projector.empty()) {
    fail(ErrorCode::kInvalidRequest, "[load] mmproj goes with a GGUF file; ", printable(path, 400),
         " is a directory, whose config.json says where the vision tower is");
  }
  const fs::path root(path);
  // The order of transformers, where both are there.
  if (is_there(root / kSingleFile)) {
    add_shard((root / kSingleFile).string());
  } else if (is_there(root / kIndexFile)) {
    add_shards((root / kIndexFile).string());
  } else {
    refuse_contents(root, std::string(kSingleFile) + " or " + kIndexFile);
  }
}

// Every part of a split, from the path of any.
void Checkpoint::add_gguf() {
  const std::vector<std::string> parts = gguf_parts(path_);
  for (const std::string& part : parts) {
    gguf_.push_back(std::make_unique<GgufFile>(part));
    const GgufFile& file = *gguf_.back();
    const auto number = static_cast<int64_t>(gguf_.size()) - 1;
    const auto count = static_cast<int64_t>(parts.size());
    // A file that was merged from parts may say that it is one of 0.
    const int64_t says_count = file.integer("split.count").value_or(0);
    if (count == 1 ? says_count > 1 : says_count != count) {
      file.refuse(ErrorCode::kModelFormat, "split.count is ", says_count,
                  ", by its name it is part ", number + 1, " of ", count,
                  "; give the parts the names they were split into (-00001-of-0000N.gguf)");
    }
    const int64_t says_number = file.integer("split.no").value_or(-1);
    if (count > 1 && says_number != number) {
      file.refuse(ErrorCode::kModelFormat, "split.no is ", says_number, ", by its name it is part ",
                  number, " (counted from 0); the parts were renamed");
    }
    add(file.path(), file.tensors());
  }
  const int64_t tensors = gguf()->integer("split.tensors.count").value_or(-1);
  if (parts.size() > 1 && tensors >= 0 && tensors != static_cast<int64_t>(tensors_.size())) {
    gguf()->refuse(ErrorCode::kModelFormat, "split.tensors.count is ", tensors, ", the ",
                   parts.size(), " parts hold ", tensors_.size(), "; they are not of one model");
  }
}

// The vision tower: the file given, or one beside the model that fits it.
void Checkpoint::add_projector(const std::string& given) {
  if (!given.empty()) {
    projector_ = std::make_unique<GgufFile>(given);
  } else {
    fs::path folder = fs::path(path_).parent_path();
    if (folder.empty()) folder = ".";
    const int64_t width = gguf()->integer("llama4.embedding_length").value_or(-1);
    std::vector<std::string> fitting;
    for (const std::string& name : entries_of(folder)) {
      const std::string path = (folder / name).string();
      if (name.find("mmproj") == std::string::npos || !name.ends_with(".gguf")) continue;
      std::error_code ignored;
      if (fs::equivalent(path, path_, ignored)) continue;
      std::unique_ptr<GgufFile> file;
      try {
        file = std::make_unique<GgufFile>(path);
      } catch (const Error& error) {  // it may belong to any model
        warnings_.push_back(printable(name) + " beside the model is not used: " + error.what());
        continue;
      }
      if (file->text("clip.projector_type").value_or("") != "llama4" ||
          file->integer("clip.vision.projection_dim").value_or(-1) != width) {
        continue;  // another model's
      }
      fitting.push_back(name);
      if (!projector_) projector_ = std::move(file);
    }
    if (fitting.size() > 1) {
      warnings_.push_back("there are several vision towers beside the model (" + listing(fitting) +
                          "); " + printable(fitting.front()) + " is used: mmproj= chooses another");
    }
  }
  if (projector_) add(projector_->path(), projector_->tensors());
}

template <class Action>
void Checkpoint::in_mapping_of(const void* data, const Action& action) const {
  const auto offer = [&](const MappedFile& file) {
    if (file.holds(data))
      action(file, static_cast<size_t>(static_cast<const std::byte*>(data) - file.data()));
  };
  for (const auto& shard : shards_) offer(shard->mapping());
  for (const auto& part : gguf_) offer(part->mapping());
  if (projector_) offer(projector_->mapping());
}

void Checkpoint::will_read(const void* data, size_t bytes) const {
  in_mapping_of(data, [&](const MappedFile& file, size_t at) { file.will_need(at, bytes); });
}

void Checkpoint::release(const void* data, size_t bytes) const {
  in_mapping_of(data, [&](const MappedFile& file, size_t at) { file.dont_need(at, bytes); });
}

void Checkpoint::add_shard(const std::string& path) {
  shards_.push_back(std::make_unique<SafetensorsFile>(path));
  add(path, shards_.back()->tensors());
  metadata_.insert(shards_.back()->metadata().begin(), shards_.back()->metadata().end());
}

void Checkpoint::add_shards(const std::string& index_path) {
  const fs::path root(path_);
  const std::map<std::string, std::string> shard_of = read_index(index_path);
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : shard_of) shards.insert(shard);
  std::vector<std::string> absent;
  for (const std::string& shard : shards) {
    if (!is_there(root / shard)) absent.push_back(shard);
  }
  if (!absent.empty()) {
    fail(ErrorCode::kModelNotFound, "[load] ", index_path, " names ", shards.size(), " shards, ",
         absent.size(), " absent: ", listing(absent), "; complete the download");
  }
  for (const std::string& shard : shards) {
    add_shard((root / shard).string());
  }
  for (const auto& [tensor, shard] : shard_of) {
    const auto found = files_.find(tensor);
    if (found == files_.end() || fs::path(found->second).filename() != shard) {
      fail(ErrorCode::kModelFormat, "[load] ", index_path, " puts tensor ", printable(tensor),
           " into ", printable(shard),
           found == files_.end() ? ", where it is not" : ", but it is in " + found->second);
    }
  }
  for (const auto& [tensor, file] : files_) {
    if (!shard_of.contains(tensor)) {
      fail(ErrorCode::kModelFormat, "[load] ", file, " holds tensor ", printable(tensor),
           ", which ", index_path, " does not name");
    }
  }
}

void Checkpoint::add(const std::string& file, const std::map<std::string, TensorRef>& tensors) {
  for (const auto& [name, tensor] : tensors) {
    const auto [place, added] = files_.emplace(name, file);
    if (!added) {
      fail(ErrorCode::kModelFormat, "[load] tensor ", printable(name),
           " is in two files: ", place->second, " and ", file);
    }
    tensors_.emplace(name, tensor);
  }
}

}  // namespace puna
