# Sets itself up: `make demo` and `make test` need Python 3.11+ (with venv) and make, nothing else.
# They install exact versions: torch from here, all else from requirements/.
#
#   make test PYTHON=python3        use an environment that already has torch >= 2.11, as it is
#   make test PYTEST_ARGS='-x tests/ops'

PYTHON ?=
PIP_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist worksteal
BENCH_ARGS ?=
RESOURCES_ARGS ?=
BARS_ARGS ?=
SANITIZE_ARGS ?= tests/ops
OP ?=
ARCHS ?= 80 90a 100

TORCH := torch==2.13.0
# torch's CUDA builds bring a Triton of their own, its CPU builds none.
TRITON := triton==3.9.0
UV := uv==0.13.9
LOCKED := 3.14 3.13 3.12 3.11
EXTRAS := test,demo,eval,distill,ray
VENV := .venv
LOCK_VENV := .venv-lock
LATEST_VENV := .venv-latest
BUILD_VENV := .venv-build
DOCS_VENV := .venv-docs

ifeq ($(strip $(PYTHON)),)
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
else
PY := $(PYTHON)
READY := checked
endif

.DEFAULT_GOAL := help
.PHONY: help demo figures test lint docs lock test-latest wheel wheels aot bars bench resources \
  csrc-sanitize gpu gpu-report checked

# Sets $$python to an interpreter that there is a lock file for.
FIND_PYTHON = for python in python3 $(addprefix python,$(LOCKED)); do \
	  version=$$($$python -c 'import ensurepip, sys, venv; print("%d.%d" % sys.version_info[:2])' \
	    2>/dev/null || true); \
	  case " $(LOCKED) " in *" $${version:-none} "*) break;; esac; \
	  python=; \
	done; \
	[ -n "$$python" ] || { \
	  echo 'Expected Python $(LOCKED) with venv, found none (on Debian: python3-venv).' >&2; exit 1; }

help:
	@echo 'make demo   decode held-out problems with the bundled model'
	@echo 'make figures  draw the pictures of the README'
	@echo 'make test   run the tests'
	@echo 'make lint   ruff, mypy, clang-format'
	@echo 'make docs   build the documentation: out/site'
	@echo 'make lock   pin the newest versions of all dependencies: requirements/'
	@echo 'make test-latest  run the tests of integrations and models with the newest versions'
	@echo 'make wheel  build dist/*.tar.gz and dist/*.whl'
	@echo 'make wheels ARCHS="80 90a 100"  a wheel with CUDA kernels for each architecture'
	@echo 'make aot    compile every Triton kernel ahead of time and print its resources'
	@echo '            (OP="unmask verify": of these ops)'
	@echo 'make bars   machine code of every Triton kernel against the bars it is held to'
	@echo 'make resources      registers, spills, shared memory, occupancy of every CUDA kernel'
	@echo 'make csrc-sanitize  run the CUDA kernels on the CPU under the address and undefined-'
	@echo '                    behaviour sanitizers'
	@echo 'make bench  time the ops on this machine'
	@echo 'make gpu    build, test and time on a GPU (PART=first|build|tests|sanitize|micro|e2e, DRY=1)'

demo: $(READY)
	$(PY) -m pydllm demo

# The README's pictures, from 300 problems.
figures: $(READY)
	$(PY) -m pydllm demo --problems 300 --out docs/figures

# What the tests build in environments of their own is built with pinned versions, too.
test: $(READY)
	lock=$(CURDIR)/requirements/$(call version_of,$(PY)).txt; \
	PIP_CONSTRAINT=$$lock PIP_BUILD_CONSTRAINT=$$lock $(PY) -m pytest $(PYTEST_ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -c 'import clang_format as c; c.clang_format()' --dry-run --Werror csrc/* tests/*.h

# In an environment of its own: neither torch nor this package is imported. A broken link ends it.
docs: $(DOCS_VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict
	@echo 'out/site/index.html'

# Exact versions for Linux. torch, its Triton and NVIDIA's packages are pinned by $(TORCH).
lock:
	@set -e; $(FIND_PYTHON); $$python -m venv $(LOCK_VENV); \
	$(LOCK_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) '$(UV)'; \
	for version in $(LOCKED); do \
	  pins=$$(echo '$(TORCH)' | $(LOCK_VENV)/bin/uv pip compile --quiet --no-header --no-annotate \
	    --python-version $$version --python-platform linux \
	    --no-emit-package torch --no-emit-package triton \
	    --extra test --extra demo pyproject.toml -); \
	  { echo "# Made by make lock, for Python $$version."; \
	    echo "$$pins" | sed '/^nvidia-/d; /^cuda-/d'; } > requirements/$$version.txt; \
	done; \
	{ echo '# Made by make lock, for the documentation.'; \
	  $(LOCK_VENV)/bin/uv pip compile --quiet --no-header --no-annotate --universal \
	    --python-version 3.11 --group docs; } > requirements/docs.txt

# What users get from pip, in an environment of its own. Prints one line: versions and counts.
test-latest:
	@set -e; $(FIND_PYTHON); [ -x $(LATEST_VENV)/bin/python ] || $$python -m venv $(LATEST_VENV); \
	python=$(LATEST_VENV)/bin/python; \
	$$python -m pip install --quiet $(PIP_ARGS) '$(TORCH)'; \
	$(call add_triton,$$python) --quiet; \
	triton=$$($$python -c 'import importlib.metadata as m; print("triton==" + m.version("triton"))'); \
	PYDLLM_BUILD_CUDA=0 $$python -m pip install --quiet --upgrade --upgrade-strategy eager \
	  $(PIP_ARGS) '$(TORCH)' $$triton -e '.[$(EXTRAS)]'; \
	$$python requirements/latest.py $(PYTEST_ARGS)

wheel: $(BUILD_VENV)/.ready
	$(BUILD_VENV)/bin/python -m build --no-isolation

# One wheel an architecture; its version says which. An architecture that nvcc does not know ends it.
wheels: $(BUILD_VENV)/.ready
	@set -e; for arch in $(ARCHS); do \
	  echo "PYDLLM_CUDA_ARCHS=$$arch"; \
	  PYDLLM_BUILD_CUDA=1 PYDLLM_CUDA_ARCHS=$$arch \
	    $(BUILD_VENV)/bin/python -m pip wheel $(PIP_ARGS) --quiet --no-deps --no-build-isolation \
	      --wheel-dir dist .; \
	done; ls -l dist/*.whl

aot: $(READY)
	$(PY) -m bench.gpu.resources $(OP)

bars: $(READY)
	$(PY) -m bench.gpu.bars $(BARS_ARGS)

resources: $(READY)
	$(PY) -m bench.gpu.cuda_resources $(RESOURCES_ARGS)

# Python itself is not instrumented, so the sanitizers' libraries have to be there before it.
csrc-sanitize: $(READY)
	PYDLLM_TEST_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0:use_sigaltstack=0 \
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  $(PY) -m pytest -x -k 'cuda and not gpu' $(SANITIZE_ARGS)

bench: $(READY)
	$(PY) -m bench.ops $(BENCH_ARGS)

# In parts of at most nine minutes; run it again while it exits with 3.
gpu: $(READY)
	$(PY) -m bench.gpu $(PART) $(if $(DRY),--dry)

gpu-report: $(READY)
	$(PY) -m bench.gpu report $(if $(README),--readme $(README))

# Without a GPU the demo and the tests have no use for the CUDA kernels, which take nvcc minutes.
$(VENV)/.ready checked: export PYDLLM_BUILD_CUDA ?= $(if $(shell command -v nvidia-smi),auto,0)

# What is compiled or declared decides whether the environment is up to date.
$(VENV)/.ready: pyproject.toml setup.py $(wildcard csrc/* requirements/*)
	@set -e; $(FIND_PYTHON); [ -x $(PY) ] || $$python -m venv $(VENV)
	$(PY) -m pip install $(PIP_ARGS) '$(TORCH)' -r requirements/$(call version_of,$(PY)).txt
	@$(call add_triton,$(PY))
	$(PY) -m pip install --no-deps --no-build-isolation -e .
	@touch $@

# A build needs neither torch nor the tests: only what the wheel of $(PYTHON) is made with.
$(BUILD_VENV)/.ready: pyproject.toml $(wildcard requirements/*)
	@set -e; $(if $(PYTHON),python=$(PYTHON),$(FIND_PYTHON)); \
	$$python -m venv --clear $(BUILD_VENV)
	$(BUILD_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) \
	  -c requirements/$(call version_of,$(BUILD_VENV)/bin/python).txt build ninja pybind11 setuptools
	@touch $@

$(DOCS_VENV)/.ready: requirements/docs.txt
	@set -e; $(if $(PYTHON),python=$(PYTHON),$(FIND_PYTHON)); \
	$$python -m venv --clear $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --no-compile $(PIP_ARGS) \
	  -r requirements/docs.txt
	@touch $@

version_of = $$($(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
add_triton = [ "$$(uname)" != Linux ] || $(1) -P -c 'import triton' 2>/dev/null || \
	$(1) -m pip install $(PIP_ARGS) '$(TRITON)'

# An environment that is already there keeps its torch and all else; what is missing is installed.
checked:
	@$(PY) -P -c 'import torch' 2>/dev/null || { \
	  echo 'PYTHON=$(PY): expected Python 3.11 or newer with torch >= 2.11, found no torch.' >&2; \
	  exit 1; }
	@$(PY) -P -c 'import pydllm' 2>/dev/null || { set -e; \
	  $(PY) requirements/missing.py | $(PY) -m pip install $(PIP_ARGS) --no-deps -r /dev/stdin; \
	  $(call add_triton,$(PY)); \
	  $(PY) -m pip install --no-deps --no-build-isolation -e .; }
