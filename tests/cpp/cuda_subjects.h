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

inline std::vector<std::vector<Named>>& subjects() {
  static auto all = [] {
    std::vector<std::vector<Named>> made(1);
    int schedules = 0;
    setenv("PUNA_CUDA_PRODUCTS", "warpgroups", 1);  // on those emulated devices that have them
    emulator::device_table().device_count(&schedules);
    // Where sanitizers take their time, the last of each kind that differs in what is tested: order
    // is not what they look at.
    const bool sanitized = check::trials(4) < 4;
#ifdef PUNA_TEST_PRODUCTS
    const int first = 1, step = 2;  // without products of warpgroups, and with them
#else
    const int first = schedules - 1, step = 1;
#endif
    for (int i = sanitized ? first : 0; i < schedules; i += sanitized ? step : 1) {
      // Results are read where they are, so each kernel is started at once.
      auto backend = make_cuda_backend(emulator::device_table(), i, make_cpu_backend({"", 1}), 1);
      std::string name = backend->description();
      made[0].push_back({std::move(name), std::move(backend)});
    }
    return made;
  }();
  return all;
}

}  // namespace fixture
