#include "profile.h"

#include <algorithm>
#include <iterator>

#include "backend/cpu/cpu_backend.h"
#include "backend/cuda/cuda_backend.h"
#include "base/error.h"
#include "quant/format.h"

namespace puna::bench {
namespace {

// Samples that wait for their events at a time.
constexpr size_t kMostSamples = 2048;

std::string rows_of(int64_t rows) { return std::to_string(rows) + (rows == 1 ? " row" : " rows"); }

template <class Call>
std::string describe(const std::string& name, const Call&) {
  return name;
}
std::string describe(const std::string& name, const cuda::ProductCall& call) {
  constexpr const char* kQuantized[] = {
#define PUNA_FORMAT(Traits, name) name,
#include "quant/formats.inc"
#undef PUNA_FORMAT
  };
  constexpr const char* kOthers[] = {"fp32", "bf16", "fp8"};
  std::string of = name + ", ";
  of += call.kind == cuda::kWeightsQuantized ? kQuantized[call.format] : kOthers[call.kind];
  of += " " + std::to_string(call.rows) + " x " + std::to_string(call.cols) + ", ";
  of += rows_of(call.count);
  if (call.experts.offsets != nullptr)
    of += " of " + std::to_string(call.experts.slots) + " experts at most";
  if (call.shared.count > 0) of += " and of the shared expert";
  return of;
}
std::string describe(const std::string& name, const cuda::OperandCall& call) {
  return name + (call.gated ? ", gated, " : ", ") + rows_of(call.rows);
}
std::string describe(const std::string& name, const cuda::NormCall& call) {
  return name + (call.added.rows > 0 ? " of experts' sums, " : ", ") + rows_of(call.rows);
}
std::string describe(const std::string& name, const cuda::RoutingCall& call) {
  return name + (call.norm.rows > 0 ? " with the norm, " : ", ") + rows_of(call.rows);
}
std::string describe(const std::string& name, const cuda::AttendCall& call) {
  constexpr const char* kKinds[] = {"in fp32", "a block a page", "a block a group of pages"};
  return name + " " + kKinds[call.kind] + ", " + std::to_string(call.most_pages) +
         " pages at most, " + std::to_string(call.count) + " tiles" +
         (call.append.rows > 0 ? ", appending" : "");
}

void check(int code, const cuda::DeviceTable& table) {
  if (code != 0) fail(ErrorCode::kDevice, "[cuda] profile: ", table.describe(code));
}

}  // namespace

Profile* Profile::current_ = nullptr;

Profile::Profile() : kernels_(cuda_library()), timed_(kernels_) {
  current_ = this;
#define PUNA_OPERATION(name, Call)                            \
  timed_.name = [](void* device, const cuda::Call* call) {    \
    return run(#name, current_->kernels_.name, device, call); \
  };
#include "kernels/cuda/operations.inc"
#undef PUNA_OPERATION
  // What would become a graph is started as it is; there is no graph, so the next time as well.
  timed_.begin_graph = [](void*) { return 0; };
  timed_.end_graph = [](void*, void** graph) {
    *graph = nullptr;
    return 0;
  };
  timed_.start_graph = [](void*, void*) { return 0; };
}

Profile::~Profile() { current_ = nullptr; }

std::unique_ptr<Backend> Profile::make_backend(int ordinal) {
  return make_cuda_backend(timed_, ordinal, make_cpu_backend({}));
}

template <class Call>
int Profile::run(const char* name, int (*kernel)(void*, const Call*), void* device,
                 const Call* call) {
  Profile& profile = *current_;
  const cuda::DeviceTable& table = profile.kernels_;
  profile.device_ = device;
  if (profile.samples_.size() >= kMostSamples) profile.add_up();
  Sample sample{describe(name, *call), {}};
  for (void*& event : sample.events) check(table.make_event(device, 1, &event), table);
  check(table.record_event(device, sample.events[0], cuda::kMainQueue), table);
  const int code = kernel(device, call);
  check(table.record_event(device, sample.events[1], cuda::kMainQueue), table);
  profile.samples_.push_back(std::move(sample));
  return code;
}

void Profile::add_up() {
  if (samples_.empty()) return;
  check(kernels_.synchronise(device_), kernels_);
  for (const Sample& sample : samples_) {
    float milliseconds = 0;
    check(kernels_.elapsed(device_, sample.events[0], sample.events[1], &milliseconds), kernels_);
    Time& time = times_[sample.name];
    ++time.calls;
    time.seconds += static_cast<double>(milliseconds) / 1000;
    for (void* event : sample.events) check(kernels_.release_event(device_, event), kernels_);
  }
  samples_.clear();
}

std::vector<std::pair<std::string, Profile::Time>> Profile::take() {
  add_up();
  std::vector<std::pair<std::string, Time>> times(times_.begin(), times_.end());
  times_.clear();
  std::ranges::stable_sort(
      times, [](const auto& a, const auto& b) { return a.second.seconds > b.second.seconds; });
  return times;
}

}  // namespace puna::bench
