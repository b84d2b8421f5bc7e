// A CUDA device behind its table of functions: errors become exceptions, memory has owners.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend/buffer.h"
#include "base/error.h"
#include "kernels/cuda/device_table.h"

namespace puna {

class CudaDevice : public std::enable_shared_from_this<CudaDevice> {
 public:
  // Throws DeviceError, with the driver's words, if it cannot be opened.
  CudaDevice(const cuda::DeviceTable& table, int ordinal);
  ~CudaDevice() { table_.close(handle_); }
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  const char* name() const { return info_.name; }
  int64_t free_memory() const;

  // Zeroed; OutOfMemory with the numbers. Lives as long as what was handed out.
  std::shared_ptr<void> allocate(size_t bytes);

  void upload(void* to, const void* from, size_t bytes) {
    check("upload", table_.upload(handle_, to, from, bytes));
  }
  void download(void* to, const void* from, size_t bytes, size_t stride, int64_t rows) {
    check("download", table_.download(handle_, to, from, bytes, stride, rows));
  }
  void copy(void* to, const void* from, size_t bytes) {
    check("copy", table_.copy(handle_, to, from, bytes));
  }
  // run("product", &cuda::DeviceTable::product, call)
  template <class Call>
  void run(const char* name, int (*cuda::DeviceTable::*kernel)(void*, const Call*),
           const Call& call) {
    check(name, (table_.*kernel)(handle_, &call));
  }

 private:
  void check(const char* what, int code) const {
    if (code != 0) fail(ErrorCode::kDevice, "[cuda] ", what, ": ", table_.describe(code));
  }

  const cuda::DeviceTable& table_;
  int ordinal_;
  void* handle_ = nullptr;
  cuda::DeviceInfo info_ = {};
};

// Device memory that grows as it is needed and whose contents last for one operation.
class CudaScratch {
 public:
  template <class T>
  T* reserve(CudaDevice& device, int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    if (bytes > bytes_) {
      memory_.reset();  // first, so that old and new do not add up
      memory_ = device.allocate(bytes);
      bytes_ = bytes;
    }
    return static_cast<T*>(memory_.get());
  }

 private:
  std::shared_ptr<void> memory_;
  size_t bytes_ = 0;
};

// Small arrays of the host that an operation needs on the device: added one by one, sent together.
class CudaTables {
 public:
  // Returns a number for at().
  template <class T>
  size_t add(std::span<const T> values) {
    constexpr size_t kAlignment = 16;
    const size_t at = (bytes_.size() + kAlignment - 1) / kAlignment * kAlignment;
    bytes_.resize(at + values.size_bytes());
    if (!values.empty()) std::memcpy(bytes_.data() + at, values.data(), values.size_bytes());
    return at;
  }
  void send(CudaDevice& device) {
    if (bytes_.empty()) return;
    sent_ = memory_.reserve<char>(device, static_cast<int64_t>(bytes_.size()));
    device.upload(sent_, bytes_.data(), bytes_.size());
    bytes_.clear();
  }
  template <class T>
  const T* at(size_t number) const {
    return reinterpret_cast<const T*>(sent_ + number);
  }

 private:
  std::vector<char> bytes_;
  CudaScratch memory_;
  char* sent_ = nullptr;
};

// Arrays of device addresses that are the same from call to call, as those of a layer's experts:
// sent when they are first asked for, and kept.
class CudaConstants {
 public:
  const void* const* of(CudaDevice& device, const std::vector<const void*>& addresses) {
    std::shared_ptr<void>& memory = sent_[addresses];
    if (memory == nullptr) {
      memory = device.allocate(addresses.size() * sizeof(void*));
      device.upload(memory.get(), addresses.data(), addresses.size() * sizeof(void*));
    }
    return static_cast<const void* const*>(memory.get());
  }

 private:
  std::map<std::vector<const void*>, std::shared_ptr<void>> sent_;
};

}  // namespace puna
