#include "bindings/module.h"

#include "bindings/errors.h"

PYBIND11_MODULE(_core, module) {
  module.doc() = "The compiled core of puna; use it through the package `puna`.";
  puna::bindings::register_errors(module);
  puna::bindings::bind_text(module);
  puna::bindings::bind_image(module);
  puna::bindings::bind_system(module);
  puna::bindings::bind_dlpack(module);
  puna::bindings::bind_engine(module);
  puna::bindings::bind_plan(module);
}
