# dlkern's commands. `make demo` and `make test` need only python3 (3.10 or newer), g++ and make.
#   make demo                 set up, train LeNet with torch and with dlkern side by side, write report/index.html
#   make test                 set up, run all tests, in two processes (WORKERS=2)
#   make PYTHON=python3.12 …  use that environment as it is (torch must be there); no .venv is made
SHELL := /bin/bash
.DEFAULT_GOAL := help

ifdef PYTHON
PY := $(PYTHON)
SETUP_ENV :=
else
PY := .venv/bin/python
SETUP_ENV := .venv/.installed
endif

TORCH := torch==2.13.0
TRITON := triton==3.8.0

help:
	@sed -n 's/^#   make/make/p' Makefile

# torch is pinned: without the pin a plain `torch` may bring gigabytes of CUDA packages.
.venv/.installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/python -m pip install -q --upgrade pip
	.venv/bin/python -m pip install -q -c constraints.txt setuptools wheel ninja pybind11 numpy $(TORCH) $(TRITON)
	.venv/bin/python -m pip install -q -c constraints.txt pytest pytest-timeout pytest-xdist hypothesis expecttest click rich \
	  matplotlib scikit-learn safetensors transformers django polib sacrebleu rouge-score ruff mypy clang-format cmake
	.venv/bin/python -m pip install -q --no-deps -c constraints.txt torchvision
	touch $@

setup: $(SETUP_ENV)

# The native library, beside the sources; ninja rebuilds what changed. The CUDA column is built where a GPU is.
native: setup
	DLKERN_CUDA=$${DLKERN_CUDA:-auto} $(PY) setup.py -q build_ext --inplace

# The CUDA column compiled for the host, for tests: plain and checked.
cuda-on-host: setup
	for variant in cuda_on_host cuda_on_host_checked; do \
	  $(PY) setup.py -q build_native --variant $$variant || exit 1; done

install: native
	@$(PY) -c "import importlib.metadata as m; m.distribution('dlkern')" 2>/dev/null || \
	  DLKERN_CUDA=$${DLKERN_CUDA:-auto} $(PY) -m pip install -q --no-build-isolation --no-deps -e .

# The main job: what this machine has, LeNet and a ResNet-18 step both ways, a quick benchmark, report/index.html.
demo: native
	$(PY) -m dlkern demo --report report

# A file's tests stay in one process, and files keep their order: sorted by how many tests they have, those that compile
# would come last, one process alone with them. Threads that wait must not keep the other process off its core.
WORKERS ?= 2
test: install cuda-on-host lint
	OMP_WAIT_POLICY=passive $(PY) -m pytest tests -n $(WORKERS) --dist loadfile --no-loadscope-reorder

CPP_SOURCES := git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cuh' 'csrc/*.cu'
CLANG_FORMAT = "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')/clang-format"

lint: setup
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(CPP_SOURCES) | xargs $(CLANG_FORMAT) --dry-run -Werror

format: setup
	$(CPP_SOURCES) | xargs $(CLANG_FORMAT) -i

wheel: setup
	$(PY) -m pip wheel --no-build-isolation --no-deps -w dist .

# Long-running companions; their results are committed.
fuzz: install
	$(PY) tests/fuzz.py

# More of the CPU column under AddressSanitizer and UBSan than `make test` runs, on every instruction set.
sanitize: install
	$(PY) -m pytest tests/test_builds.py -m companion

mutate: install
	$(PY) tests/mutate.py

# Every CUDA C++ and Triton kernel compiled for every GPU; `make test` compiles those whose sources changed.
aot: install
	DLKERN_AOT=all $(PY) -m pytest tests/test_cuda_aot.py tests/test_triton_aot.py

.PHONY: help setup native cuda-on-host install demo test lint format wheel fuzz mutate sanitize aot
