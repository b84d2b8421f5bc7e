// DeviceArray: results of the engine in the memory of the device that computed them, handed out by
// DLPack, as the array API standard of 2023.12 has it (https://dmlc.github.io/dlpack).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

#include "bindings/module.h"
#include "puna/engine.h"

namespace py = pybind11;

namespace puna::bindings {

namespace {

// --- DLPack's structures, as its 1.0 lays them out -----------------------------------------------

constexpr int32_t kCpu = 1, kCuda = 2;  // DLDeviceType
constexpr uint8_t kFloat = 2;           // DLDataTypeCode
constexpr uint64_t kIsCopied = 2;       // of the flags

struct Tensor {
  void* data;
  struct {
    int32_t type, number;
  } device;
  int32_t dimensions;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;  // in elements
  uint64_t byte_offset;
};

struct Unversioned {
  static constexpr const char* kName = "dltensor";
  Tensor tensor;
  void* context;
  void (*deleter)(Unversioned*);
};

struct Versioned {
  static constexpr const char* kName = "dltensor_versioned";
  struct {
    uint32_t major, minor;
  } version;
  void* context;
  void (*deleter)(Versioned*);
  uint64_t flags;
  Tensor tensor;
};

static_assert(sizeof(Tensor) == 48 && sizeof(Unversioned) == 64 && sizeof(Versioned) == 80);

// --- handing out ---------------------------------------------------------------------------------

// Whoever lets go of memory last may wait for a GPU, or end an engine's backend: without the GIL,
// if it is held, as what is waited for may need it.
void release(const DeviceRows* rows) {
  std::optional<py::gil_scoped_release> without;
  if (Py_IsInitialized() != 0 && PyGILState_Check() != 0) without.emplace();
  delete rows;
}

class DeviceArray {
 public:
  explicit DeviceArray(DeviceRows rows) : rows_(new DeviceRows(std::move(rows)), &release) {}

  const DeviceRows& rows() const { return *rows_; }
  std::pair<int32_t, int32_t> device() const {
    return rows_->gpu ? std::pair(kCuda, int32_t{*rows_->gpu}) : std::pair(kCpu, 0);
  }
  std::string device_name() const {
    return rows_->gpu ? "cuda:" + std::to_string(*rows_->gpu) : "cpu";
  }

  // A capsule that keeps the memory until what it holds is deleted.
  template <class Managed>
  py::object capsule(bool copied) const {
    struct Exported {
      Managed managed = {};
      int64_t shape[2], strides[2];
      DeviceArray array;
    };
    auto* const made = new Exported{{}, {rows_->rows, rows_->columns}, {rows_->columns, 1}, *this};
    Managed& managed = made->managed;
    const auto [type, number] = device();
    managed.tensor = {rows_->data.get(), {type, number}, 2, {kFloat, 32, 1},
                      made->shape,       made->strides,  0};
    managed.context = made;
    managed.deleter = [](Managed* of) { delete static_cast<Exported*>(of->context); };
    if constexpr (std::is_same_v<Managed, Versioned>) {
      managed.version = {1, 0};
      managed.flags = copied ? kIsCopied : 0;
    }
    // Who takes it renames the capsule, and calls the deleter by itself.
    PyObject* const capsule = PyCapsule_New(&managed, Managed::kName, [](PyObject* capsule) {
      if (PyCapsule_IsValid(capsule, Managed::kName) == 0) return;
      auto* const held = static_cast<Managed*>(PyCapsule_GetPointer(capsule, Managed::kName));
      held->deleter(held);
    });
    if (capsule == nullptr) {
      delete made;
      throw py::error_already_set();
    }
    return py::reinterpret_steal<py::object>(capsule);
  }

  // In the memory it is of, or in the host's. By the engine, if it is of a GPU.
  DeviceArray copy(bool to_host) const {
    if (rows_->gpu) return copy_of_gpu(to_host);
    const auto count = static_cast<size_t>(rows_->rows * rows_->columns);
    DeviceRows copied = *rows_;
    const std::shared_ptr<float[]> memory(new float[count]);
    std::copy_n(rows_->data.get(), count, memory.get());
    copied.data = {memory, memory.get()};
    return DeviceArray(std::move(copied));
  }

 private:
  DeviceArray copy_of_gpu(bool to_host) const;

  std::shared_ptr<const DeviceRows> rows_;
};

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::string message = "[dlpack] ";
  ((message += parts), ...);
  throw py::buffer_error(message);
}

DeviceArray DeviceArray::copy_of_gpu(bool to_host) const {
  try {
    const py::gil_scoped_release without;
    const std::shared_ptr<Engine> engine = rows_->engine.lock();
    if (engine == nullptr) fail(ErrorCode::kEngineClosed, "[dlpack] the engine is gone");
    return DeviceArray(engine->copy(*rows_, to_host));
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kEngineClosed) throw;
  }
  refuse("the engine that would copy the array, which is on ", device_name(),
         ", is closed; take it as it is and copy that");
}

// Work that is done needs no stream; but one that is none is wrong.
void check_stream(const py::object& stream, bool on_gpu) {
  if (stream.is_none()) return;
  if (!PyLong_Check(stream.ptr()) || PyBool_Check(stream.ptr()))
    throw py::type_error("[dlpack] stream must be None or an int, not " +
                         std::string(py::repr(py::type::of(stream))));
  const auto text = std::string(py::str(stream));
  if (!on_gpu) refuse("stream is ", text, "; for the host's memory it must be None");
  if (text == "0")
    refuse("stream is 0, which may be either default stream; say 1 for the legacy one, or 2");
  if (text.front() == '-' && text != "-1")
    refuse("stream is ", text, "; it must be None, -1 for no order at all, or a stream's address");
}

using Pair = std::optional<std::pair<int64_t, int64_t>>;

Pair pair_of(const char* name, const py::object& object) {
  if (object.is_none()) return std::nullopt;
  try {
    if (py::isinstance<py::tuple>(object) && py::len(object) == 2) {
      const auto both = py::reinterpret_borrow<py::tuple>(object);
      return std::pair(both[0].cast<int64_t>(), both[1].cast<int64_t>());
    }
  } catch (const py::cast_error&) {
  }
  throw py::type_error(std::string("[dlpack] ") + name + " must be None or a tuple of two ints");
}

py::object dlpack(const DeviceArray& array, const py::object& stream, const py::object& max_version,
                  const py::object& dl_device, const py::object& copy) {
  const Pair version = pair_of("max_version", max_version);
  const Pair wanted = pair_of("dl_device", dl_device);
  if (!copy.is_none() && !PyBool_Check(copy.ptr()))
    throw py::type_error("[dlpack] copy must be None, True or False");
  const Pair::value_type own = array.device(), host = {kCpu, 0};
  const Pair::value_type device = wanted.value_or(own);
  if (device != own && device != host)
    refuse("the array is on ", array.device_name(), "; it cannot go to device (",
           std::to_string(device.first), ", ", std::to_string(device.second),
           "), but to (1, 0), the host's memory");
  if (device != own && copy.ptr() == Py_False)
    refuse("the array is on ", array.device_name(),
           "; it goes to the host's memory by a copy alone");
  check_stream(stream, device != host);
  const bool copied = device != own || copy.ptr() == Py_True;
  const DeviceArray given = copied ? array.copy(device == host) : array;
  return version && version->first >= 1 ? given.capsule<Versioned>(copied)
                                        : given.capsule<Unversioned>(copied);
}

}  // namespace

py::object device_array(DeviceRows rows) { return py::cast(DeviceArray(std::move(rows))); }

void bind_dlpack(py::module_& module) {
  using namespace py::literals;  // NOLINT

  py::class_<DeviceArray>(
      module, "DeviceArray",
      "float32 [rows, columns] in the memory of the device that computed it, which is done with\n"
      "it: for torch.from_dlpack, cupy.from_dlpack and whatever else takes DLPack, without a "
      "copy.\n"
      "The memory stays until nobody has it any more, whether the engine is closed or not.")
      .def_property_readonly(
          "shape",
          [](const DeviceArray& array) {
            return py::make_tuple(array.rows().rows, array.rows().columns);
          },
          "(rows, columns).")
      .def_property_readonly(
          "dtype", [](const DeviceArray&) { return py::dtype::of<float>(); }, "float32.")
      .def_property_readonly("device", &DeviceArray::device_name, "\"cpu\" or \"cuda:N\".")
      .def("__dlpack_device__", &DeviceArray::device,
           "(1, 0) for the host's memory, (2, N) for that of the GPU N.")
      .def(
          "__dlpack__", &dlpack, py::kw_only(), "stream"_a = py::none(),
          "max_version"_a = py::none(), "dl_device"_a = py::none(), "copy"_a = py::none(),
          "A capsule that shares the memory.\n\n"
          "Args:\n"
          "    stream: Of a GPU, None, or the consumer's stream: an address, 1, 2, or -1. All of\n"
          "        them may use the memory at once. In the host's memory, None.\n"
          "    max_version: The latest version of DLPack that the consumer takes, as (1, 0);\n"
          "        without one the capsule is as before versions.\n"
          "    dl_device: None, what `__dlpack_device__` says, or (1, 0): the host's memory, by a\n"
          "        copy.\n"
          "    copy: True copies in any case, and False never. The copy of what is on a GPU is\n"
          "        made by its engine, if that is still open.\n\n"
          "Raises:\n"
          "    BufferError: It cannot be had so.\n"
          "    TypeError: An argument is of another type.")
      .def("__repr__", [](const DeviceArray& array) {
        const DeviceRows& rows = array.rows();
        return "<puna.DeviceArray float32 [" + std::to_string(rows.rows) + ", " +
               std::to_string(rows.columns) + "] on " + array.device_name() + ">";
      });
}

}  // namespace puna::bindings
