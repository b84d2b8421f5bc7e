#!/usr/bin/env bash
# All that is to be learnt from a GPU, in one go of less than nine minutes: what machine it is, whether every
# operation is right (memory errors and races included, where compute-sanitizer is there), and how fast each is
# beside a copy. Writes everything to a folder and ends with the table.
#
#   bench/gpu_run.sh OUT [PUNA_BENCH]
#
# PUNA_BENCH is a puna-bench with libpuna_cuda.so beside it, built elsewhere; without one both are built here, which
# needs nvcc, cmake, ninja and Python with nlohmann-json, and takes most of the time.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bench/gpu_run.sh OUT [PUNA_BENCH]}
bench=${2:-}
mkdir -p "$out"

{
  date -u
  git rev-parse HEAD 2>/dev/null || true
  nvidia-smi
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit --format=csv
  nproc
  ldd --version | head -1
  nvcc --version 2>/dev/null | tail -1 || true
} >"$out/environment.txt" 2>&1

if [ -z "$bench" ]; then
  build=build/gpu
  timeout 300 cmake -G Ninja -S . -B "$build" -DCMAKE_BUILD_TYPE=Release -DPUNA_CUDA=on \
    -DPUNA_CUDA_ARCHITECTURES=native >"$out/build.txt" 2>&1
  timeout 300 cmake --build "$build" --target puna-bench puna_cuda >>"$out/build.txt" 2>&1
  bench=$build/puna-bench
fi

failed=0
timeout 90 "$bench" cuda --check >"$out/checks.txt" 2>&1 || failed=1
cat "$out/checks.txt"
for tool in memcheck racecheck; do
  command -v compute-sanitizer >/dev/null || break
  timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 1 "$bench" cuda --check \
    >"$out/$tool.txt" 2>&1 || { echo "$tool: see $tool.txt"; failed=1; }
done
if [ "$failed" = 0 ]; then
  timeout 150 "$bench" cuda --json >"$out/timings.json" 2>>"$out/checks.txt" || failed=1
  python3 - "$out/timings.json" <<'PYTHON'
import json, sys
report = json.load(open(sys.argv[1]))
print(json.dumps(report, indent=1))
PYTHON
fi
exit "$failed"
