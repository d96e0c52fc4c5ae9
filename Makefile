# Everything that one does with a checkout. `make` alone lists it.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
CONFIG ?= configs/demo.toml
TORCH ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# One stamp per choice of TORCH; with none chosen, whichever build is installed will do.
STAMP := $(if $(TORCH),$(VENV)/.installed-$(TORCH),$(or $(firstword $(wildcard $(VENV)/.installed-*)),$(VENV)/.installed-any))
# The build of torch: its local version says cpu; every other build of that release carries CUDA.
TORCH_cpu := torch==2.13.0+cpu
TORCH_cuda := torch!=2.13.0+cpu
# Triton's interpreter, for the tests of the kernels: 286 MB to fetch and 1 GB on the disk, so only where nothing may be
# left out. A CUDA build of torch has brought Triton along.
TRITON := $(if $(filter true,$(CI)),$(VENV)/.triton)
SOURCES := persona jobs storage tests
# What pip says when no package index answers.
OFFLINE := NewConnectionError|NameResolutionError|name resolution|Max retries|Read timed out|unreachable

# One sentence for the two failures that one can mend; pip's own words for the rest.
define EXPLAIN
if grep -qE '$(OFFLINE)' $(VENV)/install.log; then \
	echo "No package index answers: connect to the network, or name an index with PIP_INDEX_URL, and run make again."; \
elif [ -n "$(TORCH)" ] && grep -q 'requirement torch' $(VENV)/install.log; then \
	echo "The package index has no $(TORCH) build of this torch: name one that has with PIP_EXTRA_INDEX_URL."; \
else grep -v '^WARNING' $(VENV)/install.log; echo "The installation failed: see the lines above, mend the cause and run make again."; fi >&2
endef

.DEFAULT_GOAL := help
.PHONY: help run test lint check bench-gpu clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(STAMP)  ## start persona with CONFIG=configs/demo.toml; TORCH=cpu|cuda chooses the build of torch
	@$(BIN)/persona serve --config $(CONFIG) --demo

test: $(STAMP) $(TRITON)  ## run the whole test suite, a core or more for each worker; ARGS are passed to pytest
	@$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

lint: $(STAMP)  ## ruff and mypy
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/mypy

check: lint test  ## what CI runs: lint and test

bench-gpu: $(STAMP)  ## is the GPU path right, and how quick: appends to docs/BENCHMARKS.md; ARGS are passed on
	@$(BIN)/python tests/bench/gpu.py $(ARGS)

clean:  ## remove the virtual environment and every cache; the state folder of persona stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@case "$(TORCH)" in ""|cpu|cuda) ;; *) echo "TORCH is cpu or cuda, not $(TORCH)." >&2; exit 1;; esac
	@test -n "$(PYTHON)" || { echo "persona needs Python 3.11 or newer, and none was found: install one, or name it with make PYTHON=/path/to/python." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "persona needs Python 3.11 or newer, and $(PYTHON) is $$("$(PYTHON)" -V 2>&1): name another with make PYTHON=/path/to/python." >&2; exit 1; }
	@test -x $(BIN)/python && $(BIN)/python -m pip -V >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV) >/dev/null || \
		{ echo "$(PYTHON) cannot make a virtual environment: install its venv package (Debian: python3-venv, or python3.11-venv for that one) and try again." >&2; exit 1; }
	@echo "Installing persona and its dependencies into $(VENV): minutes the first time, seconds later."
	@$(BIN)/python -m pip install --disable-pip-version-check --retries 2 -c constraints.txt -e '.[demo,dev]' '$(or $(TORCH_$(TORCH)),torch)' \
		2>$(VENV)/install.log || { $(EXPLAIN); exit 1; }
	@rm -f $(VENV)/.installed-* && touch $@

$(VENV)/.triton: $(STAMP)
	@$(BIN)/python -m pip install --disable-pip-version-check --retries 2 -c constraints.txt -e '.[gpu]' \
		2>$(VENV)/install.log || { $(EXPLAIN); exit 1; }
	@touch $@
