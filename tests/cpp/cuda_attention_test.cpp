// Attention of the CUDA backend on the emulator:
#include "cuda_subjects.h"

// by the tests of every backend.
#include "backend_attention_test.cpp"
