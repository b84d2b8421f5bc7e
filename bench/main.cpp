// puna-bench: speed of the engine's parts, each beside what the machine could do at best.
#include <cstring>
#include <exception>
#include <iostream>

#include "bench.h"

namespace {

struct Command {
  const char* name;
  const char* summary;
  int (*run)(int argc, char** argv);
};

constexpr Command kCommands[] = {
    {"ops", "kernels at the shapes of Llama 4 Scout", puna::bench::run_ops},
    {"model", "prefill and decode of a few layers with random weights", puna::bench::run_model},
    {"kv-decode", "decoding over a long cache, in memory or on disk", puna::bench::run_kv_decode},
    {"resume", "a saved session opened, gone on from and forked", puna::bench::run_resume},
    {"vision", "the vision tower with random weights", puna::bench::run_vision},
    {"cuda", "the CUDA backend on a GPU: is it right, and how fast", puna::bench::run_cuda},
};

void print_usage(std::ostream& out) {
  out << "usage: puna-bench [--kernels LIBPUNA_CUDA] COMMAND [options]; puna-bench COMMAND --help\n"
         "--kernels is for where PUNA_CUDA_LIBRARY is not set\n";
  for (const Command& command : kCommands) {
    out << "  " << command.name << "\t" << command.summary << "\n";
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 3 && std::strcmp(argv[1], "--kernels") == 0) {
    setenv("PUNA_CUDA_LIBRARY", argv[2], 0);  // what is set stays
    argc -= 2;
    argv += 2;
  }
  if (argc == 2 && !std::strcmp(argv[1], "--help")) {
    print_usage(std::cout);
    return 0;
  }
  for (const Command& command : kCommands) {
    if (argc < 2 || std::strcmp(argv[1], command.name) != 0) continue;
    try {
      return command.run(argc - 2, argv + 2);
    } catch (const std::exception& error) {
      std::cerr << "puna-bench: " << error.what() << "\n";
      return 1;
    }
  }
  print_usage(std::cerr);
  return 2;
}
