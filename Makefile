# Sets itself up: `make demo` and `make test` need Python 3.11+ (with venv) and make, nothing else.
#
#   make test PYTHON=python3        use an environment that already has torch >= 2.11, as it is
#   make test PYTEST_ARGS='-x tests/ops'

PYTHON ?=
PIP_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist worksteal
BENCH_ARGS ?=
RESOURCES_ARGS ?=
SANITIZE_ARGS ?= tests/ops
ARCHS ?= 80 90a 100

TORCH := torch==2.13.0
VENV := .venv

ifeq ($(strip $(PYTHON)),)
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
else
PY := $(PYTHON)
READY := checked
endif

.DEFAULT_GOAL := help
.PHONY: help demo test lint wheel wheels aot bench resources csrc-sanitize gpu gpu-report checked

help:
	@echo 'make demo   decode held-out problems with the bundled model'
	@echo 'make test   run the tests'
	@echo 'make lint   ruff, mypy, clang-format'
	@echo 'make wheel  build dist/*.tar.gz and dist/*.whl'
	@echo 'make wheels ARCHS="80 90a 100"  a wheel with CUDA kernels for each architecture'
	@echo 'make aot    compile every Triton kernel ahead of time and print its resources'
	@echo 'make resources      registers, spills, shared memory, occupancy of every CUDA kernel'
	@echo 'make csrc-sanitize  run the CUDA kernels on the CPU under the address and undefined-'
	@echo '                    behaviour sanitizers'
	@echo 'make bench  time the ops on this machine'
	@echo 'make gpu    build, test and time on a GPU (PART=build|tests|sanitize|micro|e2e, DRY=1)'

demo: $(READY)
	$(PY) -m pydllm demo

test: $(READY)
	$(PY) -m pytest $(PYTEST_ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -c 'import clang_format as c; c.clang_format()' --dry-run --Werror csrc/* tests/*.h

wheel: $(READY)
	$(PY) -m build

# One wheel an architecture; its version says which. An architecture that nvcc does not know ends it.
wheels: $(READY)
	@set -e; for arch in $(ARCHS); do \
	  echo "PYDLLM_CUDA_ARCHS=$$arch"; \
	  PYDLLM_BUILD_CUDA=1 PYDLLM_CUDA_ARCHS=$$arch \
	    $(PY) -m pip wheel $(PIP_ARGS) --quiet --no-deps --wheel-dir dist .; \
	done; ls -l dist/*.whl

aot: $(READY)
	$(PY) bench/resources.py

resources: $(READY)
	$(PY) bench/cuda_resources.py $(RESOURCES_ARGS)

# Python itself is not instrumented, so the sanitizers' libraries have to be there before it.
csrc-sanitize: $(READY)
	PYDLLM_TEST_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0:use_sigaltstack=0 \
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  $(PY) -m pytest -x -k 'cuda and not gpu' $(SANITIZE_ARGS)

bench: $(READY)
	@set -e; for case in bench/cases/[a-z]*.py; do \
	  $(PY) bench/run.py $$(basename $$case .py) $(BENCH_ARGS); done

# In parts of at most nine minutes; run it again while it exits with 3.
gpu: $(READY)
	$(PY) bench/gpu.py $(PART) $(if $(DRY),--dry)

gpu-report: $(READY)
	$(PY) bench/gpu.py report $(if $(README),--readme $(README))

# Without a GPU the demo and the tests have no use for the CUDA kernels, which take nvcc minutes.
$(VENV)/.ready checked: export PYDLLM_BUILD_CUDA ?= $(if $(shell command -v nvidia-smi),auto,0)

# What is compiled or declared decides whether the environment is up to date.
$(VENV)/.ready: pyproject.toml setup.py $(wildcard csrc/*)
	@set -e; \
	for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	    2>/dev/null; then break; fi; \
	  python=; \
	done; \
	if [ -z "$$python" ]; then \
	  echo 'No Python 3.11 or newer with venv found: install one (on Debian: python3-venv).' >&2; \
	  exit 1; \
	fi; \
	[ -x $(PY) ] || $$python -m venv $(VENV)
	$(PY) -m pip install '$(TORCH)'
	$(PY) -m pip install $(PIP_ARGS) '$(TORCH)' -e '.[test,demo]'
	@touch $@

# An environment that is already there keeps its torch; only what is missing is installed.
checked:
	@$(PY) -P -c 'import torch' 2>/dev/null || { \
	  echo 'PYTHON=$(PY): expected Python 3.11 or newer with torch >= 2.11, found no torch.' >&2; \
	  exit 1; }
	@$(PY) -P -c 'import pydllm' 2>/dev/null || { \
	  torch=$$($(PY) -P -c 'import torch; print(torch.__version__)') && \
	  $(PY) -m pip install $(PIP_ARGS) "torch==$$torch" -e '.[test,demo]'; }
