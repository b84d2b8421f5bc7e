#include "io/safetensors_writer.h"

#include <filesystem>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/error.h"
#include "io/safetensors.h"

namespace puna {
namespace {

const char* code_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "F32";
    case DType::kF16:
      return "F16";
    case DType::kBF16:
      return "BF16";
    case DType::kU8:
      return "U8";
    default:
      fail(ErrorCode::kInternal, "[safetensors] ", name_of(dtype), " tensors are not written");
  }
}

}  // namespace

int64_t SafetensorsWriter::Entry::bytes() const {
  int64_t bytes = static_cast<int64_t>(size_of(dtype));
  for (const int64_t extent : shape) bytes *= extent;
  return bytes;
}

SafetensorsWriter::Partial::~Partial() {
  if (file_) remove_if_possible(system_files(), path_);  // while nobody else can have locked it
}

void SafetensorsWriter::Partial::open() {
  file_ = system_files().lock(path_);
  if (!file_)
    fail(ErrorCode::kInvalidRequest, "[write] ", path_,
         " is being written by another; wait for it, or choose another folder");
  file_->resize(0);
}

void SafetensorsWriter::Partial::append(std::span<const std::byte> data) {
  file_->write({&data, 1}, size_);
  size_ += data.size();
}

void SafetensorsWriter::Partial::finish(const std::string& path) {
  file_->sync();
  system_files().rename(path_, path);
  file_.reset();
}

SafetensorsWriter::SafetensorsWriter(const std::string& path, std::vector<Entry> entries,
                                     const std::map<std::string, std::string>& metadata,
                                     int64_t alignment)
    : path_(path), partial_(path + ".partial"), entries_(std::move(entries)) {
  nlohmann::json header;
  header["__metadata__"] = metadata;
  int64_t offset = 0;
  for (const Entry& entry : entries_) {
    header[entry.name] = {{"dtype", code_of(entry.dtype)},
                          {"shape", entry.shape},
                          {"data_offsets", {offset, offset + entry.bytes()}}};
    offset += entry.bytes();
  }
  // The format allows spaces after the header.
  std::string text = header.dump();
  const auto unit = static_cast<size_t>(alignment);
  text.resize(
      (kSafetensorsLengthBytes + text.size() + unit - 1) / unit * unit - kSafetensorsLengthBytes,
      ' ');

  const auto require_new = [&] {
    if (std::filesystem::exists(path_))
      fail(ErrorCode::kInvalidRequest, "[write] ", path_,
           " exists; remove it or choose another folder");
  };
  require_new();
  std::error_code unknown;
  const auto space = std::filesystem::space(std::filesystem::path(path_).parent_path(), unknown);
  const uint64_t needed = kSafetensorsLengthBytes + text.size() + static_cast<uint64_t>(offset);
  if (!unknown && needed > space.available)
    fail(ErrorCode::kStorage, "[write] ", path_, " needs ", needed, " bytes, the disk has ",
         space.available, " free");
  partial_.open();
  require_new();  // another writer may have ended meanwhile
  uint8_t length[kSafetensorsLengthBytes];
  for (size_t i = 0; i < kSafetensorsLengthBytes; ++i)
    length[i] = static_cast<uint8_t>(text.size() >> 8 * i);
  append(length, kSafetensorsLengthBytes);
  append(text.data(), text.size());
}

void SafetensorsWriter::append(const void* data, size_t bytes) {
  partial_.append({static_cast<const std::byte*>(data), bytes});
}

void SafetensorsWriter::write(const std::string& name, const void* data, size_t bytes) {
  if (next_ == entries_.size() || entries_[next_].name != name ||
      static_cast<int64_t>(bytes) > entries_[next_].bytes())
    fail(ErrorCode::kInternal, "[write] ", name, " of ", bytes, " bytes is not what comes next");
  append(data, bytes);
  const std::vector<char> zeros(static_cast<size_t>(entries_[next_++].bytes()) - bytes);
  append(zeros.data(), zeros.size());
}

void SafetensorsWriter::finish() {
  if (next_ != entries_.size())
    fail(ErrorCode::kInternal, "[write] ", entries_.size() - next_, " tensors were not written");
  partial_.finish(path_);
}

}  // namespace puna
