// How fast this machine reads its memory.
#pragma once

namespace puna {

// Bytes a second of all usable cores together, measured at the first call, which takes a fraction
// of a second and 256 MiB. Throws OutOfMemory if these are not to be had.
double memory_bandwidth();

}  // namespace puna
