// What the processor has and the system saves on a context switch: the `supported` of each kernel
// table. The answers are computed in cpu_features.cpp, which is compiled for the baseline, since
// code compiled with an instruction set's own flags may not run before the answer is known.
#pragma once

namespace puna {

bool has_avx2();              // with fma, f16c and bmi2
bool has_avx512();            // f, bw, vl and dq, on top of avx2
bool has_avx_vnni();          // on top of avx2
bool has_avx512_vnni();       // on top of avx512
bool has_avx512_vnni_bf16();  // vnni and bf16, on top of avx512
bool has_avx512_amx();        // tiles of int8, on top of those; asks the system for their use
bool has_neon_dotprod();
bool has_neon_i8mm_bf16();  // on top of dotprod

}  // namespace puna
