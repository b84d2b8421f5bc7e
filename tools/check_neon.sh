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

# "max" has every feature that the emulator knows; on the other processor, without dot products,
# scalar is all that may run.
run() {
  output=$(qemu-aarch64 -cpu "$1" "$build/$2" 2>&1) && status=0 || status=$?
  printf '== %s on %s\n%s\n' "$2" "$1" "$output"
  return $status
}
export -f run
export build
{
  printf 'max %s\n' "${tests[@]}"
  echo "cortex-a57 elementwise_test"
} | xargs -P "$(nproc)" -L 1 bash -c 'run "$@"' run
