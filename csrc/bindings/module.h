// The parts of puna._core, one per file of bindings/.
#pragma once

#include <pybind11/pybind11.h>

#include "puna/engine.h"

namespace puna::bindings {

void bind_text(pybind11::module_& module);    // Tokenizer, StreamDecoder
void bind_image(pybind11::module_& module);   // plan_tiles, prepare_image, image_token_layout
void bind_system(pybind11::module_& module);  // backends, isas, inspect, system
void bind_engine(pybind11::module_& module);  // load, Engine, Session
void bind_dlpack(pybind11::module_& module);  // DeviceArray
void bind_plan(pybind11::module_& module);    // plan, memory_bandwidth

pybind11::dict dict_of(const Plan& plan);
pybind11::object device_array(DeviceRows rows);

}  // namespace puna::bindings
