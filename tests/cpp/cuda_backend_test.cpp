// Every row-wise operation of the CUDA backend on the emulator:
#include "cuda_subjects.h"

// by the tests of every backend.
#include "backend_test.cpp"
