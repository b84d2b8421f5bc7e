#include "io/checkpoint.h"

#include <algorithm>
#include <filesystem>
#include <set>

#include "base/error.h"
#include "io/json_file.h"

namespace puna {

namespace fs = std::filesystem;

namespace {

constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";

// The first few of `names`, and how many more there are.
std::string listing(const std::vector<std::string>& names, size_t most = 5) {
  std::string text;
  for (size_t i = 0; i < std::min(most, names.size()); ++i) text += (i ? ", " : "") + names[i];
  if (names.size() > most) text += " and " + std::to_string(names.size() - most) + " more";
  return text;
}

std::vector<std::string> entries_of(const fs::path& directory) {
  std::vector<std::string> names;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(directory, ignored)) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

bool is_there(const fs::path& path) {
  std::error_code ignored;
  return fs::exists(path, ignored);
}

}  // namespace

void require_checkpoint_directory(const std::string& directory) {
  const fs::path path(directory);
  std::error_code ignored;
  if (path.extension() == ".gguf") {
    fail(ErrorCode::kUnsupported, "[load] ", directory,
         " is a GGUF file; this version reads Hugging Face "
         "directories with safetensors only");
  }
  if (!fs::is_directory(path, ignored)) {
    if (is_there(path)) {
      fail(ErrorCode::kModelNotFound, "[load] ", directory,
           " is a file; give the directory that holds config.json");
    }
    const fs::path parent = path.parent_path().empty() ? fs::path(".") : path.parent_path();
    const std::vector<std::string> beside = entries_of(parent);
    fail(ErrorCode::kModelNotFound, "[load] there is no directory ", directory, "; ",
         beside.empty() ? "nothing is there" : parent.string() + " holds " + listing(beside),
         ". Models are not downloaded: give a local Hugging Face directory, or \"demo\"");
  }
  if (is_there(path / "config.json")) return;
  const std::vector<std::string> names = entries_of(path);
  for (const std::string& name : names) {
    if (is_there(path / name / "config.json")) {
      fail(ErrorCode::kModelNotFound, "[load] ", directory, " has no config.json, but ", name,
           " in it does; give ", (path / name).string());
    }
  }
  for (const std::string& name : names) {
    if (name == "params.json" || name.ends_with(".pth")) {
      fail(ErrorCode::kUnsupported, "[load] ", directory, " holds Meta's own format (", name,
           "); give the Hugging Face version, with config.json and safetensors");
    }
  }
  fail(ErrorCode::kModelNotFound, "[load] ", directory, " has no config.json; it holds ",
       names.empty() ? "nothing" : listing(names));
}

Checkpoint::Checkpoint(const std::string& directory) : directory_(directory) {
  require_checkpoint_directory(directory);
  const fs::path root(directory);
  if (!is_there(root / kIndexFile)) {
    if (!is_there(root / kSingleFile)) {
      fail(ErrorCode::kModelNotFound, "[load] ", directory, " has neither ", kSingleFile, " nor ",
           kIndexFile, "; it holds ", listing(entries_of(root)));
    }
    add(std::make_unique<SafetensorsFile>((root / kSingleFile).string()));
    return;
  }
  const std::string index_path = (root / kIndexFile).string();
  const nlohmann::json index = read_json(index_path);
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
    fail(ErrorCode::kModelFormat, "[load] ", index_path, " has no weight_map");
  }
  std::map<std::string, std::string> shard_of;
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : index["weight_map"].items()) {
    if (!shard.is_string() || shard.get<std::string>().find_first_of("/\\") != std::string::npos ||
        !shard.get<std::string>().ends_with(".safetensors")) {
      fail(ErrorCode::kModelFormat, "[load] ", index_path, " puts tensor ", tensor, " into ",
           shard.dump(), ", which is no .safetensors file of this directory");
    }
    shard_of[tensor] = shard.get<std::string>();
    shards.insert(shard.get<std::string>());
  }
  std::vector<std::string> absent;
  for (const std::string& shard : shards) {
    if (!is_there(root / shard)) absent.push_back(shard);
  }
  if (!absent.empty()) {
    fail(ErrorCode::kModelNotFound, "[load] ", index_path, " names ", shards.size(), " shards, ",
         absent.size(), " of them absent: ", listing(absent), "; complete the download");
  }
  for (const std::string& shard : shards)
    add(std::make_unique<SafetensorsFile>((root / shard).string()));
  for (const auto& [tensor, shard] : shard_of) {
    const auto found = files_.find(tensor);
    if (found == files_.end() || fs::path(found->second).filename() != shard) {
      fail(ErrorCode::kModelFormat, "[load] ", index_path, " puts tensor ", tensor, " into ", shard,
           found == files_.end() ? ", where it is not" : ", but it is in " + found->second);
    }
  }
  for (const auto& [tensor, file] : files_) {
    if (!shard_of.contains(tensor)) {
      fail(ErrorCode::kModelFormat, "[load] ", file, " holds tensor ", tensor, ", which ",
           index_path, " does not name");
    }
  }
}

void Checkpoint::add(std::unique_ptr<SafetensorsFile> file) {
  for (const auto& [name, tensor] : file->tensors()) {
    const auto [place, added] = files_.emplace(name, file->path());
    if (!added) {
      fail(ErrorCode::kModelFormat, "[load] tensor ", name, " is in two files: ", place->second,
           " and ", file->path());
    }
    tensors_.emplace(name, tensor);
  }
  shards_.push_back(std::move(file));
}

}  // namespace puna
