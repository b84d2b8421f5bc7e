// C++ errors become the Python exceptions of puna.errors.
#pragma once

#include <pybind11/pybind11.h>

namespace puna::bindings {

void register_errors(pybind11::module_& module);

}  // namespace puna::bindings
