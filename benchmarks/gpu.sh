#!/usr/bin/env bash
# Build, check and time everything that needs an NVIDIA GPU, within a time budget, the most telling steps first:
#
#     bash benchmarks/gpu.sh                 everything, at most 9 minutes
#     bash benchmarks/gpu.sh --dry-run       the plan, on any machine
#     bash benchmarks/gpu.sh --only ops,small    or --skip tests,step; facts always run, build too unless skipped
#
# Variables: BUDGET (seconds for all, 540), OUT (results and logs, benchmarks/results/gpu), WORK (environment, build and
# Triton's cache, build/gpu: kept for the next run), PYTHON (an interpreter with torch and triton:
# .venv/bin/python, else python3), WHEELS (a folder of wheels to install beside it: peers, nanobind-backend,
# nvidia-cutlass, without which the CUDA GEMM for Hopper is left out), COMMIT (where there is no git).
#
# Needs no network, and writes to no environment but its own. A step that fails does not stop the later ones. Exit
# status: 0 all steps that ran passed, 1 some failed (the last lines and OUT/summary.md name them), 2 no CUDA device.
set -euo pipefail
self=$(readlink -f "${BASH_SOURCE[0]}")
root=$(dirname "$(dirname "$self")")
cd "$root"

[[ -n ${PYTHON:-} || ! -x .venv/bin/python ]] || PYTHON=$PWD/.venv/bin/python
BUDGET=${BUDGET:-540} PYTHON=${PYTHON:-python3} WHEELS=${WHEELS:-} COMMIT=${COMMIT:-}
OUT=$(readlink -m "${OUT:-benchmarks/results/gpu}") WORK=$(readlink -m "${WORK:-build/gpu}")
PY=$WORK/venv/bin/python
SKIP=77 # a step's exit status for "cannot run here"; its last line says why

now() { date +%H:%M:%S; }
say() { printf '== %s %s\n' "$(now)" "$*"; }
cannot() { echo "$*"; exit "$SKIP"; }
run() {
  if [[ -n ${DRY:-} ]]; then printf '     %s\n' "$*"; else "$@"; fi
}
has() { "$PY" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

# --- The steps: do_NAME runs in a process of its own, with LIMIT seconds -----------------------------------------------

do_facts() { run "$PYTHON" -m benchmarks.gpu_facts --write "$OUT/facts.json"; }

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
  "$PY" -m benchmarks.gpu_facts --write "$OUT/facts.json"
  "$PY" -c 'import mmrlhf.kernels.triton.launch'
  return "$failed"
}

do_launchers() { run "$PY" -m benchmarks.gpu_sanitize; }

do_tests() {
  local -a files
  mapfile -t files < <(grep -rlE 'mark\.gpu' tests --include='test_*.py' | sort)
  [[ -n ${DRY:-} ]] || has pytest || cannot "pytest is not installed"
  run "$PY" -m pytest -q -m gpu --continue-on-collection-errors -p no:cacheprovider --junitxml "$OUT/tests.xml" "${files[@]}"
}

do_ceilings() { run "$PY" -m benchmarks.gpu_ceilings --seconds "$((LIMIT - 15))" --write "$OUT/ceilings.json"; }
do_small() { run "$PY" -m benchmarks.gpu_small --write "$OUT/small.json"; }
do_tune() { run "$PY" -m benchmarks.tune --seconds "$((LIMIT - 25))" --write "$OUT/tuned.py"; }
do_ops() { run "$PY" -m benchmarks.gpu_ops --seconds "$((LIMIT - 20))" --write "$OUT/ops.json"; }

checker() {
  command -v compute-sanitizer >/dev/null || [[ -n ${DRY:-} ]] || cannot "compute-sanitizer is not on the PATH"
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 run compute-sanitizer --tool "$1" --error-exitcode 1 \
    --target-processes application-only "$PY" -m benchmarks.gpu_sanitize
}
do_memcheck() { checker memcheck; }
do_racecheck() { checker racecheck; }
do_synccheck() { checker synccheck; }
do_initcheck() { checker initcheck; }

do_step() {
  run "$PY" -m benchmarks.gpu_step --model qwen2_5_vl_7b --seconds "$((LIMIT - 15))" --write "$OUT/step.json"
}

do_summary() { run "$PY" -m benchmarks.gpu_summary --folder "$OUT"; }

# --- The plan: name, most seconds, fewest seconds worth starting with, seconds to leave for the steps after it ---------

plan() {
  cat <<PLAN
build 180 30 0
launchers 75 20 0
tests 120 20 0
small 45 15 0
ceilings 35 20 0
ops 190 45 90
tune 75 45 60
memcheck 60 15 0
racecheck 60 15 0
synccheck 45 15 0
initcheck 60 15 0
step 400 90 0
PLAN
}

wanted() { # NAME: whether --only and --skip leave it in
  [[ ,$skip, != *,"$1",* ]] || return 1
  [[ -z $only || $1 == build || ,$only, == *,"$1",* ]]
}

record() { printf '%s\t%s\t%s\t%s\t%s\n' "$@" >>"$OUT/steps.tsv"; } # name, status, exit status, seconds, reason

step() { # NAME LIMIT
  local name=$1 limit=$2 begin=$SECONDS rc=0 status=ok reason="" log=$OUT/logs/$1.log
  say "$name (at most $limit s)"
  LIMIT=$limit timeout --kill-after=10 "$limit" bash "$self" --step "$name" </dev/null >"$log" 2>&1 || rc=$?
  case $rc in
    0) ;;
    "$SKIP") status=skipped reason=$(tail -n 1 "$log") ;;
    124 | 137) status=timeout reason="over $limit s" ;;
    *) status=failed reason="exit status $rc, see logs/$name.log" ;;
  esac
  record "$name" "$status" "$rc" "$((SECONDS - begin))" "$reason"
  [[ $status == ok ]] || tail -n 15 "$log" | sed 's/^/     /'
  say "$status: $name, $((SECONDS - begin)) s${reason:+ ($reason)}"
  LAST=$rc
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
  plan | grep -q "^$name " || { echo "no step is called $name; there are: $(plan | cut -d ' ' -f 1 | xargs)" >&2; exit 64; }
done
[[ $BUDGET =~ ^[0-9]+$ ]] || { echo "BUDGET must be whole seconds, got '$BUDGET'" >&2; exit 64; }

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)} PYTHONPATH="$root/tests" PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=$WORK/triton COMMIT BUDGET PYTHON WHEELS OUT WORK DRY
export GPU_COMMAND="${WHEELS:+WHEELS=$(basename "$WHEELS") }BUDGET=$BUDGET bash benchmarks/gpu.sh${given[*]:+ ${given[*]}}"
unset TRITON_INTERPRET

if [[ -n $DRY ]]; then
  echo "budget $BUDGET s, results in $OUT, work in $WORK"
  LIMIT=60 # what the commands below show; a run gives each step what is left
  echo "facts: at most 60 s; exit status 2 where there is no CUDA device"
  do_facts
  while read -r name most least reserve; do
    wanted "$name" || continue
    echo "$name: at most $most s, and not started where less than $((least + reserve)) s are left"
    LIMIT=$most
    "do_$name"
  done < <(plan)
  echo "summary: always"
  do_summary
  exit 0
fi

# --- The run --------------------------------------------------------------------------------------------------------------

wanted build || [[ -x $PY ]] || { echo "build was skipped, but $PY is not there from an earlier run" >&2; exit 64; }
mkdir -p "$OUT/logs" "$WORK"
rm -f "$OUT/steps.tsv"
started=$SECONDS
step facts 60
if ((LAST == 2)); then
  echo "no CUDA device"
  exit 2
fi
((LAST == 0)) || exit 1
while read -r name most least reserve; do
  if ! wanted "$name"; then
    record "$name" "left out" "" 0 "by --only or --skip"
    continue
  fi
  rm -f "$OUT/$name.json" "$OUT/$name.xml"
  left=$((BUDGET - 15 - (SECONDS - started)))
  limit=$((left - reserve < most ? left - reserve : most))
  if ((limit < least)); then
    record "$name" skipped "" 0 "$limit s were left of the budget, fewer than $least"
    say "skipped: $name, $left s left"
    continue
  fi
  step "$name" "$limit"
  if [[ $name == build && ! -x $PY ]]; then break; fi
done < <(plan)
LIMIT=15 timeout 15 bash "$self" --step summary || say "FAILED: summary"
say "all in $((SECONDS - started)) s; results in $OUT"
if cut -f 2 "$OUT/steps.tsv" | grep -qE 'failed|timeout'; then
  say "FAILED: $(awk -F '\t' '$2 == "failed" || $2 == "timeout" {print $1}' "$OUT/steps.tsv" | xargs)"
  exit 1
fi
