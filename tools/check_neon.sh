#!/usr/bin/env bash
# Builds puna for 64-bit ARM and runs the tests of the kernels under emulation, so that the NEON code
# is tested on machines of another kind. Usage: tools/check_neon.sh [BUILD_DIR]
# Needs aarch64-linux-gnu-g++, qemu-aarch64, cmake and ninja; fails, naming what is missing, without.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-$root/build/neon}
tests=(elementwise_test gemm_test attention_test attention_sealed_test quant_test fp8_test checksum_test)

missing=()
for tool in aarch64-linux-gnu-g++ qemu-aarch64 cmake ninja; do
  command -v "$tool" >/dev/null || missing+=("$tool")
done
if [ ${#missing[@]} -gt 0 ]; then
  echo "tools/check_neon.sh: not found: ${missing[*]}" >&2
  echo "On Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user; pip install cmake ninja" >&2
  exit 1
fi

cmake -G Ninja -S "$root" -B "$build" -DPUNA_BUILD_TESTS=ON -DPUNA_CUDA=off \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static \
  -DPython_EXECUTABLE="${PYTHON:-$(command -v python3)}" >/dev/null
cmake --build "$build" --target "${tests[@]}"
python3 "$root/tools/check_isa_symbols.py" "$build/libpuna_kernels.a"

# "max" has every feature that the emulator knows.
for test in "${tests[@]}"; do
  echo "== $test"
  qemu-aarch64 -cpu max "$build/$test"
done
echo "== elementwise_test on a processor without dot products: scalar is all that may run"
qemu-aarch64 -cpu cortex-a57 "$build/elementwise_test"
