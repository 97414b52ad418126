# Everything here sets itself up in $(VENV) first; a fresh machine needs Python, make, and a network for pip.
#   make demo    a video from the tiny checkpoint in assets/      make check   formatting, linters, types, tests
#   make test    the tests; ARGS="-k media" passes words on       make bench   the measurements in benchmarks/
# Another Python, environment or package source: make demo PYTHON=python3.12 VENV=/tmp/venv PIP_ARGS="--index-url ..."

PYTHON   ?= python3
VENV     ?= .venv
PIP_ARGS ?=
ARGS     ?=

PY    := $(VENV)/bin/python
DEMO  := outputs/demo.mp4
BENCH := $(patsubst benchmarks/%.py,benchmarks.%,$(filter-out benchmarks/_%,$(wildcard benchmarks/*.py)))

.DEFAULT_GOAL := help
.PHONY: help demo test lint check bench clean

help:
	@sed -n '2,4s/^# *//p' Makefile

# Each set of packages has a stamp that is older than its list when there is something to install.
$(VENV)/.runtime-installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "The pinned packages need Python 3.11 or newer, \
	this is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 ...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install $(PIP_ARGS) -r requirements.txt
	@touch $@

$(VENV)/.dev-installed: $(VENV)/.runtime-installed requirements-dev.txt
	$(PY) -m pip install $(PIP_ARGS) -r requirements-dev.txt
	@touch $@

demo: $(VENV)/.runtime-installed
	$(PY) test.py --config configs/config_tiny_t2v.yaml --prompt "a red circle moves left on a white background" \
		--output_filename $(DEMO) --seed 1
	@echo "The video is $(abspath $(DEMO))"

test: $(VENV)/.dev-installed
	$(PY) -m pytest $(ARGS)

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
