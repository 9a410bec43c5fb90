# Every target works on a fresh clone: `make demo` and `make test` each need nothing before them.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
TORCH ?= torch==2.13.0
export MAX_JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: help venv build demo test lint format bench simt cuda asan wide clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */\1|/' | column -t -s '|'

# The packages of pyproject.toml's optional dependencies $(1).
extras = $$($(PYTHON) -c "import tomllib; \
  e = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; \
  print(*{d for k in '$(1)'.split() for d in e[k]})")

venv: $(VENV)/.ready  ## .venv with torch and the tools

$(VENV)/.ready: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet setuptools ninja pybind11 $(call extras,test demo bench lint)
	touch $@

build: $(VENV)/.built  ## the extension, against the torch in .venv

$(VENV)/.built: $(VENV)/.ready $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

demo: build  ## the main job: train on real digits, invert real image crops (writes out/demo)
	$(PY) -m convbn_ext demo --out out/demo

# Tests that reach the loops with an implementation per instruction set.
ISA_TESTS := $(foreach t,conv_bn convolution_plan gathered_convolution grad_weight winograd narrow depthwise modules fold normalize golden block_lu gmres block_gmres krylov operator preconditioners solve methods invert,tests/test_$t.py)

test: build  ## the whole CPU test suite, then what depends on the instruction set again with fewer instructions
	$(PY) -m pytest
	ATEN_CPU_CAPABILITY=avx2 $(PY) -m pytest $(ISA_TESTS)
	ATEN_CPU_CAPABILITY=default $(PY) -m pytest $(ISA_TESTS)

# Fibers come from boost.context, a system package; root installs it, anybody else is told how.
BOOST := /usr/include/boost/context/detail/fcontext.hpp
LIBASAN = $(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libstdc++.so)

$(BOOST):
	@test "$$(id -u)" = 0 || { echo "make simt needs boost.context:  sudo apt-get install libboost-context-dev"; exit 1; }
	apt-get update -qq && apt-get install -y -qq libboost-context-dev

simt: build $(BOOST)  ## the CUDA kernels executed on the CPU: values, races, bounds, traffic
	$(MAKE) --no-print-directory -C tests/simt -j$(MAX_JOBS)
	$(PY) -m pytest tests/simt
	SIMT_BUILD=asan ASAN_OPTIONS=detect_leaks=0:halt_on_error=0:suppress_equal_pcs=0 LD_PRELOAD="$(LIBASAN)" $(PY) -m pytest tests/simt

# The CUDA build needs no GPU: compiled for every architecture, linked, inspected and imported here, in a tree of its own so
# that .venv keeps its library. nvcc comes from PATH, /usr/local/cuda or PyPI; everything else from the CUDA build of torch.
CUDA_TORCH ?= torch==2.14.1 torchvision==0.29.1
CUDA_VENV := .venv-cuda
CUDA_BIN := $(abspath $(CUDA_VENV))/bin
CUDA_TREE := build/cuda
FIND_NVCC := command -v nvcc || ls /usr/local/cuda/bin/nvcc $(abspath $(CUDA_VENV))/lib/python3*/site-packages/nvidia/cu13/bin/nvcc 2>/dev/null
CUDA_ARCHITECTURES ?= 8.0;9.0;10.0;12.0+PTX

$(CUDA_VENV)/.ready: pyproject.toml
	test -x $(CUDA_BIN)/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_BIN)/pip install --quiet $(CUDA_TORCH)
	$(CUDA_BIN)/pip install --quiet setuptools ninja pybind11 nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm $(call extras,test)
	$(FIND_NVCC) || $(CUDA_BIN)/pip install --quiet nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85
	touch $@

# A copy of the working tree at $(1), which keeps its build.
define copy_tree
	mkdir -p $(1) && cd $(1) && rm -rf csrc convbn_ext tests
	git ls-files --cached --others --exclude-standard | xargs -d '\n' ls -d 2>/dev/null | xargs -d '\n' cp -a --parents -t $(1)
endef

cuda: $(CUDA_VENV)/.ready  ## the CUDA build: four architectures, linked, its machine code checked, the CPU suite run in it
	$(call copy_tree,$(CUDA_TREE))
	nvcc=$$($(FIND_NVCC) | head -1); \
	  home=$$($$nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's|^#$$ _HERE_=\(.*\)/bin$$|\1|p'); \
	  cd $(CUDA_TREE) && CUDA_HOME=$$home TORCH_CUDA_ARCH_LIST='$(CUDA_ARCHITECTURES)' $(CUDA_BIN)/python setup.py --quiet build_ext --inplace
	cd $(CUDA_TREE) && $(CUDA_BIN)/python -m pytest --ignore=tests/simt

ASAN_TREE := build/asan
ASAN_TESTS := $(foreach t,conv_bn conv_bn_arguments convolution_plan gathered_convolution grad_weight winograd narrow depthwise modules gmres block_gmres krylov operator methods,tests/test_$t.py)

# gradcheck and hypothesis visit the same loops thousands of times: the fixed lists are enough here. -s shows what a
# sanitizer says before it ends the process.
asan: venv  ## the CPU extension and its tests under the address and undefined-behaviour sanitizers
	$(call copy_tree,$(ASAN_TREE))
	cd $(ASAN_TREE) && USE_CUDA=0 SANITIZE=address,undefined $(abspath $(PY)) setup.py --quiet build_ext --inplace
	cd $(ASAN_TREE) && LD_PRELOAD="$(LIBASAN)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  $(abspath $(PY)) -m pytest -s $(ASAN_TESTS) -k "not gradcheck and not any_shape and not compile and not opcheck"

WIDE_TREE := build/wide

wide: venv  ## the loops for AVX-512 on a CPU with AVX2: vectors of that width, without masked loads and stores
	$(call copy_tree,$(WIDE_TREE))
	cd $(WIDE_TREE) && USE_CUDA=0 EMULATE_AVX512=1 $(abspath $(PY)) setup.py --quiet build_ext --inplace
	cd $(WIDE_TREE) && ATEN_CPU_CAPABILITY=avx2 $(abspath $(PY)) -m pytest $(ISA_TESTS)

bench: build  ## timings against torch, SciPy and PETSc, as CSV and pictures in out/bench
	$(PY) bench/bench_conv_bn.py --out out/bench
	$(PY) bench/bench_networks.py --steps 2 --seconds 40 --out out/bench
	$(PY) bench/bench_solve.py --seconds 0.5 --skip "ours block" "SciPy GMRES" --out out/bench

lint: venv  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*' 'tests/simt/*' | grep -E '\.(h|cpp|inl|cuh|cu)$$' | xargs -r $(BIN)/clang-format --dry-run -Werror

format: venv  ## rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*' 'tests/simt/*' | grep -E '\.(h|cpp|inl|cuh|cu)$$' | xargs -r $(BIN)/clang-format -i

clean:  ## everything that make has made
	rm -rf $(VENV) $(CUDA_VENV) build out *.egg-info convbn_ext/*.so convbn_ext/_build_info.py .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
