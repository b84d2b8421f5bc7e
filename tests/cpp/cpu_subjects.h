// The CPU backend as what the backend tests test.
#pragma once

#include "backend/cpu/cpu_backend.h"
#include "backend_fixture.h"
#include "kernels/cpu/dispatch.h"

namespace fixture {

// Several leaves of attention, and more than are worked on at once.
constexpr int64_t kLongContext = 4600, kVeryLongContext = 60001;
// Prompts that are cut: with open pages alone, with sealed ones; and a text that sequences share.
constexpr int64_t kPrompt = 600, kCutContext = 2500, kSharedPrefix = 2200;
constexpr int kCutTrials = 4, kForks = 9;
// Members of a group that are tried with every cut and batch.
constexpr size_t kBatched = 3;
// How often a call reads a stream at most: once for all rows, or once for either kind of tile.
constexpr int64_t kMostReadings = 1;
// Whether queries and weights become whole numbers before they meet the codes of sealed pages.
constexpr bool kSealedInIntegers = true;
// Whether queries, weights and what is unsealed become bfloat16.
constexpr bool kRoundsOperands = false;

// The CPU backend for each instruction set that runs here, each with 1, 2 and 3 threads.
inline std::vector<std::vector<Named>>& subjects() {
  static auto all = [] {
    std::vector<std::vector<Named>> made;
    for (const KernelTable* table : compiled_isas()) {
      if (!table->supported()) continue;
      std::vector<Named> same_isa;
      for (const int threads : {1, 2, 3}) {
        auto backend = make_cpu_backend({table->isa, threads});
        std::string name = backend->description();
        same_isa.push_back({std::move(name), std::move(backend)});
      }
      made.push_back(std::move(same_isa));
    }
    return made;
  }();
  return all;
}

}  // namespace fixture
