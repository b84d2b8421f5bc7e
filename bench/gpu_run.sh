#!/usr/bin/env bash
# All that is to be learnt from a GPU, in one go of less than nine minutes: what machine it is, whether every
# operation is right (memory errors and races included, where compute-sanitizer is there), and how fast each is
# beside a copy. A step that fails, or takes too long, is told and does not keep the others from running.
#
#   bench/gpu_run.sh OUT [PUNA_BENCH]       on the machine with the GPU
#   bench/gpu_run.sh --prepare FOLDER [CMAKE_OPTION...]
#                                           beforehand, where there are nvcc and the rest: FOLDER/puna-bench
#
# OUT gets a log of each step, and cuda.json: which steps passed, and what was measured. PUNA_BENCH is a puna-bench with libpuna_cuda.so beside it; with none,
# or one that does not start there, both are built, which needs nvcc, cmake, ninja (or make), a C++ compiler and
# nlohmann/json.hpp (from its wheel, the system, or the folder of PUNA_BENCH). Uses nothing but bash and coreutils
# otherwise. SMALL=1 measures tiny shapes, to see that all runs; PUNA_CUDA_LIBRARY replaces the kernels, as by the
# emulator.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
usage="usage: bench/gpu_run.sh OUT [PUNA_BENCH], or bench/gpu_run.sh --prepare FOLDER [CMAKE_OPTION...]"

# Configures and builds puna-bench and the kernels in folder $1, for the architectures $2; $3...: more of cmake's.
build() {
  local folder=$1 architectures=$2
  shift 2
  local generator=()
  command -v ninja >/dev/null && generator=(-G Ninja)
  # A processor with other instructions than those of this one will run it, so only few kernels of the host's.
  cmake "${generator[@]}" -S . -B "$folder" -DCMAKE_BUILD_TYPE=Release -DPUNA_CUDA=on \
    -DPUNA_CUDA_ARCHITECTURES="$architectures" -DPUNA_ISAS=avx2 "$@" &&
    cmake --build "$folder" --target puna-bench puna_cuda --parallel "$(nproc)"
}

if [ "${1:-}" = --prepare ]; then
  folder=${2:?$usage}
  # Older systems have an older libstdc++.
  build "$folder" "80;90a-real" -DCMAKE_EXE_LINKER_FLAGS="-static-libstdc++ -static-libgcc" "${@:3}" || exit 1
  json=$(sed -n 's/^PUNA_JSON_INCLUDE:PATH=//p' "$folder/CMakeCache.txt")
  mkdir -p "$folder/include" && cp -r "$json/nlohmann" "$folder/include/"
  strip "$folder/puna-bench" "$folder/libpuna_cuda.so"
  ls -l "$folder/puna-bench" "$folder/libpuna_cuda.so"
  exit 0
fi

out=${1:?$usage}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
bench=${2:-}
deadline=540 # seconds for all
failed=0
rows=()

# step NAME SECONDS COMMAND...: runs it, at most so long; its output goes to NAME.txt, the end of it to the terminal
# if it fails.
step() {
  local name=$1 limit=$2 left status=0 start=$SECONDS word
  shift 2
  left=$((deadline - SECONDS))
  if [ "$left" -lt 10 ]; then
    echo "SKIPPED $name: no time left"
    rows+=("{\"step\": \"$name\", \"status\": \"skipped\", \"seconds\": 0}")
    failed=1
    return 1
  fi
  [ "$limit" -lt "$left" ] || limit=$left
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.txt" 2>&1 || status=$?
  case $status in
    0) word=passed ;;
    124 | 137) word="timed out" ;;
    *) word="failed" ;;
  esac
  rows+=("{\"step\": \"$name\", \"status\": \"$word\", \"code\": $status, \"seconds\": $((SECONDS - start))}")
  printf '%-24s %-10s %4d s\n' "$name" "$word" $((SECONDS - start))
  [ "$status" = 0 ] && return 0
  failed=1
  tail -n 15 "$out/$name.txt" | sed 's/^/    /'
  return 1
}

environment() {
  date -u
  git rev-parse HEAD 2>/dev/null
  nvidia-smi
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit,memory.total --format=csv
  lscpu | grep -i 'model name'
  nproc
  free -g
  ldd --version | head -1
  nvcc --version | tail -1
  return 0
}
export -f build environment

step environment 20 bash -c environment
if [ -z "$bench" ] || ! step start 20 "$bench" cuda --help; then
  given=()
  [ -n "$bench" ] && [ -d "$(dirname "$bench")/include/nlohmann" ] &&
    given=(-DPUNA_JSON_INCLUDE="$(cd "$(dirname "$bench")/include" && pwd)")
  step build 300 bash -c 'build "$@"' build build/gpu native "${given[@]}"
  bench=build/gpu/puna-bench
fi
small=()
[ -n "${SMALL:-}" ] && small=(--small)

# measure NAME SECONDS ARGUMENT...: a step whose output is JSON.
measured=()
measure() {
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$bench" "$@" --json || return 1
  mv "$out/$name.txt" "$out/$name.json"
  measured+=("$name")
}

if [ -x "$bench" ]; then
  # Each in a process of its own: an error of memory ends what a process may do with the GPU.
  for what in products experts norms attention vision choice; do
    step "check-$what" 90 "$bench" cuda --check --only "$what"
  done
  step check-warpgroups 90 "$bench" cuda --check --only products --warpgroups
  # What is timed first matters most; the timings do not wait for the checks to pass.
  for what in products attention choice; do
    measure "$what" 120 cuda --time --only "$what" "${small[@]}"
  done
  # The same products by the instructions of warpgroups, to compare with those of warps row by row.
  measure products-warpgroups 120 cuda --time --only products --warpgroups "${small[@]}"
  # Where the time of the vision tower goes, in both forms: four layers' weights are in no cache.
  parts=(vision --device cuda --parts --layers 4 --tiles 17)
  [ -n "${SMALL:-}" ] && parts=(vision --device cuda --parts --tiles 2 --small)
  measure vision-parts 30 "${parts[@]}"
  measure vision-parts-warpgroups 30 "${parts[@]}" --warpgroups
  if [ -z "${SMALL:-}" ]; then
    # Whole models of the true shapes; the second with as many of its experts as fit.
    int4=(model --device cuda --dtype int4 --layers 48 --vocab 202048 --batch 4096)
    measure scout 60 "${int4[@]}" --prompt 8192 --tokens 128
    PUNA_CUDA_PRODUCTS=warpgroups measure scout-warpgroups 60 "${int4[@]}" --prompt 8192 --tokens 16
    # Kernel by kernel, of as many layers as tell.
    measure profile 45 model --device cuda --dtype int4 --layers 8 --vocab 202048 --batch 4096 --depth 2048 \
      --prompt 4096 --tokens 8 --profile
    measure scout-2k 60 "${int4[@]}" --prompt 2048 --tokens 128 --depth 2048
    measure scout-64-sequences 60 "${int4[@]}" --prompt 512 --tokens 16 --sequences 64
    measure maverick 90 "${int4[@]}" --shape maverick --prompt 2048 --tokens 128
    # Experts that the CPU computes, from as few layers as tell.
    measure scout-host-experts 60 "${int4[@]}" --prompt 512 --tokens 32 --host-experts 8
    # Those of a long prompt, computed by the CPU and sent to the GPU.
    host=(model --device cuda --dtype int4 --layers 8 --vocab 202048 --batch 4096 --host-experts 8)
    for sent in 0 1; do
      PUNA_CUDA_SENT_ROWS=$sent measure "scout-sent-experts-$sent" 45 "${host[@]}" --prompt 4096 --tokens 1 --rounds 2
    done
    measure vision 45 vision --device cuda --tiles 17
    PUNA_CUDA_PRODUCTS=warpgroups measure vision-warpgroups 45 vision --device cuda --tiles 17
  fi
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
      for what in products attention experts norms vision choice; do
        step "$tool-$what" 45 compute-sanitizer --tool "$tool" --error-exitcode 1 "$bench" cuda --check --only "$what"
      done
    done
  fi
else
  echo "there is no $bench: nothing was checked or measured"
  failed=1
fi

{
  printf '{"date": "%s", "failed": %d, "steps": [\n' "$(date -u +%F)" "$failed"
  (IFS=$'\n' && printf '%s\n' "${rows[*]}" | sed '$!s/$/,/')
  printf ']'
  for name in "${measured[@]}"; do
    printf ',\n"%s": ' "$name"
    cat "$out/$name.json"
  done
  printf '}\n'
} >"$out/cuda.json"
echo "all of it is in $out"
exit "$failed"
