# Everything here sets itself up in $(VENV) first; a fresh machine needs Python, make, and a network for pip.
#   make demo    all four tasks on the tiny checkpoints           make check   formatting, linters, types, tests
#   make test    the tests; ARGS="-k media" passes words on       make bench   the measurements in benchmarks/
#   make test-avx2   of the tests, what depends on the processor, as on an older one
#   make rehearse    whole requests of every variant, as if on a GPU; tables of memory,
#                    operations, and of the bytes that decoding moves
#   make kernels     the kernels of compiled blocks and of NABLA, built for GPUs that are not there
#   make gpu     the first hour on a GPU: what the code assumes, measured; DRY=1 without one
#   make exhaustive  make test and what it leaves out because another case shows it, all signals, hostile input
#   make fuzz    hostile input: 10,000 cases of each kind, and more while FUZZ_SECONDS=60 last (for each); all signals
# Another Python, environment or package source: make demo PYTHON=python3.12 VENV=/tmp/venv PIP_ARGS="--index-url ..."

PYTHON   ?= python3
VENV     ?= .venv
PIP_ARGS ?=
ARGS     ?=
# How long each fuzzer goes on under make fuzz, at the least.
FUZZ_SECONDS ?= 60
# What CUDA builds of the pinned PyTorch come with, and CPU builds without.
TRITON ?= triton==3.7.0

PY    := $(VENV)/bin/python
DEMO  := outputs/demo
BENCH := $(patsubst benchmarks/%.py,benchmarks.%,$(filter-out benchmarks/_%,$(wildcard benchmarks/*.py)))

# What test.py sets for itself, for the tests too: waiting threads sleep soon, also where other programs are running.
export GOMP_SPINCOUNT ?= 3000

.DEFAULT_GOAL := help
.PHONY: help demo test exhaustive test-avx2 rehearse kernels gpu fuzz lint check bench clean

help:
	@sed -n '2,11s/^# *//p' Makefile

# Each set of packages has a stamp that is older than its list when there is something to install.
$(VENV)/.runtime-installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "The pinned packages need Python 3.11 or newer, \
	this is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 ...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install $(PIP_ARGS) -r requirements.txt
	@touch $@

$(VENV)/.dev-installed: $(VENV)/.runtime-installed requirements-dev.txt requirements-serve.txt requirements-ui.txt
	$(PY) -m pip install $(PIP_ARGS) -r requirements-dev.txt
	@touch $@

# A video from words; a picture from words, which is then edited, and then begins a video.
demo: $(VENV)/.runtime-installed
	$(PY) test.py --config configs/config_tiny_t2v.yaml --seed 1 --output_filename $(DEMO).mp4 \
		--prompt "a red circle moves left on a white background"
	$(PY) test.py --config configs/config_tiny_t2i.yaml --seed 1 --output_filename $(DEMO)_picture.png \
		--prompt "a yellow square on a navy background"
	$(PY) test.py --config configs/config_tiny_i2i.yaml --seed 1 --output_filename $(DEMO)_edited.png \
		--image $(DEMO)_picture.png --prompt "make the square red"
	$(PY) test.py --config configs/config_tiny_i2v.yaml --seed 1 --output_filename $(DEMO)_animated.mp4 \
		--image $(DEMO)_edited.png --prompt "a red square moves right on a navy background"
	@echo "Look at $(abspath $(DEMO)).mp4, $(notdir $(DEMO))_picture.png, _edited.png and _animated.mp4 beside it"

test: $(VENV)/.dev-installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# What make test leaves out as well, and the 10,000 cases of each fuzzer.
exhaustive: $(VENV)/.dev-installed
	OMP_NUM_THREADS=1 FUZZ_SECONDS=0 $(PY) -m pytest -n 2 -m "exhaustive or not exhaustive" --dist loadfile --no-loadscope-reorder $(ARGS)

# What depends on the processor, as on one with AVX2 and nothing later, in particular no arithmetic in bfloat16.
test-avx2: $(VENV)/.dev-installed
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 OMP_NUM_THREADS=1 \
		$(PY) -m pytest -n 2 -m "processor and not exhaustive" tests/unit tests/equivalence tests/e2e/test_published_layouts.py $(ARGS)

# Whole requests of all variants, at their sizes, on a GPU that is not there; ARGS="5s_sft" for some.
rehearse: $(VENV)/.dev-installed
	OMP_NUM_THREADS=1 $(PY) -m tests.rehearsal.whole_requests $(ARGS)
	OMP_NUM_THREADS=1 $(PY) -m tests.rehearsal.words
	OMP_NUM_THREADS=1 $(PY) -m tests.rehearsal.decoding $(ARGS)
	OMP_NUM_THREADS=1 $(PY) -m tests.rehearsal.graphs $(ARGS)

build/triton/.installed:
	$(PY) -m pip install $(PIP_ARGS) --no-deps --target build/triton $(TRITON)
	@touch $@

# ARGS="80 89" for other compute capabilities, ARGS="--variants 5s_sft" for some variants.
kernels: $(VENV)/.dev-installed build/triton/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=build/triton $(PY) -m tests.rehearsal.kernels $(ARGS)

# The first hour on a GPU; DRY=1, or no GPU: every step with tiny sizes on the CPU.
gpu: $(VENV)/.dev-installed
	$(PY) tools/first_hour.py $(if $(DRY),--dry) $(ARGS)

fuzz: $(VENV)/.dev-installed
	OMP_NUM_THREADS=1 FUZZ_SECONDS=$(FUZZ_SECONDS) $(PY) -m pytest -n 2 tests/robustness -k "test_fuzz_ or test_signals" $(ARGS)

lint: $(VENV)/.dev-installed
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

check: lint test

bench: $(VENV)/.dev-installed
	@set -e; for name in $(BENCH); do echo "== $$name"; $(PY) -m $$name; done

# Caches only: the environment, the weights and the videos are the owner's.
clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
