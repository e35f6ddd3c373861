#!/usr/bin/env bash
# Build, check and time everything that needs an NVIDIA GPU, within a time budget, the cheapest proof first:
#
#     bash benchmarks/gpu.sh                 everything, at most 9 minutes
#     bash benchmarks/gpu.sh --dry-run       the plan, on any machine
#     bash benchmarks/gpu.sh --only ops,small    or --skip tests,step; facts always run, build too unless skipped
#     bash benchmarks/gpu.sh --fetch FOLDER  download the wheels of gpu_wheels.txt for WHEELS (needs a network, no GPU)
#
# Variables: BUDGET (seconds for all, 540), OUT (what is kept: summary.md, summary.json with every figure, steps.tsv,
# log.txt, and profiles; benchmarks/results/gpu), WORK (environment, build, parts and Triton's cache, build/gpu: kept
# for the next run), PYTHON (an interpreter with torch and triton: .venv/bin/python, else python3), WHEELS (a folder of
# wheels to install beside it: peers, nanobind-backend, nvidia-cutlass, without which the CUDA GEMM for Hopper is left
# out), COMMIT (where there is no git).
#
# Needs no network, and writes to no environment but its own. A step that fails does not stop the later ones, and OUT
# is brought up to date every 10 seconds, so a run that is killed loses no more. Exit status: 0 all steps that ran
# passed, 1 some failed (the last lines and OUT/summary.md name them), 2 no CUDA device.
set -euo pipefail
self=$(readlink -f "${BASH_SOURCE[0]}")
root=$(dirname "$(dirname "$self")")
cd "$root"

[[ -n ${PYTHON:-} || ! -x .venv/bin/python ]] || PYTHON=$PWD/.venv/bin/python
BUDGET=${BUDGET:-540} PYTHON=${PYTHON:-python3} WHEELS=${WHEELS:-} COMMIT=${COMMIT:-}
OUT=$(readlink -m "${OUT:-benchmarks/results/gpu}") WORK=$(readlink -m "${WORK:-build/gpu}")
PY=$WORK/venv/bin/python PARTS=$WORK/parts
SKIP=77 # a step's exit status for "cannot run here"; its last line says why

now() { date +%H:%M:%S; }
say() { printf '== %s %s\n' "$(now)" "$*"; }
cannot() { echo "$*"; exit "$SKIP"; }
run() {
  if [[ -n ${DRY:-} ]]; then printf '     %s\n' "$*"; else "$@"; fi
}
has() { "$PY" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

# --- The steps: do_NAME runs in a process of its own, with LIMIT seconds -----------------------------------------------

do_facts() { run "$PYTHON" -m benchmarks.gpu_facts --write "$PARTS/facts.json"; }

# An environment of our own that sees PYTHON's packages: a path in a .pth file adds a folder without running the .pth
# files inside it, so that an mmrlhf installed there is not taken for this one.
environment() {
  "$PYTHON" -m venv --without-pip "$WORK/venv"
  "$PYTHON" -c 'import sys; print(*[p for p in sys.path if p.endswith(("site-packages", "dist-packages"))], sep="\n")' \
    >"$("$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth"
}

install() { run "$PY" -m pip install --no-index --no-deps "$@"; }

wheels() {
  local wheel failed=0
  install -q "$WHEELS"/*.whl && return # in one go; where pip refuses one of them, each by itself
  for wheel in "$WHEELS"/*.whl; do
    install "$wheel" || { echo "FAILED to install $wheel"; failed=1; }
  done
  return "$failed"
}

# nanobind's split mode needs the package nanobind-backend at run time. Without it nanobind is linked into the extension,
# which the same CMakeLists.txt does if the option is taken out of its call.
linked_nanobind() {
  local config
  config=$("$PY" -c 'import nanobind; print(nanobind.cmake_dir())')
  mkdir -p "$WORK/nanobind"
  cp "$config/nanobind-config-version.cmake" "$WORK/nanobind/"
  cat >"$WORK/nanobind/nanobind-config.cmake" <<CMAKE
include("$config/nanobind-config.cmake")
function(nanobind_add_module name)
  list(REMOVE_ITEM ARGN BACKEND_MODULE nanobind_backend)
  _nanobind_add_module(\${name} \${ARGN})
endfunction()
CMAKE
}

# Without a build at all: the checkout is on sys.path, and only mmrlhf.kernels has to be told where it lies.
unbuilt() {
  local place
  place=$("$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cat >"$place/mmrlhf_checkout.py" <<PYTHON
import importlib.machinery
import sys


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "mmrlhf.kernels":
            return None
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = ["$root/kernels"]
        return spec


sys.meta_path.insert(0, Finder)
PYTHON
  echo "import mmrlhf_checkout" >"$place/mmrlhf_checkout.pth"
}

# The Hopper GEMM is two files of about 45 s each (80 s of CPU time), side by side: with 16 cores the build takes a minute.
extension() { # AUTO|OFF SETTINGS...: with CUTLASS, or without
  install --no-build-isolation -C "cmake.define.MMRLHF_CUTLASS=$1" "${@:2}" -e . &&
    "$PY" -c 'from mmrlhf import _C; print(_C.build_info())'
}

do_build() {
  local -a settings=(-C "build-dir=$WORK/build")
  [[ -n ${DRY:-} ]] || environment
  [[ -z $WHEELS ]] || wheels || touch "$WORK/failed"
  if [[ -n ${DRY:-} ]]; then
    install --no-build-isolation -C "build-dir=$WORK/build" -C cmake.define.MMRLHF_CUDA=ON -e .
    return
  fi
  local failed=0
  [[ ! -e $WORK/failed ]] || { rm -f "$WORK/failed"; failed=1; }
  if command -v nvcc >/dev/null; then
    settings+=(-C cmake.define.MMRLHF_CUDA=ON)
  else
    echo "no nvcc: the extension is built without its CUDA C++ op; the Triton kernels need none"
  fi
  if ! has nanobind_backend && has nanobind; then
    echo "nanobind-backend is not installed: linking nanobind into the extension"
    linked_nanobind
    settings+=(-C wheel.py-api= -C "cmake.define.nanobind_DIR=$WORK/nanobind")
  fi
  has cutlass_library || echo "nvidia-cutlass is not installed: the extension is built without its GEMM for Hopper"
  if ! extension AUTO "${settings[@]}"; then
    failed=1
    if ! { has cutlass_library && echo "FAILED: again without the GEMM for Hopper" && extension OFF "${settings[@]}"; }; then
      echo "FAILED to build the extension: pure Python, so that the Triton kernels can run"
      MMRLHF_NO_EXT=1 install --no-build-isolation -C "build-dir=$WORK/build-pure" -e . || unbuilt
    fi
  fi
  "$PY" -m benchmarks.gpu_facts --write "$PARTS/facts.json"
  "$PY" -c 'import mmrlhf.kernels.triton.launch'
  return "$failed"
}

do_launchers() { run "$PY" -m benchmarks.gpu_sanitize; }

# Several processes: a test's time is the compiler's, not the GPU's.
do_tests() {
  local -a files options=()
  mapfile -t files < <(grep -rlE 'mark\.gpu' tests --include='test_*.py' | sort)
  if [[ -z ${DRY:-} ]]; then
    has pytest || cannot "pytest is not installed"
    ! has xdist || options+=(-n 6)
    ! has pytest_timeout || options+=(--timeout 60)
  fi
  run "$PY" -m pytest -v --tb=short -m gpu --continue-on-collection-errors -p no:cacheprovider --junitxml "$PARTS/tests.xml" \
    "${options[@]}" "${files[@]}"
}

do_ceilings() { run "$PY" -m benchmarks.gpu_ceilings --seconds "$((LIMIT - 12))" --write "$PARTS/ceilings.json"; }
do_small() { run "$PY" -m benchmarks.gpu_small --write "$PARTS/small.json"; }
do_ops() { run "$PY" -m benchmarks.gpu_ops --seconds "$((LIMIT - 15))" --write "$PARTS/ops.json"; }
do_more() {
  run "$PY" -m benchmarks.gpu_ops --rest --race --seconds "$((LIMIT - 15))" --write "$PARTS/more.json"
}
do_tune() { run "$PY" -m benchmarks.tune --seconds "$((LIMIT - 25))" --write "$PARTS/tuned.py"; }

checker() {
  command -v compute-sanitizer >/dev/null || [[ -n ${DRY:-} ]] || cannot "compute-sanitizer is not on the PATH"
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 run compute-sanitizer --tool "$1" --error-exitcode 1 \
    --target-processes application-only "$PY" -m benchmarks.gpu_sanitize
}
do_memcheck() { checker memcheck; }
do_racecheck() { checker racecheck; }
do_synccheck() { checker synccheck; }
do_initcheck() { checker initcheck; }

whole_step() { run "$PY" -m benchmarks.gpu_step --seconds "$((LIMIT - 12))" --write "$PARTS/$1.json" "${@:2}"; }
do_step() { whole_step step --profile "$OUT/profile.txt"; }
do_liger() { whole_step liger --liger --k 2 --side "live reference" --side "cached reference"; }
do_long() { whole_step long --prefix 3700; }
do_full() { whole_step full --full --k 2; }

# Counters of the kernels of one frozen-head call. The clocks are left as they are.
do_counters() {
  command -v ncu >/dev/null || [[ -n ${DRY:-} ]] || cannot "ncu is not on the PATH"
  run ncu --clock-control none --profile-from-start off --launch-count 6 --section SpeedOfLight --section Occupancy \
    --section LaunchStats --log-file "$OUT/counters.txt" "$PY" -m benchmarks.gpu_ops --once
}

do_summary() { run "$PYTHON" -m benchmarks.gpu_summary --folder "$PARTS" --out "$OUT"; }

# --- The plan: names (with commas: side by side), most seconds, fewest worth starting with, seconds to leave after it --

plan() {
  cat <<PLAN
build 170 30 0
launchers 60 20 0
tests 75 20 0
small 30 15 150
ceilings 24 18 150
ops 150 45 85
step 120 45 30
memcheck,racecheck,synccheck,initcheck 75 20 0
counters 40 25 0
liger 45 40 0
long 100 60 0
full 75 45 0
tune 75 45 0
more 240 45 0
PLAN
}

names() { plan | cut -d ' ' -f 1 | tr , '\n'; }

wanted() { # NAME: whether --only and --skip leave it in
  [[ ,$skip, != *,"$1",* ]] || return 1
  [[ -z $only || $1 == build || ,$only, == *,"$1",* ]]
}

record() { printf '%s\t%s\t%s\t%s\t%s\n' "$@" >>"$PARTS/steps.tsv"; } # name, status, exit status, seconds, reason

# The line of a log that says most about a failure: the last one that names an error.
telling() {
  local line
  line=$(grep -aE '(Error|ERROR|error:|FAILED|FAULT|WRONG|fatal)' "$1" | grep -av 'ERROR SUMMARY: 0' | tail -n 1 || true)
  [[ -n $line ]] || line=$(tail -n 1 "$1")
  printf '%.240s' "${line//$'\t'/ }"
}

step() { # NAME LIMIT
  local name=$1 limit=$2 begin=$SECONDS rc=0 status=ok reason="" log=$PARTS/logs/$1.log
  say "$name (at most $limit s)"
  LIMIT=$limit timeout --kill-after=10 "$limit" bash "$self" --step "$name" </dev/null >"$log" 2>&1 || rc=$?
  case $rc in
    0) ;;
    "$SKIP") status=skipped reason=$(tail -n 1 "$log") ;;
    124 | 137) status=timeout reason="over $limit s; last: $(telling "$log")" ;;
    *) status=failed reason="exit status $rc: $(telling "$log")" ;;
  esac
  record "$name" "$status" "$rc" "$((SECONDS - begin))" "$reason"
  [[ $status == ok || $status == skipped ]] || tail -n 6 "$log" | cut -c 1-160 | sed 's/^/     /'
  say "$status: $name, $((SECONDS - begin)) s${reason:+ ($reason)}"
  LAST=$rc
}

# What is there so far, whole files only: OUT stays a handful of files however many parts there are.
publish() {
  "$PYTHON" -m benchmarks.gpu_summary --folder "$PARTS" --out "$OUT" --quiet >/dev/null 2>&1 || true
}

# --- Arguments ------------------------------------------------------------------------------------------------------------

only="" skip="" DRY=${DRY:-}
given=("$@")
while (($#)); do
  case $1 in
    --dry-run) DRY=1 ;;
    --only | --skip)
      [[ -n ${2:-} ]] || { echo "$1 needs names, such as ops,small" >&2; exit 64; }
      [[ $1 == --only ]] && only=$2 || skip=$2
      shift
      ;;
    --fetch)
      [[ -n ${2:-} ]] || { echo "--fetch needs a folder" >&2; exit 64; }
      exec "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d "$2" -r benchmarks/gpu_wheels.txt
      ;;
    --step) # for this script alone: one step in its own process
      "do_$2"
      exit
      ;;
    -h | --help)
      sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "$self"
      exit 0
      ;;
    *) echo "unknown argument $1; see --help" >&2; exit 64 ;;
  esac
  shift
done
for name in ${only//,/ } ${skip//,/ }; do
  names | grep -qx -- "$name" || { echo "no step is called $name; there are: $(names | xargs)" >&2; exit 64; }
done
[[ $BUDGET =~ ^[0-9]+$ ]] || { echo "BUDGET must be whole seconds, got '$BUDGET'" >&2; exit 64; }

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)} PYTHONPATH="$root/tests" PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=$WORK/triton TORCHINDUCTOR_CACHE_DIR=$WORK/inductor COMMIT BUDGET PYTHON WHEELS OUT WORK PARTS DRY
export GPU_COMMAND="${WHEELS:+WHEELS=$(basename "$WHEELS") }BUDGET=$BUDGET bash benchmarks/gpu.sh${given[*]:+ ${given[*]}}"
unset TRITON_INTERPRET
for place in "${CUDA_HOME:-/usr/local/cuda}/bin" /usr/local/cuda/compute-sanitizer; do # where installers leave them
  [[ ! -d $place ]] || PATH=$PATH:$place
done
export PATH

if [[ -n $DRY ]]; then
  echo "budget $BUDGET s, results in $OUT, work in $WORK"
  LIMIT=60 # what the commands below show; a run gives each step what is left
  echo "facts: at most 60 s; exit status 2 where there is no CUDA device"
  do_facts
  while read -r group most least reserve; do
    for name in ${group//,/ }; do
      wanted "$name" || continue
      echo "$name: at most $most s, and not started where less than $((least + reserve)) s are left"
      LIMIT=$most
      "do_$name"
    done
  done < <(plan)
  echo "summary: always"
  do_summary
  exit 0
fi

# --- The run --------------------------------------------------------------------------------------------------------------

wanted build || [[ -x $PY ]] || { echo "build was skipped, but $PY is not there from an earlier run" >&2; exit 64; }
mkdir -p "$OUT" "$WORK" "$PARTS/logs"
rm -f "$PARTS/steps.tsv"
started=$SECONDS
step facts 90
if ((LAST == 2)); then
  publish
  echo "no CUDA device"
  exit 2
fi
((LAST == 0)) || { publish; exit 1; }
while sleep 10; do publish; done </dev/null >/dev/null 2>&1 & # holds no pipe open when this script has ended
publisher=$!
trap 'kill "$publisher" 2>/dev/null || true' EXIT
while read -r group most least reserve; do
  chosen=()
  for name in ${group//,/ }; do
    if wanted "$name"; then
      chosen+=("$name")
      rm -f "$PARTS/$name.json" "$PARTS/$name.xml"
    else
      record "$name" "left out" "" 0 "by --only or --skip"
    fi
  done
  ((${#chosen[@]})) || continue
  [[ -z $only ]] || reserve=0 # for steps that may not come
  left=$((BUDGET - 15 - (SECONDS - started)))
  limit=$((left - reserve < most ? left - reserve : most))
  if ((limit < least)); then
    for name in "${chosen[@]}"; do record "$name" skipped "" 0 "$((limit < 0 ? 0 : limit)) s were left of the budget, fewer than $least"; done
    say "skipped: ${chosen[*]}, $left s left"
    continue
  fi
  running=()
  for name in "${chosen[@]:1}"; do
    step "$name" "$limit" &
    running+=("$!")
  done
  step "${chosen[0]}" "$limit"
  ((${#running[@]} == 0)) || wait "${running[@]}"
  if [[ ${chosen[0]} == build && ! -x $PY ]]; then break; fi
done < <(plan)
kill "$publisher" 2>/dev/null || true
LIMIT=15 timeout 15 bash "$self" --step summary || say "FAILED: summary"
say "all in $((SECONDS - started)) s; results in $OUT"
if cut -f 2 "$PARTS/steps.tsv" | grep -qE 'failed|timeout'; then
  say "FAILED: $(awk -F '\t' '$2 == "failed" || $2 == "timeout" {print $1}' "$PARTS/steps.tsv" | xargs)"
  exit 1
fi
