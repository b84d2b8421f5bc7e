// Writes one safetensors file in order, without holding its data.
//
// The file appears under its name only when finish() has written it wholly to disk; until then it
// is PATH.partial, which the destructor removes.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "base/tensor.h"

namespace puna {

class SafetensorsWriter {
 public:
  struct Entry {
    std::string name;
    DType dtype = DType::kU8;
    std::vector<int64_t> shape;
    int64_t bytes() const;
  };

  // `entries` in the order in which their data follow; the data begin at a multiple of `alignment`.
  // Throws InvalidRequest if the file exists, cannot be made, or is larger than what is free.
  SafetensorsWriter(const std::string& path, std::vector<Entry> entries,
                    const std::map<std::string, std::string>& metadata, int64_t alignment);
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  // The data of the next entry; what is missing to its size becomes zeros. Throws DeviceError if
  // the system refuses the write.
  void write(const std::string& name, const void* data, size_t bytes);
  void finish();

 private:
  void append(const void* data, size_t bytes);
  [[noreturn]] void refuse(const char* doing) const;

  std::string path_, partial_;
  std::vector<Entry> entries_;
  size_t next_ = 0;
  int file_ = -1;
};

}  // namespace puna
