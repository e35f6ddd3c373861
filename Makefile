# Two commands for a fresh clone, on a machine with Python >= 3.10 and a C++ compiler:
#
#     make demo     trains a small multimodal model on preferences, end to end, and opens nothing: it prints where
#                   the report lies
#     make test     the tests
#
# The first run makes .venv and installs into it; later runs do not, unless pyproject.toml, CMakeLists.txt or compiled
# sources changed. `make test-hosts` runs the tests inside LLaMA-Factory and ms-swift, each in an environment of its own
# under .venv-hosts (about 4 GB, made once, needs the network).
#
# Variables: PYTHON (the interpreter to start from), TORCH (what pip is asked for; PyTorch's CPU build, named as its
# install page says, saves gigabytes on a machine without a GPU), DEMO and TEST (more arguments), JOBS (processes that run
# the tests, a file at a time), MMRLHF_NO_EXT=1 (no compiler: pure Python).

PYTHON ?= python3
TORCH ?= torch==2.13.0
DEMO ?=
TEST ?=
JOBS ?= 2
BENCH ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip -qq --disable-pip-version-check
INSTALLED := $(VENV)/.installed-$(if $(MMRLHF_NO_EXT),pure,compiled)
BUILD_INPUTS := pyproject.toml CMakeLists.txt $(shell find csrc kernels/cuda -type f)

HOSTS := llamafactory swift

.PHONY: demo test test-hosts bench lint wheel clean
.DEFAULT_GOAL := help

demo: $(INSTALLED)
	@$(PY) -m mmrlhf demo $(DEMO)

test: $(VENV)/.dev
	@$(PY) -m pytest -q -n $(JOBS) --dist loadfile $(TEST)

test-hosts: $(HOSTS:%=.venv-hosts/%/.installed)
	@for host in $(HOSTS); do \
	  echo "Inside $$host:"; \
	  .venv-hosts/$$host/bin/python -m pytest -q tests/hosts/test_$$host.py $(TEST) || exit 1; \
	done

bench: $(VENV)/.dev
	@$(PY) -m pytest -q benchmarks $(BENCH)

lint: $(VENV)/.dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

wheel: $(VENV)/.dev
	@$(PIP) wheel --no-deps --wheel-dir dist .
	@ls dist/*.whl

clean:
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	@rm -f $(VENV)/.installed-* $(VENV)/.dev

.PHONY: help
help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# torch first and by itself: which build of it is wanted is the machine's affair, and pip must not choose another later.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "mmrlhf needs Python 3.10 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$(PYTHON) -m venv failed. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Setting up $(VENV), once: $(firstword $(TORCH)) ..."
	@$(PIP) install $(TORCH)
	@touch $@

$(INSTALLED): $(VENV)/.torch $(BUILD_INPUTS)
	@test -n "$(MMRLHF_NO_EXT)" || command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  { echo "No C++ compiler found. Install one, or run with MMRLHF_NO_EXT=1 for the pure-Python build." >&2; exit 1; }
	@test -n "$(MMRLHF_NO_EXT)" || test -f "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || \
	  { echo "Python's C headers are missing. Install them (Debian, Ubuntu: apt install python3-dev), or MMRLHF_NO_EXT=1." >&2; exit 1; }
	@echo "Building and installing mmrlhf ..."
	@$(PIP) install --editable '.[report]'
	@test -z "$(MMRLHF_NO_EXT)" || echo "Built: pure Python, no extension"
	@test -n "$(MMRLHF_NO_EXT)" || $(PY) -c "from mmrlhf import _C; b = _C.build_info(); print('Built: CPU ops with', \
	  b['isa'] + '; CUDA ops', 'for ' + b['cuda_archs'] if b['cuda'] else 'left out, no working nvcc found'); \
	  b['cuda'] and print('Built: Hopper GEMM', b['exp2_gemm'] and 'with ' + b['exp2_gemm'] or 'left out, no nvidia-cutlass found')"
	@rm -f $(VENV)/.installed-*
	@touch $@

# mmrlhf itself is installed already: this adds what its `dev` extra names.
$(VENV)/.dev: $(INSTALLED)
	@echo "Installing what the tests need ..."
	@$(PIP) install 'mmrlhf[dev]'
	@touch $@

# A host's packages and nothing else: its trainer wants other versions than .venv has. The compiled part of torchaudio,
# which is there for CUDA alone, does not load beside a CPU torch, and is not used.
.venv-hosts/%/.installed: tests/hosts/%.txt
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@echo "Setting up $(@D), once (minutes) ..."
	@{ $(@D)/bin/python -m pip -qq --disable-pip-version-check install $(TORCH) && \
	   $(@D)/bin/python -m pip -qq --disable-pip-version-check install -r $<; } || \
	  { echo "Could not install the packages of $<: this needs the network, once." >&2; exit 1; }
	@$(@D)/bin/python -c 'import torch; raise SystemExit(torch.version.cuda is None)' || \
	  rm -f $(@D)/lib/python*/site-packages/torchaudio/lib/*
	@touch $@
