// The oracle of every backend: each operation is its formula, in plain loops over double.
//
// Results are rounded to fp32 once, at the end of an operation. Weights keep their exact stored
// values, and activations are not rounded to bfloat16 in front of bfloat16 weights: this is the
// mathematical truth from which other backends' roundings are measured. Keys and values are rounded
// to the type of their page, which is part of the page's format.
#pragma once

#include <memory>

#include "backend/backend.h"

namespace puna {

std::unique_ptr<Backend> make_ref_backend(const BackendOptions& options);
BackendStatus ref_status();

}  // namespace puna
