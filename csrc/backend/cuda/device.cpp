#include "backend/cuda/device.h"

namespace puna {

CudaDevice::CudaDevice(const cuda::DeviceTable& table, int ordinal)
    : table_(table), ordinal_(ordinal) {
  int count = 0;
  const int code = table.device_count(&count);
  if (count == 0)
    fail(ErrorCode::kDevice,
         "[cuda] there is no GPU: ", code ? table.describe(code) : "none found");
  if (ordinal < 0 || ordinal >= count)
    fail(ErrorCode::kDevice, "[cuda] there is no device cuda:", ordinal, "; there are ", count,
         ", from cuda:0 on");
  check("device", table.device_info(ordinal, &info_));
  check("device", table.open(ordinal, &handle_));
}

int64_t CudaDevice::free_memory() const {
  cuda::DeviceInfo info = {};
  check("device", table_.device_info(ordinal_, &info));
  return info.free_memory;
}

std::shared_ptr<void> CudaDevice::allocate(size_t bytes) {
  if (bytes == 0) return {};
  void* memory = nullptr;
  const int code = table_.allocate(handle_, bytes, &memory);
  if (code != 0)
    fail(ErrorCode::kOutOfMemory, {.asked = static_cast<int64_t>(bytes), .limit = info_.memory},
         "[cuda] ", info_.name, " with ", info_.memory, " bytes has no ", bytes,
         " bytes left: ", table_.describe(code));
  // Memory is given back in the order of the calls, so operations under way may still use it.
  return {memory, [device = shared_from_this()](void* memory) {
            device->table_.release(device->handle_, memory);
          }};
}

}  // namespace puna
