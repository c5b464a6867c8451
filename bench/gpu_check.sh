#!/usr/bin/env bash
# Everything that a CUDA GPU can check, in one command, from a bare checkout, with the machine's own python3 and no network:
#
#     bash bench/gpu_check.sh [STAGE...]         (make gpu-check)
#
# Stages, in this order: versions packages build small contract tests sizes benchmarks memcheck racecheck synccheck.
# Naming some runs those alone. Each has a time limit of its own, and all together GK_BUDGET.
#
#   GK_PYTHON   the Python to use; python3 by default. It needs torch with CUDA, Triton and NumPy
#   GK_WHEELS   a folder of wheels: packages that this Python lacks are installed from there, into build/ and nowhere else
#   GK_BUDGET   seconds for everything; 570 by default
#   GK_DRY_RUN  1: run the stages on the CPU, to try this script where there is no GPU; it proves nothing about CUDA
#   OUT         where results and the log go; bench/results by default (without the log, which goes to build/)
#
# The last lines say which stages passed. The exit status is 0 only if none that was asked for failed; a stage
# whose tool is not there is skipped, and says so.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

STAGES=(versions packages build small contract tests sizes benchmarks memcheck racecheck synccheck)
PYTHON=${GK_PYTHON:-python3}
BUDGET=${GK_BUDGET:-570}
RESULTS=${OUT:-bench/results}
SITE=$PWD/build/gpu-check/site
NEEDED=(pytest pytest_timeout hypothesis pybind11 cmake ninja)
OPTIONAL=(pytest_benchmark rich)
SKIPPED=77 # status of a stage whose tool this machine does not have

mkdir -p "$RESULTS" build/gpu-check || exit 2
LOG=${OUT:+$OUT/gpu_check.log}
LOG=${LOG:-$PWD/build/gpu-check/gpu_check.log}
: >"$LOG" || exit 2
RESULTS=$(cd "$RESULTS" && pwd) || exit 2

python_folder=$(dirname "$(command -v "$PYTHON" || echo /nonexistent/python3)")
export PATH="$python_folder:/usr/local/cuda/bin:$PATH"
export PYTHONPATH="$PWD:$SITE${PYTHONPATH:+:$PYTHONPATH}"
export OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1

gpu=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability() if torch.cuda.is_available() else "")' 2>/dev/null)
device=cuda marker="gpu and not slow" slow_marker=gpu
if [ "${GK_DRY_RUN:-0}" = 1 ]; then device=cpu marker="not gpu and not slow and not interpreter" slow_marker="not gpu"; fi
no_gpu_reason="no CUDA device: torch.cuda.is_available() is false for $PYTHON"

# --- stages: each is a function, whose output goes to the log and whose status says whether it passed ---------------------

versions() {
  "$PYTHON" - <<'PY' || return 1
import importlib.metadata, platform, sys
print("Python", sys.version.split()[0], sys.executable)
for name in ("torch", "triton", "numpy", "pytest", "pytest-benchmark", "hypothesis", "pybind11", "cmake", "ninja", "rich"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not installed")
import torch
print("platform", platform.platform())
print("torch's CUDA", torch.version.cuda)
for index in range(torch.cuda.device_count()):
    p = torch.cuda.get_device_properties(index)
    print(f"GPU {index}: {p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} SMs, {p.total_memory >> 20} MiB")
PY
  nvcc --version | tail -n 2
  if [ -n "$gpu" ]; then nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader; fi
}

missing() {
  "$PYTHON" - "$@" <<'PY'
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
PY
}

packages() {
  local absent
  absent=$(missing "${NEEDED[@]}" "${OPTIONAL[@]}") || return 1
  if [ -n "$absent" ] && [ -n "${GK_WHEELS:-}" ]; then
    echo "installing from $GK_WHEELS: $absent"
    # shellcheck disable=SC2086  # a list of names
    "$PYTHON" -m pip install -q --no-index --find-links "$GK_WHEELS" --target "$SITE" ${absent//_/-} || return 1
  fi
  absent=$(missing "${OPTIONAL[@]}")
  [ -z "$absent" ] || echo "without $absent: tables are plain and bench/ cannot be run by pytest; nothing else is lost"
  absent=$(missing "${NEEDED[@]}")
  if [ -z "$absent" ]; then echo "all that is needed is there"; return 0; fi
  echo "missing: $absent. Carry their wheels in a folder, with what they depend on:"
  echo "    pip download -d wheels --python-version 3.12 --only-binary=:all: ${absent//_/-}"
  echo "    GK_WHEELS=wheels bash bench/gpu_check.sh"
  return 1
}

build() {
  local architecture=${gpu:-80} cuda=1
  if [ -z "$gpu" ] && ! command -v nvcc >/dev/null; then cuda=0; fi
  export CUDAARCHS="$architecture-real"
  cmake -S . -B build/gpu-check/cmake -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_MAKE_PROGRAM="$(command -v ninja)" \
    -DPython_EXECUTABLE="$("$PYTHON" -c 'import sys; print(sys.executable)')" \
    -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" \
    -DGRPO_KERNELS_OUTPUT_DIR="$PWD/grpo_kernels" -DGRPO_KERNELS_CUDA=$cuda &&
    cmake --build build/gpu-check/cmake &&
    "$PYTHON" -m grpo_kernels.cli env
}

small() { "$PYTHON" -m python_tests.gpu.small --device $device; }

run_pytest() { "$PYTHON" -m pytest -q --no-header --durations=10 "$@"; }

contract() { run_pytest -m "$marker" python_tests/gpu/test_contract.py python_tests/gpu/test_launches.py; }

tests() {
  local folder=python_tests
  [ $device = cuda ] || folder=python_tests/gpu
  run_pytest -m "$marker" $folder \
    --ignore=python_tests/gpu/test_contract.py --ignore=python_tests/gpu/test_launches.py
}

sizes() { run_pytest -m "$slow_marker" python_tests/gpu/test_sizes.py; }

benchmarks() {
  local name
  name=$("$PYTHON" -c 'from bench import machine; print(machine.slug("'$device'"))') || return 1
  "$PYTHON" -m bench --device $device --seconds 0.5 --deadline "$((limit - 25))" --output "$RESULTS/$name.json"
}

sanitize() {
  local tool
  tool=$(command -v compute-sanitizer) || { echo "compute-sanitizer was not found on PATH"; return "$SKIPPED"; }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "$1" --report-api-errors no --error-exitcode 7 --print-limit 20 \
    "$PYTHON" -m python_tests.gpu.small --device $device
}

memcheck() { sanitize memcheck; }
racecheck() { sanitize racecheck; }
synccheck() { sanitize synccheck; }

# --- running them ---------------------------------------------------------------------------------------------------------

declare -A LIMITS=([versions]=60 [packages]=60 [build]=150 [small]=60 [contract]=120 [tests]=120 [sizes]=60
  [benchmarks]=200 [memcheck]=60 [racecheck]=60 [synccheck]=60)

known() {
  local stage
  for stage in "${STAGES[@]}"; do [ "$stage" = "$1" ] && return 0; done
  return 1
}

for asked in "$@"; do
  known "$asked" || { echo "unknown stage '$asked'; the stages are: ${STAGES[*]}" >&2; exit 2; }
done
[ $# -gt 0 ] || set -- "${STAGES[@]}"

# bash cannot time out a function of its own: the stage runs in the background, in a process group that a watchdog ends.
run_stage() {
  local stage=$1 began=$SECONDS status pid watchdog
  limit=${LIMITS[$stage]}
  local left=$((BUDGET - SECONDS))
  [ "$left" -lt "$limit" ] && limit=$left
  printf '\n===== %s (at most %d s)\n' "$stage" "$limit" >>"$LOG"
  if [ "$limit" -lt 10 ]; then
    verdict "$stage" FAIL 0 "no time left of GK_BUDGET=$BUDGET s"
    return
  fi
  case $stage in
    versions | packages | build) ;;
    *) if [ -z "$gpu" ] && [ $device = cuda ]; then verdict "$stage" FAIL 0 "$no_gpu_reason"; return; fi ;;
  esac
  local from
  from=$(wc -l <"$LOG")
  set -m
  ("$stage") >>"$LOG" 2>&1 </dev/null &
  pid=$!
  set +m
  (
    sleep "$limit"
    kill -TERM -- "-$pid" 2>/dev/null && sleep 5 && kill -KILL -- "-$pid" 2>/dev/null
  ) >/dev/null 2>&1 &
  watchdog=$!
  wait "$pid" 2>/dev/null
  status=$?
  kill "$watchdog" 2>/dev/null
  wait "$watchdog" 2>/dev/null
  local took=$((SECONDS - began))
  if [ "$status" -eq 0 ]; then
    verdict "$stage" PASS "$took" "$(tail -n 1 "$LOG" | cut -c1-100)"
    [ "$stage" = versions ] && tail -n +"$((from + 1))" "$LOG" | sed 's/^/      /'
    return
  fi
  if [ "$status" -eq "$SKIPPED" ]; then
    verdict "$stage" SKIP "$took" "$(tail -n 1 "$LOG" | cut -c1-100)"
    return
  fi
  local why="exit status $status"
  [ "$took" -ge "$limit" ] && why="ran into its limit of $limit s"
  verdict "$stage" FAIL "$took" "$why; the end of its output:"
  tail -n +"$((from + 1))" "$LOG" | tail -n 25 | cut -c1-200 | sed 's/^/      /'
}

summary=()
passed=0
failed=0
verdict() {
  local line
  line=$(printf '%-4s  %-10s  %4d s  %s' "$2" "$1" "$3" "$4")
  echo "$line"
  summary+=("$line")
  case $2 in
    PASS) passed=$((passed + 1)) ;;
    FAIL) failed=$((failed + 1)) ;;
  esac
}

for stage in "$@"; do run_stage "$stage"; done

echo
echo "gpu-check: $passed of $# stages passed, $failed failed, in $SECONDS s; results in $RESULTS, log in $LOG"
printf '  %s\n' "${summary[@]}" | cut -c1-120
[ "$failed" -eq 0 ]
