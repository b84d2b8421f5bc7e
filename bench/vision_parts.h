// Where the vision tower's time goes.
#pragma once

#include "backend/backend.h"
#include "bench.h"
#include "device_ceilings.h"
#include "model/parameters.h"
#include "model/spec.h"

namespace puna::bench {

// A row for each kind of operation of the tower, as it computes `tiles` tiles together: how long
// one takes, how long all of the tower's `layers` layers, and its rates beside the ceilings. Those
// of a norm and of the product that takes its rows are timed together, as the norm then makes the
// product's operand; the norm alone is told, too, and a whole layer, but neither is part of the
// sum.
void time_vision_parts(Report& report, Backend& backend, const ModelSpec& spec,
                       const VisionParameters& parameters, const MachineCeilings& ceilings,
                       int64_t tiles, int64_t layers, bool small);

}  // namespace puna::bench
