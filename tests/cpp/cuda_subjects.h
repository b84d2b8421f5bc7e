// The CUDA backend on the emulator as what the backend tests test: it must give the same bits under
// every schedule. Included before the tests; those of products define PUNA_TEST_PRODUCTS.
#pragma once

#include <cstdlib>

#define PUNA_TEST_SUBJECTS
#include "backend/cpu/cpu_backend.h"
#include "backend/cuda/cuda_backend.h"
#include "backend_fixture.h"
#include "emulator/device.h"

namespace fixture {

// Some pages of attention, and several groups of pages. The emulator takes its time.
constexpr int64_t kLongContext = 700, kVeryLongContext = 30001;
// cpu_subjects.h says what these are.
constexpr int64_t kPrompt = 300, kCutContext = 540, kSharedPrefix = 530;
constexpr int kCutTrials = 1, kForks = 3;
constexpr size_t kBatched = 1;
constexpr int64_t kMostReadings = 2;
constexpr bool kSealedInIntegers = false, kRoundsOperands = true;

// The emulated devices that are looked at: all; where sanitizers take their time, the last of each
// kind that differs in what is tested, as order is not what they look at.
inline std::vector<int> ordinals() {
#ifdef PUNA_TEST_PRODUCTS
  const std::vector<int> kinds{1, 3};  // without products of warpgroups, and with them
#else
  const std::vector<int> kinds{3};
#endif
  const bool sanitized = check::trials(4) < 4;
  return sanitized ? kinds : std::vector<int>{0, 1, 2, 3};
}

inline std::vector<std::vector<Named>>& subjects() {
  static auto all = [] {
    std::vector<std::vector<Named>> made(1);
    setenv("PUNA_CUDA_PRODUCTS", "warpgroups", 1);  // on those emulated devices that have them
    for (const int ordinal : ordinals()) {
      // Results are read where they are, so each kernel is started at once.
      auto backend =
          make_cuda_backend(emulator::device_table(), ordinal, make_cpu_backend({"", 1}), 1);
      std::string name = backend->description();
      made[0].push_back({std::move(name), std::move(backend)});
    }
    return made;
  }();
  return all;
}

}  // namespace fixture
