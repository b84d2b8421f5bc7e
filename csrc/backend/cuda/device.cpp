#include "backend/cuda/device.h"

#include <algorithm>

namespace puna {
namespace {

constexpr size_t kTableChunkBytes = size_t{4} << 20;
constexpr size_t kTableAlignment = 16;
// Of graphs that are kept: a pass has some ten batches, and two for each layer whose experts the
// host has; and what is decoded at once changes.
constexpr size_t kMostGraphs = 512;

}  // namespace

CudaDevice::CudaDevice(const cuda::DeviceTable& table, int ordinal, size_t batch_kernels,
                       std::shared_ptr<void> stream)
    : table_(table), batch_kernels_(batch_kernels), ordinal_(ordinal), stream_(std::move(stream)) {
  int count = 0;
  const int code = table.device_count(&count);
  if (count == 0)
    fail(ErrorCode::kDevice,
         "[cuda] there is no GPU: ", code ? table.describe(code) : "none found");
  if (ordinal < 0 || ordinal >= count)
    fail(ErrorCode::kDevice, "[cuda] there is no device cuda:", ordinal, "; there are ", count,
         ", from cuda:0 on");
  check("device", table.device_info(ordinal, &info_));
  if (stream_ != nullptr) {
    int of = 0;
    check("stream", table.stream_device(stream_.get(), &of));
    if (of != ordinal)
      fail(ErrorCode::kInvalidRequest, {.param = "stream"}, "[cuda] the stream is of cuda:", of,
           " and the device is cuda:", ordinal, "; device='cuda:", of, "' goes with it");
  }
  check("device", table.open(ordinal, stream_.get(), &handle_));
}

CudaDevice::~CudaDevice() {
  if (handle_ == nullptr) return;
  for (const auto& [noted, graph] : graphs_)
    if (graph.handle != nullptr) table_.release_graph(handle_, graph.handle);
  for (const TableChunk& chunk : tables_) table_.release(handle_, chunk.memory);
  release_memory();  // what cannot be waited for stays with the process
  table_.close(handle_);
}

// --- memory --------------------------------------------------------------------------------------

int64_t CudaDevice::free_memory() const {
  int64_t bytes = 0;
  check("device", table_.free_memory(ordinal_, &bytes));
  return bytes;
}

std::shared_ptr<void> CudaDevice::allocate(size_t bytes, Users users) {
  if (bytes == 0) return {};
  void* memory = nullptr;
  if (kernels_ == 0) release_memory();
  int code = table_.allocate(handle_, bytes, &memory);
  if (code != 0) {
    start();  // gives back what waits for it
    code = table_.allocate(handle_, bytes, &memory);
  }
  if (code != 0)
    fail(ErrorCode::kOutOfMemory, {.asked = static_cast<int64_t>(bytes), .limit = info_.memory},
         "[cuda] ", info_.name, " with ", info_.memory, " bytes has no ", bytes,
         " bytes left: ", table_.describe(code));
  return {memory,
          [device = shared_from_this(), users](void* memory) { device->give_back(memory, users); }};
}

std::shared_ptr<void> CudaDevice::allocate_pinned(size_t bytes) {
  void* memory = nullptr;
  if (const int code = table_.allocate_host(handle_, bytes, &memory))
    fail(ErrorCode::kOutOfMemory, {.asked = static_cast<int64_t>(bytes)}, "[cuda] the host has no ",
         bytes, " bytes left that ", info_.name, " can reach: ", table_.describe(code));
  return {memory, [device = shared_from_this()](void* memory) {
            device->table_.release_host(device->handle_, memory);
          }};
}

CudaDevice::Event CudaDevice::make_event() {
  void* event = nullptr;
  check("event", table_.make_event(handle_, 0, &event));
  return {event, [device = shared_from_this()](void* event) {
            device->table_.release_event(device->handle_, event);
          }};
}

void CudaDevice::give_back(void* memory, Users users) {
  bool at_once = false;
  {
    // Kernels that are noted may still use it.
    const std::lock_guard lock(mutex_);
    (users == Users::kWe ? given_back_ : given_back_by_others_).push_back(memory);
    at_once = retired_;
  }
  if (at_once) release_memory();
}

void CudaDevice::release_memory() {
  std::vector<void*> ours, others;
  {
    const std::lock_guard lock(mutex_);
    ours.swap(given_back_);
    others.swap(given_back_by_others_);
  }
  // In the order of the calls, so kernels under way may still use it.
  for (void* memory : ours) table_.release(handle_, memory);
  if (others.empty()) return;
  if (table_.await_everybody(handle_) == 0) {
    for (void* memory : others) table_.release(handle_, memory);
  } else {  // the next time
    const std::lock_guard lock(mutex_);
    given_back_by_others_.insert(given_back_by_others_.end(), others.begin(), others.end());
  }
}

void CudaDevice::retire() {
  noted_.clear();
  kernels_ = 0;
  {
    const std::lock_guard lock(mutex_);
    retired_ = true;
  }
  release_memory();
}

// --- kernels -------------------------------------------------------------------------------------

void CudaDevice::note(const Noted& kernel, const void* bytes) {
  last_ = noted_.size();
  noted_.append(reinterpret_cast<const char*>(&kernel), sizeof(kernel));
  noted_.append(static_cast<const char*>(bytes), kernel.bytes);
  if (++kernels_ >= batch_kernels_) start();
}

void CudaDevice::start_kernels() const {
  for (size_t at = 0; at < noted_.size();) {
    Noted kernel;
    std::memcpy(&kernel, noted_.data() + at, sizeof(kernel));
    at += sizeof(kernel);
    check(kernel.name, kernel.start(table_, handle_, noted_.data() + at));
    at += kernel.bytes;
  }
}

void CudaDevice::start() {
  // Whatever fails, nothing of it is tried again.
  struct Forget {
    CudaDevice& device;
    ~Forget() {
      device.noted_.clear();
      device.kernels_ = 0;
      device.release_memory();
    }
  } const forget{*this};
  send_tables();
  if (kernels_ == 0) return;
  // A graph of one kernel is no quicker than the kernel.
  if (kernels_ == 1) return start_kernels();
  const auto found = graphs_.find(noted_);
  if (found == graphs_.end()) {
    start_kernels();
    if (graphs_.size() >= kMostGraphs) {
      for (const auto& [noted, graph] : graphs_)
        if (graph.handle != nullptr) check("graph", table_.release_graph(handle_, graph.handle));
      graphs_.clear();
    }
    graphs_.emplace(noted_, Graph{});
    return;
  }
  void*& graph = found->second.handle;
  if (graph == nullptr) {
    check("graph", table_.begin_graph(handle_));
    void* made = nullptr;
    try {
      start_kernels();
    } catch (...) {
      table_.end_graph(handle_, &made);
      if (made != nullptr) table_.release_graph(handle_, made);
      throw;
    }
    check("graph", table_.end_graph(handle_, &made));
    graph = made;
  }
  check("graph", table_.start_graph(handle_, graph));
}

// --- tables --------------------------------------------------------------------------------------

const void* CudaDevice::table(const void* data, size_t bytes) {
  if (bytes == 0) return nullptr;
  const auto room = [&](const TableChunk& chunk) { return chunk.host.size() - chunk.used; };
  while (chunk_ < tables_.size() && room(tables_[chunk_]) < bytes) ++chunk_;
  if (chunk_ == tables_.size()) {
    TableChunk chunk{std::vector<char>(std::max(bytes, kTableChunkBytes)), nullptr};
    const int code = table_.allocate(handle_, chunk.host.size(), &chunk.memory);
    if (code != 0)
      fail(ErrorCode::kOutOfMemory,
           {.asked = static_cast<int64_t>(chunk.host.size()), .limit = info_.memory}, "[cuda] ",
           info_.name, " has no ", chunk.host.size(), " bytes left: ", table_.describe(code));
    tables_.push_back(std::move(chunk));
  }
  TableChunk& chunk = tables_[chunk_];
  std::memcpy(chunk.host.data() + chunk.used, data, bytes);
  const void* const at = static_cast<const char*>(chunk.memory) + chunk.used;
  const size_t end = (chunk.used + bytes + kTableAlignment - 1) / kTableAlignment * kTableAlignment;
  chunk.used = std::min(end, chunk.host.size());
  return at;
}

void CudaDevice::send_tables() {
  for (size_t i = 0; i <= chunk_ && i < tables_.size(); ++i) {
    TableChunk& chunk = tables_[i];
    if (chunk.sent == chunk.used) continue;
    check("upload", table_.upload(handle_, static_cast<char*>(chunk.memory) + chunk.sent,
                                  chunk.host.data() + chunk.sent, chunk.used - chunk.sent));
    chunk.sent = chunk.used;
  }
}

void CudaDevice::next_pass() {
  start();
  for (TableChunk& chunk : tables_) chunk.used = chunk.sent = 0;
  chunk_ = 0;
}

}  // namespace puna
