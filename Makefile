# `make demo` and `make test` set up everything on a machine with Python and a compiler; `make`
# alone prints the targets and does nothing.
#
#   TORCH         the PyTorch to install, a pip requirement: make test TORCH=torch==2.13.0
#   EXTRAS        what to install beside it, by the extras of pyproject.toml; default: train for a demo
#                 that finds no environment, for the other targets everything
#   DCCONV_INSTALLER  pip: install without uv, see install.py
#   PYTHON, VENV  the interpreter and the folder of the virtual environment made from it
#   GATE_PYTHON   the interpreter of gpu-gate, which makes no environment: the one in VENV if it is
#                 there, else PYTHON; GATE_OPTIONS are passed on (tests/cuda/gate/gpu_gate.py)
#   TEST_OPTIONS  of pytest; as given below, it runs in a process per processor, at most eight
#   DCCONV_BUILD  see setup.py; local for demo, auto for everything else
#   DCCONV_DEBUG, DCCONV_VERBOSE, TORCH_CUDA_ARCH_LIST, CUDA_HOME, CXX, MAX_JOBS  see setup.py

PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
EXTRAS ?= train,bench,dev,docs
TEST_OPTIONS ?= -n auto --maxprocesses 8 --dist worksteal

BIN := $(VENV)/bin
GATE_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
SOURCES := $(sort $(shell find csrc -type f))
FORMATTED := $(filter %.h %.inl %.c %.cpp %.cuh %.cu,$(SOURCES) $(sort $(shell find tests -type f)))
SETTING_torch := $(TORCH)
SETTING_extras := $(EXTRAS)
SETTING_options := $(DCCONV_BUILD)|$(DCCONV_DEBUG)|$(TORCH_CUDA_ARCH_LIST)|$(CUDA_HOME)|$(CXX)

.PHONY: help demo test lint docs build bench findings machine-check gpu-gate clean FORCE

# A target's line says what it does, after two hashes.
help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 16

# Kernels for this machine alone: code for GPUs that are not there takes minutes to compile.
demo: ## train small networks on handwritten digits, in some two minutes
	@$(MAKE) --no-print-directory $(VENV)/built DCCONV_BUILD=$(or $(DCCONV_BUILD),local) \
	  EXTRAS=$(if $(filter file,$(origin EXTRAS)),$(or $(shell cat $(VENV)/extras 2> /dev/null),train),$(EXTRAS))
	$(BIN)/python -m train.digits

test: build lint docs ## lint, types, formatting, documentation, doctests and the test suite
	$(BIN)/python -m pytest $(TEST_OPTIONS)

lint: $(VENV)/installed ## linters, types and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

# A warning is an error. The generator's word about its own next release is none of ours.
docs: $(VENV)/installed ## the documentation site, in build/site
	@$(BIN)/python -c 'import material, mkdocs, mkdocstrings_handlers.python' || \
	  { echo "dcconv: the site needs its tools: $(BIN)/pip install --editable '.[docs]'"; exit 1; }
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs --quiet build

# BENCH_OPTIONS go to every measuring sub-command: make bench BENCH_OPTIONS=--quick
bench: build ## every benchmark of this device, then the report
	$(BIN)/python -m bench ops $(BENCH_OPTIONS)
	$(BIN)/python -m bench networks $(BENCH_OPTIONS)
	$(BIN)/python -m bench functions $(BENCH_OPTIONS)
	$(BIN)/python -m bench scaling $(BENCH_OPTIONS)
	$(BIN)/python -m bench report

# Outside CI: they install the public packages that they are about.
findings: ## run findings/*.sh: what surprises about libraries of this field
	@failed=0; for file in findings/*.sh; do echo "$$file"; bash $$file || failed=1; done; exit $$failed

# Outside CI, which executes a small set: half an hour on two cores.
machine-check: build ## execute the machine code of all GPU kernels and compare; check the model
	$(BIN)/python -m bench machine check
	$(BIN)/python -m bench machine agree

gpu-gate: ## everything that needs a GPU, on a machine that has one
	$(GATE_PYTHON) tests/cuda/gate/gpu_gate.py $(GATE_OPTIONS)

build: $(VENV)/built ## the environment and the compiled library
	@$(BIN)/python -c "from dcconv import native; print('dcconv:', native.missing or native.cuda_missing() or 'the compiled library has CUDA code')"

clean: ## remove what was built; the environment stays
	rm -rf build dist *.egg-info dcconv/_C.* dcconv/_build.py
	rm -rf .mypy_cache .pytest_cache .ruff_cache $(VENV)/built

# The settings of the last run: these files change, and what depends on them is made again, only
# when a setting does.
$(VENV)/torch $(VENV)/extras $(VENV)/options: FORCE | $(BIN)/pip
	@printf '%s\n' '$(SETTING_$(@F))' > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# Without build isolation the library is built against the PyTorch it will run with.
$(VENV)/installed: pyproject.toml $(VENV)/torch $(VENV)/extras
	@echo 'Filling $(VENV); the default build of PyTorch is a download of several GB.'
	$(BIN)/python install.py --quiet '$(TORCH)' 'setuptools>=77' wheel ninja
	DCCONV_BUILD=none $(BIN)/python install.py --quiet --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@

$(VENV)/built: setup.py $(SOURCES) $(VENV)/installed $(VENV)/options
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@
