#!/usr/bin/env bash
# Builds, tests and measures on this machine's GPU:
#
#   tests/gpu.sh [build] [test] [kernels] [sanitize] [bench] [training] [rivals]     (all of them by default)
#
#   build     the wheel for this GPU, installed into the running Python, and the C++ tests and benchmarks beside it
#   test      C++ and Python tests of CUDA
#   kernels   kernels by themselves against float64, then their times (tests/bench/*.cu)
#   sanitize  compute-sanitizer (memcheck, racecheck, initcheck, synccheck) on small CUDA tests
#   bench     tests/bench/gpu_speed.py: the figures that must hold
#   training  tests/bench/training_speed.py: those of training, with flash-linear-attention's where it is installed
#   rivals    tests/bench/rivals.py: what they are measured against; both need PyTorch
#
# Takes no package from the network: the build requirements of pyproject.toml and nvcc must be there. A step that fails
# does not stop the next one; the exit status is 1 and the last lines name what failed.
#
#   OUT              folder of logs and figures (build/gpu)
#   PYTHON           (python3)
#   CUDAARCHS        GPU architectures to build for (this machine's)
#   SANITIZE_FILTER  GoogleTest filter for compute-sanitizer (*Cuda*Small*; for racecheck, which breaks cuBLASLt's kernels
#                    for Hopper, the float32 models of odd sizes, which use none)
#   SANITIZE_TIMEOUT seconds for each of its tools (600)
#   BENCH_ARGS, TRAINING_ARGS, RIVALS_ARGS   arguments of the scripts, e.g. "--only decode", "--quick"
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${OUT:-build/gpu}")
PYTHON=${PYTHON:-python3}
BUILD=$PWD/build/gpu-wheel
TESTS=$BUILD/tests/cpp/based_tests
CUDA_TESTS='*Cuda*'
mkdir -p "$OUT"
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
export PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

steps=("$@")
[ $# -gt 0 ] || steps=(build test kernels sanitize bench training rivals)
for step in "${steps[@]}"; do
  case $step in
    build | test | kernels | sanitize | bench | training | rivals) ;;
    *) echo "tests/gpu.sh: $step is none of build, test, kernels, sanitize, bench, training, rivals" >&2; exit 2 ;;
  esac
done
if ! card=$(nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader 2>&1 | head -1); then
  echo "tests/gpu.sh: no GPU: nvidia-smi: $card" >&2
  exit 1
fi
# "native" leaves out what belongs to one architecture alone (90a).
[ "${card##*, }" = 9.0 ] && architectures=90a-real || architectures=native
export CUDAARCHS=${CUDAARCHS:-$architectures}

failed=()
summary=()

# step NAME COMMAND…: runs it into OUT/NAME.log, shows the end of the log when it fails, and notes time and verdict.
step() {
  local name=$1 start=$SECONDS verdict=ok
  shift
  echo "== $name"
  if ! "$@" > "$OUT/$name.log" 2>&1; then
    verdict=FAILED
    failed+=("$name")
    tail -n 40 "$OUT/$name.log"
  fi
  summary+=("$(printf '%-22s %-7s %4d s  %s' "$name" $verdict $((SECONDS - start)) "$(counts "$OUT/$name.log")")")
}

# What a log counts: tests of GoogleTest and pytest, errors of compute-sanitizer.
counts() {
  grep -aE '^\[  (PASSED|SKIPPED|FAILED ) +\] [0-9]+ tests?|SUMMARY: |^=* ?[0-9]+ (passed|failed|skipped|error).* in ' "$1" |
    sed -E 's/^=+ ?//; s/ ?=+$//; s/^\[ +([A-Z]+) +\] ([0-9]+) tests?.*/\2 \1/' | paste -sd';' - | sed 's/;/; /g'
}

build() {
  "$PYTHON" -m pip install --no-build-isolation --no-deps --force-reinstall -v . -C build-dir="$BUILD" \
    -C cmake.define.BASED_CUDA=ON -C cmake.define.BASED_BUILD_TESTS=ON -C cmake.define.BASED_BUILD_BENCH=ON
}

# C++ tests find cuBLASLt where pip puts it, as the Python package does.
cpp() {
  local folders
  folders=$("$PYTHON" - << 'END'
import importlib.util, pathlib
spec = importlib.util.find_spec("nvidia")
roots = spec.submodule_search_locations if spec else []
print(":".join(str(p) for r in roots for n in ("cu13", "cublas") if (p := pathlib.Path(r, n, "lib")).is_dir()))
END
  )
  LD_LIBRARY_PATH=$folders${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} "$@"
}

# Tests that are skipped have not shown anything. COMMAND…: what runs the tests.
nothing_skipped() {
  local log status
  log=$(mktemp)
  "$@" 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  if grep -qaE '^\[  SKIPPED|Running 0 tests' "$log"; then
    echo "tests were skipped, or there are none"
    status=1
  fi
  rm "$log"
  return "$status"
}

sanitize() {
  local filter='*Cuda*Small*'
  [ "$1" = racecheck ] && filter='*CudaSmall*OddSizesFloat32*'
  cpp timeout "${SANITIZE_TIMEOUT:-600}" compute-sanitizer --tool "$1" --error-exitcode 9 "$TESTS" \
    --gtest_filter="${SANITIZE_FILTER:-$filter}"
}

figures=()
for name in "${steps[@]}"; do
  case $name in
    build)
      step build build
      ;;
    test)
      step cpp_cuda nothing_skipped cpp "$TESTS" --gtest_filter="$CUDA_TESTS"
      step cpp_cpu cpp "$TESTS" --gtest_filter="-$CUDA_TESTS"
      step python "$PYTHON" -m pytest -q tests/python/test_cuda.py tests/python/test_ops.py \
        tests/python/test_torch_ops.py tests/python/test_torch_model.py tests/python/test_train.py \
        tests/python/test_recall.py tests/python/test_devices.py tests/python/test_golden.py
      ;;
    kernels)
      for program in bench_linear_attention bench_mixers bench_cuda_linear bench_sampling; do
        step "$program" cpp "$BUILD/tests/bench/$program"
      done
      ;;
    sanitize)
      for tool in memcheck racecheck initcheck synccheck; do step "$tool" nothing_skipped sanitize "$tool"; done
      ;;
    bench)
      # shellcheck disable=SC2086 # several arguments
      step bench "$PYTHON" tests/bench/gpu_speed.py --json "$OUT/bench.json" ${BENCH_ARGS:-}
      figures+=("$OUT/bench.log")
      ;;
    training)
      # shellcheck disable=SC2086
      step training "$PYTHON" tests/bench/training_speed.py --json "$OUT/training.json" --profiles "$OUT" \
        ${TRAINING_ARGS:-}
      figures+=("$OUT/training.log")
      ;;
    rivals)
      # shellcheck disable=SC2086
      step rivals "$PYTHON" tests/bench/rivals.py --json "$OUT/rivals.json" ${RIVALS_ARGS:-}
      figures+=("$OUT/rivals.log")
      ;;
  esac
done

{
  for log in ${figures[@]+"${figures[@]}"}; do
    printf '\n%s\n' "-- $(basename "$log" .log)"
    grep -av '^…' "$log" | tail -n 45
  done
  changes=$(git status --porcelain -uno 2> /dev/null)
  printf '\ncommit %s%s · %s · %s · CUDAARCHS %s\n' "$(git rev-parse --short HEAD 2> /dev/null || echo unknown)" \
    "${changes:++}" "$card" "$(nvcc --version 2> /dev/null | grep -o 'release [0-9.]*' || echo 'no nvcc')" "$CUDAARCHS"
  printf '%s\n' "${summary[@]}"
  [ ${#failed[@]} -eq 0 ] || echo "FAILED: ${failed[*]}"
} | tee "$OUT/summary.txt"
[ ${#failed[@]} -eq 0 ]
