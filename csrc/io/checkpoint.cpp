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
    if (path.extension() == ".gguf") {
      fail(ErrorCode::kUnsupported, "[load] ", shown,
           " is a GGUF file; this version reads Hugging Face directories with safetensors only");
    }
    fail(ErrorCode::kModelNotFound, "[load] ", shown, " is a file; give the directory that holds ",
         kConfig, is_there(parent / kConfig) ? ": " + printable(parent.string(), 400) : "");
  }
  const std::vector<std::string> beside = entries_of(parent);
  const std::string nearest = nearest_name(path.filename().string(), beside);
  std::string found = " is empty or not there";
  if (!nearest.empty()) {
    found = " holds " + printable(nearest);
  } else if (!beside.empty()) {
    found = " holds " + listing(beside);
  }
  fail(ErrorCode::kModelNotFound, "[load] there is no directory ", shown, "; ",
       printable(parent.string(), 400), found,
       ". Models are not downloaded: give a local Hugging Face directory, or \"demo\"");
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
    if (name.ends_with(".gguf")) unsupported("GGUF, which this version does not read");
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

Checkpoint::Checkpoint(const std::string& directory) : directory_(directory) {
  require_checkpoint_directory(directory);
  const fs::path root(directory);
  // The order of transformers, where both are there.
  if (is_there(root / kSingleFile)) {
    add(std::make_unique<SafetensorsFile>((root / kSingleFile).string()));
  } else if (is_there(root / kIndexFile)) {
    add_shards((root / kIndexFile).string());
  } else {
    refuse_contents(root, std::string(kSingleFile) + " or " + kIndexFile);
  }
}

void Checkpoint::add_shards(const std::string& index_path) {
  const fs::path root(directory_);
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
    add(std::make_unique<SafetensorsFile>((root / shard).string()));
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

void Checkpoint::add(std::unique_ptr<SafetensorsFile> file) {
  for (const auto& [name, tensor] : file->tensors()) {
    const auto [place, added] = files_.emplace(name, file->path());
    if (!added) {
      fail(ErrorCode::kModelFormat, "[load] tensor ", printable(name),
           " is in two files: ", place->second, " and ", file->path());
    }
    tensors_.emplace(name, tensor);
  }
  metadata_.insert(file->metadata().begin(), file->metadata().end());
  shards_.push_back(std::move(file));
}

}  // namespace puna
