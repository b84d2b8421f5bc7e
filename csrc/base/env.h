// The environment variables puna knows; nothing else in the core reads the environment. What a
// caller passes explicitly goes before them.
//
//   PUNA_ISA      name of the instruction set, see `puna doctor`    default: the best supported
//   PUNA_CACHE    directory of what can be made again, or "off"     default: environment_cache()
//   PUNA_CUDA_LIBRARY  path of libpuna_cuda.so                      default: beside puna itself
//   PUNA_CUDA_PRODUCTS  "warps" or "warpgroups": instructions of     default: warps
//                       products of many rows, on Hopper
//   PUNA_CUDA_SENT_ROWS  from how many rows on experts that the    default: by rates
//                       host holds go to the GPU; 0: never           (expert_window.h)
//   PUNA_THREADS  number of compute threads                         default: physical cores usable
//
// Header only, since kernels/cpu/dispatch.cpp is in a library of its own.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string>

#include "base/error.h"

namespace puna {

// "" if PUNA_ISA is not set.
inline std::string environment_isa() {
  const char* value = std::getenv("PUNA_ISA");
  return value ? value : "";
}

// "" if PUNA_CUDA_LIBRARY is not set.
inline std::string environment_cuda_library() {
  const char* value = std::getenv("PUNA_CUDA_LIBRARY");
  return value ? value : "";
}

// Whether PUNA_CUDA_PRODUCTS is "warpgroups". Throws InvalidRequest if it is neither that nor
// "warps".
inline bool environment_cuda_warpgroups() {
  const char* value = std::getenv("PUNA_CUDA_PRODUCTS");
  const std::string products = value && *value ? value : "warps";
  if (products != "warps" && products != "warpgroups")
    fail(ErrorCode::kInvalidRequest, "[env] PUNA_CUDA_PRODUCTS is '", products,
         "'; it must be warps or warpgroups");
  return products == "warpgroups";
}

// None if PUNA_CUDA_SENT_ROWS is not set or empty. Throws InvalidRequest unless it is a number from
// 0 to 1,000,000,000.
inline std::optional<int64_t> environment_cuda_sent_rows() {
  const char* value = std::getenv("PUNA_CUDA_SENT_ROWS");
  if (!value || !*value) return std::nullopt;
  char* end = nullptr;
  const long rows = std::strtol(value, &end, 10);
  if (*end != '\0' || rows < 0 || rows > 1'000'000'000) {
    fail(ErrorCode::kInvalidRequest, "[env] PUNA_CUDA_SENT_ROWS is '", value,
         "'; it must be a number of rows, or 0 for never");
  }
  return rows;
}

// Where files may be kept that spare later processes work and can be made again, or "" if nowhere:
// PUNA_CACHE, else the directory of that name below XDG_CACHE_HOME, else below .cache in HOME.
inline std::string environment_cache() {
  const auto variable = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string(value ? value : "");
  };
  const std::string own = variable("PUNA_CACHE");
  if (!own.empty()) return own == "off" ? "" : own;
  // Relative paths count for nothing, as freedesktop.org's base directory specification has it.
  const std::string caches = variable("XDG_CACHE_HOME"), home = variable("HOME");
  if (caches.starts_with('/')) return caches + "/puna";
  return home.starts_with('/') ? home + "/.cache/puna" : "";
}

// 0 if PUNA_THREADS is not set or empty. Throws InvalidRequest unless it is a number from 1 to
// 1,000,000.
inline int environment_threads() {
  const char* value = std::getenv("PUNA_THREADS");
  if (!value || !*value) return 0;
  char* end = nullptr;
  const long threads = std::strtol(value, &end, 10);
  if (*end != '\0' || threads < 1 || threads > 1'000'000) {
    fail(ErrorCode::kInvalidRequest, "[env] PUNA_THREADS is '", value,
         "'; it must be a number of threads, 1 or more");
  }
  return static_cast<int>(threads);
}

}  // namespace puna
