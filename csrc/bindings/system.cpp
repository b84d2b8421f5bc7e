// What this build and this machine offer, and what a checkpoint is, as plain Python data.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "bindings/module.h"
#include "engine/factory.h"
#include "engine/inspect.h"
#include "engine/quantize.h"
#include "platform/system.h"
#include "puna/engine.h"

namespace py = pybind11;

namespace puna::bindings {

namespace {

using namespace py::literals;  // NOLINT

py::list backends() {
  py::list all;
  for (const BackendStatus& status : available_backends()) {
    all.append(
        py::dict("name"_a = status.name, "available"_a = status.available, "why"_a = status.why));
  }
  return all;
}

py::list isas() {
  py::list all;
  for (const IsaStatus& isa : available_isas()) {
    all.append(py::dict("name"_a = isa.name, "available"_a = isa.available));
  }
  return all;
}

py::list weight_formats_list() {
  py::list all;
  for (const FormatStatus& format : weight_formats()) {
    all.append(py::dict("name"_a = format.name, "bits_per_weight"_a = format.bits_per_weight,
                        "can_encode"_a = format.can_encode));
  }
  return all;
}

py::dict system() {
  return py::dict("processor"_a = processor_name(), "threads"_a = usable_cores(),
                  "memory_total"_a = total_memory_bytes(),
                  "memory_available"_a = available_memory_bytes());
}

py::dict inspect_path(const std::string& path, const std::string& mmproj) {
  Inspection report;
  {
    const py::gil_scoped_release release;
    report = inspect(path, mmproj);
  }
  const ModelSpec& spec = report.spec;
  int64_t moe_layers = 0, chunked_layers = 0, chunk = 0, experts = 0, top_k = 0;
  for (const LayerSpec& layer : spec.layers) {
    moe_layers += layer.moe;
    chunked_layers += layer.chunk > 0;
    chunk = std::max(chunk, layer.chunk);
    experts = std::max(experts, layer.experts);
    top_k = std::max(top_k, layer.top_k);
  }
  py::list tensors;
  for (const auto& [name, tensor] : report.tensors) {
    tensors.append(py::make_tuple(
        name, name_of(tensor.dtype),
        std::vector<int64_t>(tensor.shape.begin(), tensor.shape.begin() + tensor.rank)));
  }
  return py::dict("path"_a = path, "parameters"_a = report.parameters.total,
                  "active_parameters"_a = report.parameters.active,
                  "weight_bytes"_a = report.weight_bytes, "dtype"_a = name_of(report.dtype),
                  "layers"_a = spec.layers.size(), "moe_layers"_a = moe_layers,
                  "experts"_a = experts, "top_k"_a = top_k, "chunked_layers"_a = chunked_layers,
                  "chunk"_a = chunk, "hidden_size"_a = spec.hidden, "heads"_a = spec.heads,
                  "kv_heads"_a = spec.kv_heads, "head_dim"_a = spec.head_dim,
                  "vocab_size"_a = spec.vocab_size, "max_context"_a = spec.max_position,
                  "kv_bytes_per_token"_a = report.kv_bytes_per_token,
                  "kv_fixed_bytes"_a = report.kv_fixed_bytes,
                  "image_size"_a = spec.vision ? spec.vision->image_size : 0,
                  "tokens_per_tile"_a = spec.vision ? spec.vision->tokens_per_tile() : 0,
                  "tokenizer"_a = report.tokenizer, "memory"_a = report.memory,
                  "warnings"_a = spec.warnings, "tensors"_a = tensors);
}

}  // namespace

void bind_system(py::module_& module) {
  module.def("backends", &backends, "[{name, available, why}] of every backend of this build.");
  module.def("isas", &isas,
             "[{name, available}] of every instruction set of this build, best first.");
  module.def("weight_formats", &weight_formats_list,
             "[{name, bits_per_weight, can_encode}] of every format a matrix may be packed in; "
             "quant= may name those that can be encoded.");
  module.def("system", &system, "Processor, compute threads and memory of this machine.");
  module.def(
      "read_tensor",
      [](const std::string& path, const std::string& name) {
        std::vector<float> values;
        {
          const py::gil_scoped_release release;
          values = read_tensor(path, name);
        }
        return py::array_t<float>(static_cast<py::ssize_t>(values.size()), values.data());
      },
      "path"_a, "name"_a, "Values of a checkpoint's tensor, float32 [elements].");
  module.def("inspect", &inspect_path, "path"_a, "mmproj"_a = "",
             "Configuration, sizes and tensors of a checkpoint; weights are not read.");
}

}  // namespace puna::bindings
