// Plans as plain Python data.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/module.h"
#include "platform/bandwidth.h"
#include "puna/plan.h"

namespace py = pybind11;

namespace puna::bindings {

using namespace py::literals;  // NOLINT

py::dict dict_of(const Plan& plan) {
  py::list remedies;
  for (const Remedy& remedy : plan.remedies)
    remedies.append(py::make_tuple(remedy.change, remedy.memory, remedy.disk));
  return py::dict(
      "kv"_a = plan.kv, "context"_a = plan.context, "max_context"_a = plan.max_context,
      "largest_context"_a = plan.largest_context,
      "weight_bytes"_a = plan.text_bytes + plan.vision_bytes, "vision_bytes"_a = plan.vision_bytes,
      "scratch_bytes"_a = plan.scratch_bytes, "kv_sealed_bytes"_a = plan.kv_sealed_bytes,
      "kv_open_bytes"_a = plan.kv_open_bytes, "kv_local_bytes"_a = plan.kv_local_bytes,
      "kv_bytes_per_token"_a = plan.kv_bytes_per_token, "kv_memory_bytes"_a = plan.kv_memory_bytes,
      "kv_disk_bytes"_a = plan.kv_disk_bytes, "memory_needed"_a = plan.memory_needed,
      "memory_bytes"_a = plan.memory_budget, "memory_given"_a = plan.memory_given,
      "disk_needed"_a = plan.disk_needed, "disk_bytes"_a = plan.disk_budget, "fits"_a = plan.fits,
      "step_memory_bytes"_a = plan.step_memory_bytes, "step_disk_bytes"_a = plan.step_disk_bytes,
      "step_host_bytes"_a = plan.step_host_bytes, "on_gpu"_a = plan.on_gpu,
      "expert_layers"_a = plan.expert_layers, "host_layers"_a = plan.host_layers,
      "host_expert_bytes"_a = plan.host_expert_bytes,
      "expert_window_bytes"_a = plan.expert_window_bytes, "host_needed"_a = plan.host_needed,
      "host_bytes"_a = plan.host_memory, "kv_offloads"_a = plan.kv_offloads,
      "kv_host_bytes"_a = plan.kv_host_bytes, "step_link_bytes"_a = plan.step_link_bytes,
      "remedies"_a = remedies);
}

void bind_plan(py::module_& module) {
  module.def(
      "plan",
      [](const std::string& path, const std::string& mmproj, const std::string& kv, int64_t context,
         int64_t memory, int64_t disk, bool vision, const std::string& quant,
         const std::vector<std::pair<std::string, std::string>>& quant_overrides,
         int64_t device_experts, bool kv_host, int64_t host_memory,
         std::optional<int64_t> gpu_memory) {
        LoadOptions options;
        options.path = path;
        options.mmproj = mmproj;
        options.kv = kv;
        options.context = context;
        options.memory = memory;
        options.vision = vision;
        options.quant = quant;
        options.quant_overrides = quant_overrides;
        options.device_experts = device_experts;
        options.kv_host = kv_host;
        options.host_memory = host_memory;
        Plan made;
        {
          const py::gil_scoped_release release;
          made = plan(options, disk, gpu_memory);
        }
        return dict_of(made);
      },
      py::kw_only(), "path"_a, "mmproj"_a, "kv"_a, "context"_a, "memory"_a, "disk"_a, "vision"_a,
      "quant"_a, "quant_overrides"_a, "device_experts"_a, "kv_host"_a, "host_memory"_a,
      "gpu_memory"_a, "What a checkpoint needs; weights are not read.");
  module.def("memory_bandwidth", &memory_bandwidth, py::call_guard<py::gil_scoped_release>(),
             "Bytes a second that this machine reads, measured once.");
}

}  // namespace puna::bindings
